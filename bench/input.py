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
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import cv2
import numpy as np
import torch

from bench.report.tables import table
from cmpose.config import DataConfig
from cmpose.data import pixels as pixels_module
from cmpose.data.cache.build import BuildSummary, build
from cmpose.data.clips import ClipDataset
from cmpose.data.cutouts import Window, collate
from cmpose.data.formats.posetrack import load_annotations
from cmpose.data.sequence import Sequence
from cmpose.provenance import provenance
from cmpose.render.dataset import render_dataset

SIZE, NUM_FRAMES, BATCH = (256, 192), 3, 32
NEEDS = {"4090": 170, "H200": 700}
"""Clips/s that training of ViT-B is aimed at on a card: goals, see docs/performance.md."""

STORES: dict[str, dict[str, Any]] = {
    "frames": {},
    "raw": {"cache_format": "raw"},
    "raw, detail 1.25": {"cache_format": "raw", "cache_detail": 1.25},
    "jpeg": {"cache_format": "jpeg"},
    "jpeg, detail 1.25": {"cache_format": "jpeg", "cache_detail": 1.25},
}
PICTURES = {"720p": (720, 1280), "1080p": (1080, 1920)}
KEPT_MB = (64, 256, 1024)
"""Decoded frames that a process keeps, ``data.frame_cache_mb``."""


class Cost(NamedTuple):
    """Milliseconds of one core and megabytes sent, a clip."""

    decode: float
    warp: float
    rest: float
    megabytes: float


@contextmanager
def stopwatch() -> Iterator[dict[str, float]]:
    """Seconds that fetching pixels (``decode``) and making crops or cut-outs (``warp``) take."""
    spent = {"decode": 0.0, "warp": 0.0}

    def timed(name: str, function: Callable) -> Callable:
        @wraps(function)
        def call(*arguments: Any, **options: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*arguments, **options)
            finally:
                spent[name] += time.thread_time() - start

        return call

    with ExitStack() as stack:
        for name, owner, attribute in (
            ("decode", pixels_module.ClipPixels, "_tile"),
            ("warp", pixels_module, "warp"),
            ("warp", Window, "take"),
        ):
            original = getattr(owner, attribute)
            stack.enter_context(patch.object(owner, attribute, timed(name, original)))
        yield spent


def measure(clips: ClipDataset, seconds: float) -> Cost:
    """Random batches for about ``seconds``, after a first pass that fills the page cache."""
    for index in range(len(clips)):
        clips[0, index]
    rng = np.random.default_rng(0)
    count = size = 0
    started = time.thread_time()
    with stopwatch() as spent:
        epoch = 1
        while time.thread_time() - started < seconds or epoch == 1:
            order = rng.permutation(len(clips))
            for first in range(0, len(clips), BATCH):
                batch = collate([clips[epoch, int(i)] for i in order[first : first + BATCH]])
                size += sum(value.numel() * value.element_size() for value in batch.values())
            count, epoch = count + len(clips), epoch + 1
        total = time.thread_time() - started
    decode, warp = (1e3 * spent[name] / count for name in ("decode", "warp"))
    return Cost(decode, warp, 1e3 * total / count - decode - warp, size / count / 1e6)


def difference(clips: ClipDataset, other: ClipDataset) -> float:
    """Root mean square difference of the host's crops, grey levels."""
    squares, count = 0.0, 0
    for index in range(len(clips)):
        off = clips[0, index]["clip"].double() - other[0, index]["clip"].double()
        squares, count = squares + float((off**2).sum()), count + off.numel()
    return (squares / count) ** 0.5


def decoded_per_clip(clips: ClipDataset, order: np.ndarray) -> float:
    """Pictures that one process decodes a clip, in this order of clips, from an empty start."""
    before = clips._pixels.pictures.decoded
    for index in order:
        clips[0, int(index)]
    return (clips._pixels.pictures.decoded - before) / len(order)


class Bench:
    """A data set's training clips by the default recipe, and caches of them in ``folder``."""

    def __init__(self, sequences: list[Sequence], root: Path, folder: Path) -> None:
        self.sequences, self.root, self.folder = sequences, root, folder
        self.built: dict[str, BuildSummary] = {}

    def clips(self, name: str, warp: Any, kept_mb: int = 0) -> ClipDataset:
        data = replace(DataConfig(), warp=warp, **STORES[name])
        if name != "frames":
            folder = self.folder / name.replace(", ", "-").replace(" ", "-")
            if name not in self.built:
                self.built[name] = build(self._open(data), folder / "train", progress=False)
            data = replace(data, cache=str(folder))
        return self._open(data, kept_mb)

    def _open(self, data: DataConfig, kept_mb: int = 0) -> ClipDataset:
        data = replace(data, frame_cache_mb=kept_mb)
        return ClipDataset(self.sequences, self.root, SIZE, NUM_FRAMES, data, train=True)


