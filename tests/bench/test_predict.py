"""The prediction bench: what it counts, that it runs, and that the document states it."""

from __future__ import annotations

import pytest

from bench import predict as bench
from bench.harness import records


def test_it_runs_and_writes_what_it_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "PEOPLE", (1, 3))
    monkeypatch.setattr(bench, "SIZE", (144, 256))
    monkeypatch.setattr(bench, "RECORD", tmp_path / "cpu" / "record.json")
    monkeypatch.setattr(bench, "PAGE", tmp_path / "page.md")
    bench.PAGE.write_text("Before.\n\n<!-- generated: predict -->\n\n<!-- end: predict -->\n")
    bench.main(["--quick", "--save"])
    record = records.load(bench.RECORD, records.Prediction)
    assert [row["people"] for row in record["rows"]] == [1, 3]
    for row in record["rows"]:
        assert row["frames"] == 8
        assert all(row["ms"][part] > 0 for part in bench.PARTS)
        assert sum(row["ms"].values()) == pytest.approx(1e3 / row["fps"])
        assert len(bench.cells(row)) == len(bench.HEAD)
    assert record["provenance"]["commit"]
    assert record["detector_ms"] > 0
    assert bench.report(record) in capsys.readouterr().out
    assert bench.report(record) in bench.PAGE.read_text()


def test_the_document_states_the_committed_record():
    record = records.load(bench.RECORD, records.Prediction)
    assert bench.report(record) in bench.PAGE.read_text()
    assert [row["people"] for row in record["rows"]] == list(bench.PEOPLE) * len(bench.MODELS)
