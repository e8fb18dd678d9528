"""The input bench: what it counts, by hand on small cases, and that it runs as documented."""

from __future__ import annotations

import re

import numpy as np
import pytest

from bench import input as bench
from bench.report.tables import table
from cmpose.config import DataConfig
from cmpose.data import pixels as pixels_module
from cmpose.data.cutouts import Window
from cmpose.data.pixels import ClipPixels
from tests.data import synthetic
from tests.shared_data import PROJECT


def tables_of(text: str) -> list[list[str]]:
    """The lines of the three tables in a text, without their heads."""
    heads = (table(head, []) for head in bench.HEADS)
    return [text.split(head + "\n")[1].split("\n\n")[0].strip().splitlines() for head in heads]


@pytest.fixture
def data(tmp_path):
    item = synthetic.sequence()
    synthetic.write_pictures(tmp_path / "data", item)
    return bench.Bench([item], tmp_path / "data", tmp_path / "caches")


def test_frames_decoded_a_clip(data) -> None:
    """Two people in each of four frames; clips 001, 012, 123, 233."""
    order = np.arange(8)
    assert bench.decoded_per_clip(data.clips("frames", "host", kept_mb=1), order) == 4 / 8
    # Only the last picture is kept: both people decode 2, 3, 3 and 2 frames.
    assert bench.decoded_per_clip(data.clips("frames", "host", kept_mb=0), order) == 20 / 8


def test_the_watch_sees_where_time_goes(data) -> None:
    watched = (ClipPixels._tile, pixels_module.warp, Window.take)
    for warp in ("host", "device"):
        clips = data.clips("frames", warp)
        with bench.stopwatch() as spent:
            clips[0]
        assert spent["decode"] > 0
        assert spent["warp"] > 0
    assert watched == (ClipPixels._tile, pixels_module.warp, Window.take)
    cost = bench.measure(data.clips("raw", "host"), 0.01)
    assert cost.rest > 0
    assert 0.44 < cost.megabytes < 0.45  # 3 × 256 × 192 × 3 bytes, and matrices and joints


def test_it_runs_and_prints_every_table(rendered, monkeypatch, capsys) -> None:
    real = bench.measure
    monkeypatch.setattr(bench, "measure", lambda clips, _: real(clips, 0.001))
    bench.main(["--quick", "--root", str(rendered)])
    out = capsys.readouterr().out
    assert re.search(r"given: \d+ clips of 8 frames; boxes are \d+ pixels high", out)
    speed, stores, shares = tables_of(out)
    assert len(speed) == 2 * len(bench.STORES)
    assert len(stores) == len(bench.STORES) - 1
    assert len(shares) == 2
    assert "| given | raw | " in stores[0]
    assert stores[0].endswith("| 0.00 |")  # a raw store holds the frames' own pixels


def test_documents_state_what_is_measured() -> None:
    speed, stores, shares = tables_of((PROJECT / "docs" / "data.md").read_text())
    names = [*bench.PICTURES, "given"]
    assert [line.split("|")[1:4] for line in speed] == [
        [f" {n} ", f" {store} ", f" {warp} "]
        for n in names
        for store in bench.STORES
        for warp in ("host", "device")
    ]
    assert len(stores) == len(names) * (len(bench.STORES) - 1)
    assert len(shares) == 2 * len(bench.PICTURES)
    for line in speed:  # what follows from the row's other numbers does follow
        _, _, _, decode, warp, rest, rate, *cores, _ = (c.strip() for c in line[1:-1].split("|"))
        total = sum(map(float, (decode, warp, rest)))
        rate = float(rate.replace(",", ""))
        assert rate == pytest.approx(1e3 / total, rel=0.03)
        for need, stated in zip(bench.NEEDS.values(), cores, strict=True):
            assert float(stated) == pytest.approx(need * total / 1e3, rel=0.01, abs=0.06)
    assert DataConfig().cache == ""  # what the text calls the default
