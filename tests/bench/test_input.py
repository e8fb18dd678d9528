"""The input bench: what it counts, by hand on small cases, and that it runs as documented."""

from __future__ import annotations

import re

import pytest

from bench import input as bench
from bench.report.tables import table
from cmpose.config import DataConfig
from tests.data import synthetic
from tests.shared_data import PROJECT


def rows_of(text: str) -> list[str]:
    """The lines of the table in a text, without its head."""
    return text.split(table(bench.HEAD, []) + "\n")[1].split("\n\n")[0].strip().splitlines()


def test_clips_a_second_and_what_one_holds(tmp_path) -> None:
    item = synthetic.sequence()
    synthetic.write_pictures(tmp_path / "data", item)
    clips = bench.clips_of([item], tmp_path / "data", tmp_path / "caches", "raw", "host")
    rate, megabytes = bench.measure(clips, 0.01)
    assert rate > 0
    assert 0.44 < megabytes < 0.45  # 3 × 256 × 192 × 3 bytes, and matrices and joints


def test_it_runs_and_prints_the_table(rendered, monkeypatch, capsys) -> None:
    real = bench.measure
    monkeypatch.setattr(bench, "measure", lambda clips, _: real(clips, 0.001))
    bench.main(["--quick", "--root", str(rendered)])
    out = capsys.readouterr().out
    assert re.search(r"given: \d+ clips of 8 frames; boxes are \d+ pixels high", out)
    assert len(rows_of(out)) == 2 * len(bench.STORES)


def test_documents_state_what_is_measured() -> None:
    speed = rows_of((PROJECT / "docs" / "data.md").read_text())
    assert [line.split("|")[1:4] for line in speed] == [
        [f" {n} ", f" {store} ", f" {warp} "]
        for n in (*bench.PICTURES, "given")
        for store in bench.STORES
        for warp in ("host", "device")
    ]
    for line in speed:
        rate, *cores = (c.strip().replace(",", "") for c in line.split("|")[4:-2])
        for need, stated in zip(bench.CLIPS_PER_S.values(), cores, strict=True):
            assert float(stated) == pytest.approx(need / float(rate), rel=0.02, abs=0.06)
    assert DataConfig().cache == ""  # what the text calls the default
