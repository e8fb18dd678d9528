"""What loading clips costs: ``python -m bench.input``, on any machine.

One core, as a loader process does it: from frames, decoded in full or at reduced scale, and from
caches of each kind; crops made on the host, or cut-outs for the device to warp. Time is the
processor's, of one thread, so that other programs hardly count; frames and caches are in memory
before. A second table splits a clip's time into stages. The pictures are rendered here; ``--root``
takes a data set in their place. docs/data.md has the figures.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import torch

from bench.harness.targets import CLIPS_PER_S, FP8_CLIPS_PER_S
from bench.report.tables import origin, table
from cmpose.config import DataConfig
from cmpose.data import frames, pictures
from cmpose.data.cache.build import build
from cmpose.data.cache.reader import TileCache
from cmpose.data.clips import ClipDataset
from cmpose.data.cutouts import collate
from cmpose.data.formats.posetrack import load_annotations
from cmpose.data.pixels import ClipPixels
from cmpose.data.sequence import Sequence
from cmpose.data.transforms import heatmap_targets
from cmpose.provenance import provenance
from cmpose.render.dataset import render_dataset

SIZE, NUM_FRAMES, BATCH = (256, 192), 3, 32
CORES = 8
NEEDED = {"H200": CLIPS_PER_S["H200"], "RTX 4090": FP8_CLIPS_PER_S}
"""Clips a second that the fastest step of ViT-B is to take."""
STORES: dict[str, dict[str, Any]] = {
    "frames": {},
    "frames, reduced": {"reduced_decode": True},
    "raw": {"cache_format": "raw"},
    "raw, detail 1.25": {"cache_format": "raw", "cache_detail": 1.25},
    "jpeg": {"cache_format": "jpeg"},
    "jpeg, detail 1.25": {"cache_format": "jpeg", "cache_detail": 1.25},
}
PICTURES = {"720p": (720, 1280), "1080p": (1080, 1920)}


def measure(clips: ClipDataset, seconds: float) -> tuple[float, float]:
    """Clips a second of one core and megabytes a clip, in random batches.

    They go on for about ``seconds``, after a first pass that fills the page cache.
    """
    for index in range(len(clips)):
        clips[0, index]
    rng, size, epoch = np.random.default_rng(0), 0, 0
    started = time.thread_time()
    while time.thread_time() - started < seconds or not epoch:
        epoch += 1
        order = rng.permutation(len(clips))
        for first in range(0, len(clips), BATCH):
            batch = collate([clips[epoch, int(i)] for i in order[first : first + BATCH]])
            size += sum(value.nbytes for value in batch.values())
    count = epoch * len(clips)
    return count / (time.thread_time() - started), size / count / 1e6


STAGES = ("read", "decode", "warp or cut", "augment", "collate", "hand over", "targets", "rest")


class Stages:
    """Splits processor time among stages: what runs within another counts for the inner one.

    Attributes:
        seconds: stage → time so far.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._within = 0.0  # of the stages that have ended within the one that runs

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """The block, or every call of the function that this decorates, counts for a stage."""
        started, before, self._within = time.thread_time(), self._within, 0.0
        try:
            yield
        finally:
            spent = time.thread_time() - started
            self.seconds[name] += spent - self._within
            self._within = before + spent


