"""What loading clips costs: ``python -m bench.input``, on any machine.

One core: clips in random order, augmented, made into batches, as a loader process does it; from
frames, and from caches of each kind; crops made on the host, or cut-outs for the device to warp.
Time is the processor's, of one thread, so that other programs do not count; frames and caches are
in memory before. The pictures are rendered here; ``--root`` takes a data set in their place.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from bench.harness.targets import CLIPS_PER_S
from bench.report.tables import origin, table
from cmpose.config import DataConfig
from cmpose.data.cache.build import build
from cmpose.data.clips import ClipDataset
from cmpose.data.cutouts import collate
from cmpose.data.formats.posetrack import load_annotations
from cmpose.data.sequence import Sequence
from cmpose.provenance import provenance
from cmpose.render.dataset import render_dataset

SIZE, NUM_FRAMES, BATCH = (256, 192), 3, 32
STORES: dict[str, dict[str, Any]] = {
    "frames": {},
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
    rng = np.random.default_rng(0)
    count = size = 0
    started, epoch = time.thread_time(), 1
    while time.thread_time() - started < seconds or epoch == 1:
        order = rng.permutation(len(clips))
        for first in range(0, len(clips), BATCH):
            batch = collate([clips[epoch, int(i)] for i in order[first : first + BATCH]])
            size += sum(value.numel() * value.element_size() for value in batch.values())
        count, epoch = count + len(clips), epoch + 1
    return count / (time.thread_time() - started), size / count / 1e6


def clips_of(
    sequences: list[Sequence], root: Path, caches: Path, store: str, warp: Any
) -> ClipDataset:
    """A data set's training clips by the default recipe, from one of :data:`STORES`.

    A cache is made below ``caches`` if it is not there yet.
    """
    data = replace(DataConfig(), warp=warp, frame_cache_mb=0, **STORES[store])
    given = sequences, root, SIZE, NUM_FRAMES
    clips = ClipDataset(*given, data, train=True)
    if store == "frames":
        return clips
    folder = caches / store.replace(", ", "-").replace(" ", "-")
    if not folder.is_dir():
        build(clips, folder / "train", progress=False)
    return ClipDataset(*given, replace(data, cache=str(folder)), train=True)


HEAD = ("pictures", "pixels from", "crops on", "clips/s a core",
        *(f"cores for {n} ({card})" for card, n in CLIPS_PER_S.items()), "MB a clip")  # fmt: skip


def measured(name: str, root: Path, caches: Path, seconds: float) -> list[tuple[str, ...]]:
    """Rows of the table for one data set; prints what it holds."""
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
    rows = []
    for store in STORES:
        for warp in ("host", "device"):
            rate, megabytes = measure(clips_of(sequences, root, caches, store, warp), seconds)
            cores = (f"{need / rate:.1f}" for need in CLIPS_PER_S.values())
            rows.append((name, store, warp, f"{rate:,.0f}", *cores, f"{megabytes:.2f}"))
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m bench.input")
    parser.add_argument("--quick", action="store_true", help="fewer frames, shorter runs")
    parser.add_argument("--root", default="", help="a data set in place of rendered frames")
    args = parser.parse_args(arguments)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    seconds, videos, frames = (0.5, 2, 4) if args.quick else (4.0, 6, 20)
    more = f"crops {SIZE[0]}×{SIZE[1]}, {NUM_FRAMES} frames, batches of {BATCH}\n"
    print(origin(provenance(), "one core", f"OpenCV {cv2.__version__}", more))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sources: dict[str, Path] = {"given": Path(args.root)} if args.root else {}
        for name, size in {} if args.root else PICTURES.items():
            sources[name] = Path(folder) / name
            render_dataset(
                sources[name], videos=videos, frames=frames, seed=1, size=size, split="train",
                workers=2, progress=False,
            )  # fmt: skip
        for name, root in sources.items():
            rows += measured(name, root, Path(folder) / f"{name}-caches", seconds)
    print(table(HEAD, rows))


if __name__ == "__main__":
    main()
