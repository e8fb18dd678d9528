"""The commands whose records the documents state: what they count, write and print."""

from __future__ import annotations

import re

import pytest
import torch

from bench import cpu_gain, predict
from bench import input as input_bench
from bench.harness import records
from bench.report import tables
from cmpose import ops
from cmpose.config import DataConfig
from tests.data import synthetic
from tests.shared_data import PROJECT


def test_pairs_run_both_backends_in_turns():
    backends = []

    def call():
        backends.append(ops.explain("temporal_attention", torch.ones(1, 2, 1, 3, 1, 2)).backend)

    gain = cpu_gain.measure(call, 2)
    assert backends == ["reference", "cpu", "cpu", "reference", "reference", "cpu"]
    assert gain["gain"] > 0
    assert set(gain) == {"auto", "reference", "gain"}


def test_the_gain_is_printed_as_it_is_saved(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cpu_gain, "RECORD", tmp_path / "cpu" / "gain.json")
    monkeypatch.setattr(cpu_gain, "CASES", {"a step": lambda: lambda: None})
    monkeypatch.setattr(cpu_gain, "THREADS", (1,))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    cpu_gain.main(["--pairs", "1", "--save"])
    record = records.load(cpu_gain.RECORD, records.Gain)
    assert tables.cpu_gain(record) in capsys.readouterr().out
    with pytest.raises(records.SchemaError, match=r"gain\.json: rows\[0\]\.gain: expected "):
        records.check(
            {**record, "rows": [{**record["rows"][0], "gain": -1.0}]}, records.Gain, "gain.json"
        )


def test_a_predictions_cost_is_written_as_it_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(predict, "PEOPLE", (1, 3))
    monkeypatch.setattr(predict, "MODELS", {"tiny": (predict.TINY, 8)})
    monkeypatch.setattr(predict, "SIZE", (144, 256))
    monkeypatch.setattr(predict, "RECORD", tmp_path / "cpu" / "record.json")
    monkeypatch.setattr(predict, "PAGE", tmp_path / "page.md")
    predict.PAGE.write_text("Before.\n\n<!-- generated: predict -->\n\n<!-- end: predict -->\n")
    predict.main(["--save"])
    record = records.load(predict.RECORD, records.Prediction)
    assert [row["people"] for row in record["rows"]] == [1, 3]
    for row in record["rows"]:
        assert row["frames"] == 8
        assert all(row["ms"][part] > 0 for part in predict.PARTS)
        assert sum(row["ms"].values()) == pytest.approx(1e3 / row["fps"])
        assert len(predict.cells(row)) == len(predict.HEAD)
    assert record["detector_ms"] > 0
    assert predict.report(record) in capsys.readouterr().out
    assert predict.report(record) in predict.PAGE.read_text()


def test_the_document_states_the_committed_predictions():
    record = records.load(predict.RECORD, records.Prediction)
    assert predict.report(record) in predict.PAGE.read_text()
    assert [row["people"] for row in record["rows"]] == list(predict.PEOPLE) * len(predict.MODELS)


def rows_of(text):
    """The lines of the table in a text, without its head."""
    table = text.split(tables.table(input_bench.HEAD, []) + "\n")[1]
    return table.split("\n\n")[0].strip().splitlines()


def test_stages_are_what_runs_in_them_and_add_up(monkeypatch):
    now = 0.0
    monkeypatch.setattr(input_bench.time, "thread_time", lambda: now)
    stages = input_bench.Stages()

    def inner():
        nonlocal now
        now += 4

    work = stages.stage("decode")(inner)
    with stages.stage("rest"):
        with stages.stage("read"):
            now += 1
            work()
            work()
            now += 2
        now += 8
    assert {k: v for k, v in stages.seconds.items() if v} == {"read": 3, "decode": 8, "rest": 8}


def test_every_stage_of_a_clip_takes_time(tmp_path):
    item = synthetic.sequence()
    synthetic.write_pictures(tmp_path / "data", item)
    for store, without in (("frames", set()), ("raw", {"decode"})):
        clips = input_bench.clips_of([item], tmp_path / "data", tmp_path / "caches", store, "host")
        split = input_bench.staged(clips, 1)
        assert {name for name, ms in split.items() if ms == 0} == without
    rate, megabytes = input_bench.measure(clips, 0.01)
    assert rate > 0
    assert 0.44 < megabytes < 0.45  # 3 × 256 × 192 × 3 bytes, and matrices and joints


def test_loading_runs_and_prints_its_table(rendered, monkeypatch, capsys):
    real = input_bench.measure
    monkeypatch.setattr(input_bench, "measure", lambda clips, _: real(clips, 0.001))
    input_bench.main(["--quick", "--root", str(rendered)])
    out = capsys.readouterr().out
    assert re.search(r"given: \d+ clips of 8 frames; boxes are \d+ pixels high", out)
    assert len(rows_of(out)) == 2 * len(input_bench.STORES)
    assert out.count("| given |") == 2 * (len(input_bench.STORES) + len(input_bench.STAGED))


def test_the_document_states_what_loading_costs():
    speed = rows_of((PROJECT / "docs" / "data.md").read_text())
    assert [line.split("|")[1:4] for line in speed] == [
        [f" {n} ", f" {store} ", f" {warp} "]
        for n in (*input_bench.PICTURES, "given")
        for store in input_bench.STORES
        for warp in ("host", "device")
    ]
    for line in speed:
        rate, eight, *cores = (c.strip().replace(",", "") for c in line.split("|")[4:-2])
        if rate == "not yet measured":
            continue
        assert float(eight) == pytest.approx(8 * float(rate), rel=0.02, abs=5)
        for need, stated in zip(input_bench.NEEDED.values(), cores, strict=True):
            assert float(stated) == pytest.approx(need / float(rate), rel=0.02, abs=0.06)
    assert DataConfig().cache == ""  # what the text calls the default