def staged(clips: ClipDataset, batches: int) -> dict[str, float]:
    """Stage → milliseconds of a clip, over some random batches.

    ``hand over`` is what a loader process does to give a batch to the training process: a copy into
    shared memory. ``targets`` is what the training process makes of its joints; on a GPU it makes
    them there. The copy to a GPU needs one and is not measured.
    """
    rng, stages = np.random.default_rng(0), Stages()
    watched: tuple[tuple[Any, str, str], ...] = (
        (frames, "read_with_header", "read"), (TileCache, "tile", "read"),
        (pictures, "_decode", "decode"), (ClipPixels, "of", "warp or cut"),
        (ClipDataset, "_item", "augment"),
    )  # fmt: skip
    with ExitStack() as stack, stages.stage("rest"):
        for owner, name, stage in watched:
            counted = stages.stage(stage)(getattr(owner, name))
            stack.enter_context(patch.object(owner, name, counted))
        for epoch in range(batches):
            items = [clips[epoch, int(i)] for i in rng.integers(len(clips), size=BATCH)]
            with stages.stage("collate"):
                batch = collate(items)
            with stages.stage("hand over"):
                for value in batch.values():
                    value.share_memory_()
            with stages.stage("targets"):
                heatmap_targets(
                    batch["keypoints"], batch["visible"], image_size=SIZE,
                    heatmap_size=(SIZE[0] // 4, SIZE[1] // 4),
                )  # fmt: skip
    return {name: 1e3 * value / (batches * BATCH) for name, value in stages.seconds.items()}


def clips_of(
    sequences: list[Sequence], root: Path, caches: Path, store: str, warp: Any
) -> ClipDataset:
    """A data set's training clips by the default recipe, from one of :data:`STORES`.

    A cache is made below ``caches`` if it is not there yet.
    """
    data = replace(DataConfig(), warp=warp, frame_cache_mb=0, **STORES[store])
    arguments = sequences, root, SIZE, NUM_FRAMES
    clips = ClipDataset(*arguments, data, train=True)
    if "cache_format" not in STORES[store]:
        return clips
    folder = caches / store.replace(", ", "-").replace(" ", "-")
    if not folder.is_dir():
        build(clips, folder / "train", progress=False)
    return ClipDataset(*arguments, replace(data, cache=str(folder)), train=True)


HEAD = ("pictures", "pixels from", "crops on", "clips/s a core", f"{CORES} cores, estimate",
        *(f"cores for {n} ({card})" for card, n in NEEDED.items()), "MB a clip")  # fmt: skip
STAGE_HEAD = ("pictures", "pixels from", "crops on", *(f"{stage}, ms" for stage in STAGES))
STAGED = ("frames", "frames, reduced", "raw", "jpeg")
"""The stores whose stages are shown."""

Rows = list[tuple[str, ...]]


def measured(rows: Rows, stages: Rows, name: str, root: Path, caches: Path, seconds: float) -> None:
    """Adds one data set's rows to both tables; prints what it holds."""
    sequences = load_annotations("annotations/train", root)
    records = clips_of(sequences, root, caches, "frames", "host").records
    # What a cut-out costs depends on how large people are.
    low, middle, high = np.percentile([record.box[3] for record in records], [10, 50, 90])
    files = {file for record in records for file in record.files}
    print(
        f"{name}: {len(records)} clips of {len(files)} frames; boxes are {middle:.0f} pixels high "
        f"(10th and 90th percentile {low:.0f} and {high:.0f})\n",
        flush=True,
    )
    for store in STORES:
        for warp in ("host", "device"):
            clips = clips_of(sequences, root, caches, store, warp)
            rate, megabytes = measure(clips, seconds)
            cores = [f"{CORES * rate:,.0f}", *(f"{need / rate:.1f}" for need in NEEDED.values())]
            rows.append((name, store, warp, f"{rate:,.0f}", *cores, f"{megabytes:.2f}"))
            if store in STAGED:
                split = staged(clips, max(1, round(seconds * rate / BATCH / 2)))
                stages.append((name, store, warp, *(f"{ms:.2f}" for ms in split.values())))


def main(arguments: list[str] | None = None) -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m bench.input")
    parser.add_argument("--quick", action="store_true", help="fewer frames, shorter runs")
    parser.add_argument("--root", default="", help="a data set in place of rendered frames")
    args = parser.parse_args(arguments)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    seconds, videos, length = (0.5, 2, 4) if args.quick else (2.0, 6, 20)
    more = f"crops {SIZE[0]}×{SIZE[1]}, {NUM_FRAMES} frames, batches of {BATCH}\n"
    print(origin(provenance(), "one core", f"OpenCV {cv2.__version__}", more))
    both: tuple[Rows, Rows] = [], []
    with tempfile.TemporaryDirectory() as folder:
        sources: dict[str, Path] = {"given": Path(args.root)} if args.root else {}
        for name, size in {} if args.root else PICTURES.items():
            sources[name] = Path(folder) / name
            render_dataset(
                sources[name], videos=videos, frames=length, seed=1, size=size, split="train",
                workers=2, progress=False,
            )  # fmt: skip
        for name, root in sources.items():
            measured(*both, name, root, Path(folder) / f"{name}-caches", seconds)
    rates, stages = map(table, (HEAD, STAGE_HEAD), both)
    print(f"{rates}\n\nProcessor time of a clip:\n\n{stages}")


if __name__ == "__main__":
    main()
