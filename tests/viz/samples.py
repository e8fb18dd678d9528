"""Records and a report for tests of pages, made up without a model."""

from __future__ import annotations

from typing import Any

import numpy as np

from cmpose.report.page import Chart, Clip, ClipFrame, Line, Report, Table, Thumbnail
from cmpose.viz.record import jpeg_uri, make_record
from cmpose.viz.tokens import Tokens

GRID = (8, 6)
N = GRID[0] * GRID[1]


def tokens(rng: np.random.Generator, clusters: int = 5) -> Tokens:
    scores = rng.random((15, N))
    causal = np.sort(rng.permutation(N)[:15])
    noncausal = np.setdiff1d(np.arange(N), causal)
    return Tokens(
        grid=GRID,
        scores=scores / scores.sum(axis=1, keepdims=True),
        top=causal[rng.permutation(15)][:, None],
        causal=causal,
        noncausal=noncausal,
        assignment=rng.integers(0, clusters, len(noncausal)),
        centers=rng.choice(len(noncausal), clusters, replace=False),
    )


def record(seed: int, fine: str = "full", *, truth: bool = True) -> dict[str, Any]:
    """A 128 × 96 crop with joints, heatmaps around them, and tokens."""
    rng = np.random.default_rng(seed)
    keypoints = rng.uniform(10, 86, (15, 2))
    y, x = np.mgrid[:32, :24]
    heatmaps = np.exp(
        -((x - keypoints[:, 0, None, None] / 4) ** 2 + (y - keypoints[:, 1, None, None] / 4) ** 2)
        / 8
    )
    own = None if fine == "off" else tokens(rng)
    if fine == "causal_only":
        assert own is not None
        own = Tokens(own.grid, own.scores, own.top, own.causal, own.noncausal)
    return make_record(
        rng.integers(60, 200, (128, 96, 3), np.uint8),
        heatmaps,
        keypoints,
        rng.random(15),
        own,
        title=f"person {seed}",
        truth=np.where(np.arange(15)[:, None] == 3, np.nan, keypoints + 4) if truth else None,
    )


def report(fine: str = "full") -> Report:
    """Two clips of three frames, curves, a table, tiles; its name is an attack."""
    rng = np.random.default_rng(0)
    clips = [
        Clip(
            f"clip {c}",
            [ClipFrame(f"frame {f}", record(10 * c + f, fine), "a note", 12.0) for f in range(3)],
            start=1,
        )
        for c in range(2)
    ]
    steps = range(10, 910, 10)
    losses = [Line(name, [(s, factor / s) for s in steps]) for name, factor in LOSSES]
    pictures = [jpeg_uri(rng.integers(0, 255, (64, 48, 3), np.uint8)) for _ in range(2)]
    return Report(
        "Training run",
        "<script>alert(1)</script>",
        'A "lead" & more.',
        charts=[
            Chart("Loss", "step", losses, log=True),
            Chart("AP by step", "step", [Line("Mean", [(300, 20.0), (600, 30.0), (900, 33.0)])]),
        ],
        tables=[Table("By joint", ["ground truth"], [("nose", [61.25]), ("left hip", [None])])],
        table_notes=["Boxes: ground truth. Data set: </script><script>alert(2)</script>"],
        measure="By error.",
        worst=[
            Thumbnail(pictures[0], "a pose", "2.1", "x", 1),
            Thumbnail(pictures[1], "no clip", "2.0", "z"),
        ],
        best=[Thumbnail(pictures[1], "a pose", "0.1", "y", 0, False, pictures[0])],
        clips=clips,
        clips_intro="Clips.",
        facts=[("Folder", "a/very/long/" + "name" * 40)],
    )


LOSSES = (("loss", 30.0), ("pose", 20.0), ("mask", 1.0))
