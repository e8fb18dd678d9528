"""The gain of the CPU's path: what runs is what is asked for, and the table says it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import cpu_gain as bench
from bench.harness import records
from bench.report import tables
from cmpose import ops
from tests.bench.samples import ORIGIN


def test_pairs_run_both_backends_in_turns() -> None:
    asked = []

    def call() -> None:
        asked.append(ops.explain("temporal_attention", torch.ones(1, 2, 1, 3, 1, 2)).backend)

    made = bench.measure(call, 2)
    assert asked == ["reference", "cpu", "cpu", "reference", "reference", "cpu"]
    assert made["gain"] > 0
    assert set(made) == {"auto", "reference", "gain"}


def test_it_prints_what_it_saves(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "RECORD", tmp_path / "cpu" / "gain.json")
    monkeypatch.setattr(bench, "CASES", {"a step": lambda: lambda: None})
    monkeypatch.setattr(bench, "THREADS", (1,))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    bench.main(["--pairs", "1", "--save"])
    record = records.load(bench.RECORD, records.Gain)
    assert tables.cpu_gain(record) in capsys.readouterr().out
    assert "| a step | 1 |" in tables.cpu_gain(record)
    with pytest.raises(records.SchemaError, match=r"gain\.json: rows\[0\]\.gain: expected "):
        records.save(
            bench.RECORD, record | {"rows": [record["rows"][0] | {"gain": -1.0}]}, records.Gain
        )


def test_the_table() -> None:
    row = {"case": "a step", "threads": 2, "auto": 1234.4, "reference": 2000.0, "gain": 1.6}
    shown = tables.cpu_gain({"provenance": ORIGIN, "pairs": 7, "rows": [row]})
    assert "| a step | 2 | 2,000 | 1,234 | 1.60× |" in shown
    assert "medians of 7 pairs" in shown