SPEED = ("pictures", "pixels from", "crops on", "decode, ms", "warp, ms", "rest, ms",
         "clips/s a core", *(f"cores for {need} ({card})" for card, need in NEEDS.items()),
         "MB a clip")  # fmt: skip
STORE = ("pictures", "store", "MB a frame", "times the frames' files", "made, frames/s",
         "crops differ by, RMS")  # fmt: skip
SHARE = ("pictures", "order", *(f"{kept} MB kept" for kept in KEPT_MB))
HEADS = (SPEED, STORE, SHARE)

Rows = list[tuple[str, ...]]


def measured(name: str, bench: Bench, seconds: float) -> tuple[Rows, Rows, Rows]:
    """Rows of the three tables for one data set; prints what it holds."""
    speed: Rows = []
    stores: Rows = []
    shares: Rows = []
    plain = bench.clips("frames", "host")
    files = {file for record in plain.records for file in record.files}
    on_disk = sum(Path(file).stat().st_size for file in files)
    # What a cut-out costs depends on how large people are.
    low, middle, high = np.percentile([record.box[3] for record in plain.records], [10, 50, 90])
    print(
        f"{name}: {len(plain)} clips of {len(files)} frames; boxes are {middle:.0f} pixels high "
        f"(10th and 90th percentile {low:.0f} and {high:.0f})\n",
        flush=True,
    )
    for store in STORES:
        for warp in ("host", "device"):
            *parts, megabytes = measure(bench.clips(store, warp), seconds)
            rate = 1e3 / sum(parts)
            cores = (f"{need / rate:.1f}" for need in NEEDS.values())
            times = (f"{part:.2f}" for part in parts)
            speed.append((name, store, warp, *times, f"{rate:,.0f}", *cores, f"{megabytes:.2f}"))
        if store != "frames":
            made, rms = bench.built[store], difference(plain, bench.clips(store, "host"))
            stores.append((
                name, store, f"{made.bytes / made.frames / 1e6:.2f}",
                f"{made.bytes / on_disk:.1f}", f"{made.frames / made.seconds:.0f}", f"{rms:.2f}",
            ))  # fmt: skip
    shuffled = np.random.default_rng(0).permutation(len(plain))
    for order, indices in (("one after the other", np.arange(len(plain))), ("random", shuffled)):
        kept = (bench.clips("frames", "host", megabytes) for megabytes in KEPT_MB)
        decoded = (f"{decoded_per_clip(clips, indices):.2f}" for clips in kept)
        shares.append((name, order, *decoded))
    return speed, stores, shares


def main(arguments: list[str] | None = None) -> None:
    """Prints the tables as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m bench.input")
    parser.add_argument("--quick", action="store_true", help="fewer frames, shorter runs")
    parser.add_argument("--root", default="", help="a data set in place of rendered frames")
    args = parser.parse_args(arguments)
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    seconds, videos, frames = (0.5, 2, 4) if args.quick else (4.0, 6, 20)
    origin = provenance()
    changed = " with changes" if origin["dirty"] else ""
    print(
        f"{origin['cpu']}, one core; OpenCV {cv2.__version__}, NumPy {np.__version__}, torch "
        f"{torch.__version__}, Python {origin['python']}; commit {origin['commit'][:9]}{changed}; "
        f"crops {SIZE[0]}×{SIZE[1]}, {NUM_FRAMES} frames, batches of {BATCH}\n"
    )
    every: tuple[Rows, Rows, Rows] = ([], [], [])
    with tempfile.TemporaryDirectory() as folder:
        sources: dict[str, Path] = {"given": Path(args.root)} if args.root else {}
        for name, size in {} if args.root else PICTURES.items():
            sources[name] = Path(folder) / name
            render_dataset(
                sources[name], videos=videos, frames=frames, seed=1, size=size, split="train",
                workers=2, progress=False,
            )  # fmt: skip
        for name, root in sources.items():
            sequences = load_annotations("annotations/train", root)
            bench = Bench(sequences, root, Path(folder) / f"{name}-caches")
            for rows, more in zip(every, measured(name, bench, seconds), strict=True):
                rows += more
    print("\n\n".join(table(*both) for both in zip(HEADS, every, strict=True)))


if __name__ == "__main__":
    main()
