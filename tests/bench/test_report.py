"""docs/performance.md is what the records say, and nothing else; charts likewise."""

from __future__ import annotations

import pytest

from bench.harness import records
from bench.harness.targets import TARGETS
from bench.report import __main__ as report
from bench.report import tables
from tests.bench.samples import CARD, ORIGIN, PASSED, content, record, step

LABEL = TARGETS[2].label


def test_the_page_is_up_to_date(tmp_path, monkeypatch):
    """``make performance-docs`` renews it; its generated parts are not edited by hand."""
    committed, edited = report.PAGE.read_text(), tmp_path / "page.md"
    edited.write_text(committed.replace(f"| {LABEL} |", "| faster |"))
    assert edited.read_text() != committed
    monkeypatch.setattr(report, "PAGE", edited)
    report.main()
    assert edited.read_text() == committed


def target_row(card):
    [row] = [x for x in tables.targets([card]).splitlines() if x.startswith(f"| {LABEL} |")]
    return row


def test_what_is_not_measured_says_so_beside_target_and_bound():
    rows = tables.targets([]).splitlines()[2:]
    assert len(rows) == len(TARGETS) + 1
    for row in rows:
        assert row.count(tables.NOT_YET) == 2
        assert "≥" in row
    assert "No kernel has been timed yet" in tables.status([])
    assert tables.NOT_YET in tables.results([]) + tables.train_step([])
    bound = 4 * 3 * 32 * 3 * 207 * 768 * 2 / 1008e3  # 366 MB in an RTX 4090's 1,008 GB/s
    assert target_row(content()).startswith(f"| {LABEL} | {bound:,.1f} | 91 / 385 |")


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, "| 100.0 (85 % of bound) | 3.00× compile; no sdpa_flash to compare with |"),
        ({"peers": {"eager": 900.0, "compile": 120.0}, "speedup_vs_best_peer": 1.2},
         "1.20× compile, short"),
        ({"peers": {"eager": 900.0, "compile": 80.0}, "speedup_vs_best_peer": 0.8},
         "0.80× compile, a loss"),
        ({"op_tests": PASSED | {"status": "failed", "failed": 2}, "speedup_vs_best_peer": None},
         "not recorded: tests failed"),
    ],
)  # fmt: skip
def test_a_record_stands_beside_its_target_with_losses_and_shortfalls(changes, shown):
    assert shown in target_row(content(record(**changes)))


@pytest.mark.parametrize(
    "shown",
    [
        "torch 2.13.0, triton 3.7.1",
        f"| {LABEL} | ███ 0.80× compile |",
        "<summary>temporal_attention: 1 records</summary>",
        "sdpa_flash: error: RuntimeError: no",
        "`dpc_knn`: not yet measured.",
        "| ours | 700.0 | 45.7 | 20.0 | 46.0 % |",
        "| compiled reference | error: RuntimeError: no |",
        "| backbone | 159.00 | 45.00 |",
    ],
)
def test_a_cards_results_are_on_the_page_with_losses_and_failures(shown):
    peers = {"eager": 900.0, "compile": 80.0, "sdpa_flash": "error: RuntimeError: no"}
    card = content(record(peers=peers, speedup_vs_best_peer=0.8), steps=(step(),))
    parts = (tables.status, tables.charts, tables.results, tables.train_step)
    assert any(shown in part([card]) for part in parts)


@pytest.mark.parametrize(
    ("status", "commit", "shown"),
    [
        ("passed", ORIGIN["commit"], "3.50× eager reference"),
        ("failed", ORIGIN["commit"], "no passed tests of the same commit"),
        ("passed", "another", "no passed tests of the same commit"),
        ("", "", "no passed tests of the same commit"),
    ],
)
def test_the_train_steps_ratio_needs_passed_tests(status, commit, shown):
    run = {"status": status, "provenance": ORIGIN | {"commit": commit}}
    card = content(record(), steps=(step(),)) | {"runs": {"tests": run} if status else {}}
    last = tables.targets([card]).splitlines()[-1]
    assert "700 clips/s (ours)" in last
    assert shown in last


PAGE = "# Page\nby hand\n<!-- generated: a -->\nold\n<!-- end: a -->\nmore by hand\n"


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (PAGE.replace("generated: a", "generated: b"), "no part is called 'b'"),
        (PAGE + PAGE, "once each"),
        ("by hand", "must have"),
        ("<!-- end: a -->\n<!-- generated: a -->\n", "in this order"),
    ],
)
def test_broken_markers_are_errors(page, message):
    assert tables.rendered(PAGE, {"a": "new"}) == PAGE.replace("old", "\nnew\n")
    with pytest.raises(tables.PageError, match=message):
        tables.rendered(page, {"a": "new"})


def test_a_cpus_records_are_no_results(tmp_path):
    origin = ORIGIN | {"gpu": None, "cpu": CARD}
    cpu = record(provenance=origin, speedup_vs_best_peer=None)
    records.save(tmp_path / "cpu.json", content(cpu))
    records.save(tmp_path / "step.json", content(steps=(step(provenance=origin),)))
    assert report.gpu_cards(tmp_path) == []
    records.save(tmp_path / "card.json", content(record()))
    assert [c["card"] for c in report.gpu_cards(tmp_path)] == [CARD]


def test_ratios_on_a_cpu_show_losses_too():
    cpu = {"provenance": ORIGIN | {"gpu": None}, "speedup_vs_best_peer": None}
    loss = record(shape={"B": 8, "threads": 2}, us=dict.fromkeys(("p20", "p50", "p80"), 400), **cpu)
    gain = record(shape={"B": 8, "threads": 1}, **cpu)
    lines = tables.cpu_ratios([gain, loss]).splitlines()
    assert "| 1 | 0.10 | compile 0.30, eager 0.90 | 0.11 eager | 0.33 compile |" in lines[2]
    assert "| 2 | 0.40 | compile 0.30, eager 0.90 | 0.44 eager | 1.33 compile, a loss |" in lines[3]
    assert "commit `012345678`, 2026-01-02; some processor, torch 2.13.0, " in lines[5]
