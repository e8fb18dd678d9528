"""The schema names what is wrong; a speed-up stands only where it may; files are written whole."""

from __future__ import annotations

import json

import pytest

from bench.harness import records
from bench.report import __main__ as report
from tests.bench.samples import CARD, PASSED, content, record, step


def check(result):
    records.check(result, records.OpRecord, "record")


@pytest.mark.parametrize("name", list(record()))
def test_every_field_is_needed_and_typed(name):
    lacking = record()
    del lacking[name]
    with pytest.raises(records.SchemaError, match=rf"^record: missing key '{name}'"):
        check(lacking)
    with pytest.raises(records.SchemaError, match=rf"^record: {name}: expected "):
        check(record(**{name: -1.5}))


NULL = r"speedup_vs_best_peer: expected null, as the op's tests did not pass, got 3\.0"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"us": {"p20": 3.0, "p50": 2.0, "p80": 4.0}}, r"^record: us: expected ascending"),
        ({"us": {"p20": 1.0, "p50": float("nan"), "p80": 4.0}}, r"us\.p50: expected a finite"),
        ({"wall_us": float("inf")}, r"wall_us: expected a finite"),
        ({"speed": 1}, r"^record: object contains unknown field speed"),
        ({"best_peer": "eager"}, r"best_peer: expected 'compile', the fastest"),
        ({"peers_timer": {"eager": "graph"}}, r"peers_timer: expected those of the peers that"),
        ({"peers": {"eager": "broken"}}, r"peers\.eager: expected "),
        ({"speedup_vs_best_peer": 3.5}, r"expected best peer over p50"),
        ({"op_tests": PASSED | {"status": "failed", "failed": 1}}, NULL),
        ({"op_tests": PASSED | {"status": "not run", "tests": 0}}, NULL),
        ({"op_tests": PASSED | {"tests": 0}}, NULL),
        ({"provenance": record()["provenance"] | {"gpu": None}}, "null without a GPU"),
    ],
)
def test_what_a_record_must_not_say(changes, message):
    with pytest.raises(records.SchemaError, match=message):
        check(record(**changes))


def test_a_peer_that_was_timed_otherwise_is_not_compared():
    """A time with launch gaps says nothing beside one of a graph."""
    timers = {"eager": "graph", "compile": "events"}
    check(record(peers_timer=timers, best_peer="eager", speedup_vs_best_peer=9.0))


def test_newer_records_replace_older_ones(tmp_path):
    path, results = tmp_path / "card.json", content(record())
    records.add(results, [record(wall_us=1.0), record(backend="cuda")], [step()])
    records.save(path, results)
    result = records.load(path)
    backends = {r["backend"]: r["wall_us"] for r in result["records"]}
    assert backends == {"triton": 1.0, "cuda": 130.0}
    assert len(result["train_step"]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["card.json"]  # nothing left beside it


def test_a_slow_down_is_told():
    """Of the same workload on the same backend of a card; 10 % are allowed."""
    results = content(record())
    times = [record(us={"p20": t, "p50": t, "p80": t}) for t in (110.0, 112.0)]
    others = [t | {"backend": "cuda"} for t in times]
    lines = records.slow_downs(results, [*times, *others])
    assert lines == ["triton: 112.0 µs, over 10 % more than the 100.0 µs of commit 012345678"]
    results["records"][0]["provenance"]["gpu"] = None
    assert records.slow_downs(results, times) == []


def test_a_broken_file_is_named_and_nothing_is_written(tmp_path):
    path = tmp_path / "card.json"
    records.save(path, content(record()))
    before = path.read_text()
    with pytest.raises(records.SchemaError, match=r"^card\.json: records\[0\]\.bytes: expected"):
        records.save(path, content(record(bytes=-1)))
    assert path.read_text() == before
    path.write_text("{")
    with pytest.raises(records.SchemaError, match=r"card\.json: not valid JSON at line 1"):
        records.load(path)


def test_another_cards_file_is_refused(tmp_path):
    path = tmp_path / "card.json"
    records.save(path, content(record()))
    assert records.load_or_empty(path, CARD)["records"]
    with pytest.raises(records.SchemaError, match="this machine's is 'Other'"):
        records.load_or_empty(path, "Other")
    with pytest.raises(records.SchemaError, match="expected that of Other"):
        records.check(content(record()) | {"card": "Other"})


def test_what_is_committed_is_as_it_should_be():
    for path in sorted(records.RESULTS.glob("*.json")):
        of_counters = path.match(report.COUNTERS)
        result = records.load(path, records.Counters if of_counters else records.Results)
        assert path.stem.removeprefix("counters-") == records.slug(result["card"])
        assert json.loads(path.read_text()) == result
