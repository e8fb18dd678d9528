"""docs/performance.md is what the records say, and nothing else; charts likewise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.gpu import __main__ as gpu
from bench.harness import records
from bench.harness.targets import TARGETS
from bench.report import __main__ as report
from bench.report import tables
from cmpose.provenance import machine
from tests.bench.samples import CARD, ORIGIN, PASSED, content, record, step


def test_the_page_is_up_to_date() -> None:
    """``make performance-docs`` renews it; its generated parts are not edited by hand."""
    assert report.main(["--check"]) == 0


def test_what_is_not_measured_says_so_beside_its_target() -> None:
    rows = tables.targets([]).splitlines()[2:]
    assert len(rows) == len(TARGETS) + 1
    for row in rows:
        assert row.count(tables.NOT_YET) == 2
        assert "≥" in row
    assert "No kernel has been timed yet" in tables.status([])
    assert tables.NOT_YET in tables.results([]) + tables.train_step([])


def target_row(card: Any) -> str:
    label = TARGETS[2].label
    [row] = [x for x in tables.targets([card]).splitlines() if x.startswith(f"| {label} |")]
    return row


def test_a_record_stands_beside_its_target_with_losses_and_shortfalls() -> None:
    whole = "| 100.0 (85 % of bound) | 3.00× compile; no sdpa_flash ran alike |"
    assert whole in target_row(content(record()))
    slow = record(peers={"eager": 900.0, "compile": 120.0}, speedup_vs_best_peer=1.2)
    assert "1.20× compile, short" in target_row(content(slow))
    lost = record(peers={"eager": 900.0, "compile": 80.0}, speedup_vs_best_peer=0.8)
    assert "0.80× compile, a loss" in target_row(content(lost))
    failed = PASSED | {"status": "failed", "failed": 2}
    untested = record(op_tests=failed, speedup_vs_best_peer=None)
    assert "not recorded: tests failed" in target_row(content(untested))
    assert "0.80× compile" in tables.results([content(lost)])


def test_a_failed_peer_is_on_the_page() -> None:
    result = tables.results([content(record())])
    assert "sdpa_flash: error: RuntimeError: no" in result
    assert "<summary>temporal_attention: 1 records</summary>" in result
    assert "`dpc_knn`: not yet measured." in result
    assert "torch 2.13.0, triton 3.7.1" in tables.status([content(record())])


def run(status: str, commit: str = ORIGIN["commit"]) -> dict[str, Any]:
    origin = ORIGIN | {"commit": commit}
    return {"stage": "tests", "status": status, "seconds": 1.0, "counts": {}, "details": [],
            "provenance": origin}  # fmt: skip


@pytest.mark.parametrize(
    ("runs", "shown"),
    [
        ({"tests": run("passed")}, "3.50× eager reference"),
        ({"tests": run("failed")}, "no passed tests of the same commit"),
        ({"tests": run("passed", "another")}, "no passed tests of the same commit"),
        ({}, "no passed tests of the same commit"),
    ],
)
def test_the_train_steps_ratio_needs_passed_tests(runs: Any, shown: str) -> None:
    card = content(record(), steps=(step(),)) | {"runs": runs}
    last = tables.targets([card]).splitlines()[-1]
    assert "700 clips/s (ours)" in last
    assert shown in last


def test_the_bound_stands_beside_the_target() -> None:
    """By hand: 366 MB in an RTX 4090's 1,008 GB/s."""
    moved = 4 * 3 * 32 * 3 * 207 * 768 * 2 / 1008e3
    assert target_row(content()).startswith(f"| {TARGETS[2].label} | {moved:,.1f} | 91 / 385 |")


def test_the_summary_of_a_card_has_its_targets_and_train_step() -> None:
    page = gpu.page(content(record(), steps=(step(),)), ["bench"])
    assert "| 100.0 (85 % of bound) | 3.00× compile; " in page
    assert "| ours | 700.0 | 45.7 | 20.0 | 46.0 % |" in page
    assert "| compiled reference | error: RuntimeError: no |" in page
    assert "| backbone | 159.00 | 45.00 |" in page
    assert machine() not in page


PAGE = "# Page\nby hand\n<!-- generated: a -->\nold\n<!-- end: a -->\nmore by hand\n"


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (PAGE.replace("generated: a", "generated: b"), "no part is called 'b'"),
        (PAGE + PAGE, "once each"),
        ("by hand", "must have"),
        ("<!-- end: a -->\n<!-- generated: a -->\n", "stands before"),
    ],
)
def test_broken_markers_are_errors(page: str, message: str) -> None:
    assert tables.rendered(PAGE, {"a": "new"}) == PAGE.replace("old", "\nnew\n")
    with pytest.raises(tables.PageError, match=message):
        tables.rendered(page, {"a": "new"})


def test_a_stale_or_edited_page_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(report.PAGE.read_text())
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "gpu_cards", lambda: [content(record())])
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0
    page.write_text(page.read_text() + "\nMore by hand.\n")
    assert report.main(["--check"]) == 0
    assert f"| {TARGETS[2].label} | {12 * '█'} 3.00× compile |" in page.read_text()
    page.write_text(page.read_text().replace("100.0 (85 % of bound)", "10.0 (99 % of bound)"))
    assert report.main(["--check"]) == 1


def test_a_cpus_records_are_no_results(tmp_path: Path) -> None:
    cpu = record(provenance=ORIGIN | {"gpu": None, "cpu": CARD}, speedup_vs_best_peer=None)
    records.save(tmp_path / "cpu.json", content(cpu))
    assert report.gpu_cards(tmp_path) == []
    records.save(tmp_path / "card.json", content(record()))
    assert [c["card"] for c in report.gpu_cards(tmp_path)] == [CARD]


def test_ratios_on_a_cpu_show_losses_too() -> None:
    origin = ORIGIN | {"gpu": None, "cpu": "a processor"}
    loss = record(
        shape={"B": 8, "threads": 2}, us={"p20": 399.0, "p50": 400.0, "p80": 401.0},
        provenance=origin, speedup_vs_best_peer=None,
    )  # fmt: skip
    gain = record(shape={"B": 8, "threads": 1}, provenance=origin, speedup_vs_best_peer=None)
    lines = tables.cpu_ratios([gain, loss]).splitlines()
    assert "| 1 | 0.10 | compile 0.30, eager 0.90 | 0.11 eager | 0.33 compile |" in lines[2]
    assert "| 2 | 0.40 | compile 0.30, eager 0.90 | 0.44 eager | 1.33 compile, a loss |" in lines[3]
    assert "commit `012345678`, 2026-01-02; a processor, torch 2.13.0, " in lines[5]
