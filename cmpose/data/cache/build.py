"""Making a store: each frame is decoded once and cut into the tiles that clips can sample."""

from __future__ import annotations

import math
import signal
import time
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cmpose.data.cache.reader import TileCache
from cmpose.data.cache.store import (
    COMPLETE,
    INDEX,
    PLAN,
    TILES,
    CacheError,
    Source,
    StorePlan,
    check_source,
    describe,
    frame_state,
    read_plan,
    relative_name,
)
from cmpose.data.cache.tiles import CacheFormat, plan_tiles
from cmpose.data.cache.writer import CutFrame, StoreWriter
from cmpose.data.clips import ClipDataset, worker_init
from cmpose.data.cutouts import Window, shrink
from cmpose.data.frames import read_frame
from cmpose.data.pictures import FrameError, decode_picture
from cmpose.files import claim, stop_requests, write_bytes, writing

_ROUNDING = 2.0
"""Grey levels that two decodings of one picture may differ by, on average."""


class BuildSummary(NamedTuple):
    """What a call has done, and what the store holds.

    Attributes:
        tiles: in the store.
        frames: in the store.
        bytes: of all tiles together.
        unreadable: frames without tiles (``data.on_error = skip``).
        written: tiles that this call has added; the others were there.
        seconds: that this call took.
    """

    tiles: int
    frames: int
    bytes: int
    unreadable: int
    written: int
    seconds: float

    def __str__(self) -> str:
        text = f"{self.tiles} tiles of {self.frames} frames, {self.bytes / 1e6:,.1f} MB"
        if self.unreadable:
            text += f", {self.unreadable} frames unreadable"
        present = self.tiles - self.written
        if present:
            text += f", {present} tiles were there"
        return text + f"; {self.written} written in {self.seconds:.1f} s"


def build(
    clips: ClipDataset,
    folder: Path,
    *,
    overwrite: bool = False,
    workers: int = 0,
    progress: bool = True,
) -> BuildSummary:
    """Makes the store of a data set's clips, or goes on with one that was interrupted.

    Args:
        clips: made without a cache; ``data.cache_format`` and ``data.cache_quality`` say how
            pixels are stored, ``data.on_error`` whether an unreadable frame stops the run.
        folder: the store's; made if absent.
        overwrite: throws away what is there.
        workers: processes that decode; 0 decodes in this one.
        progress: shows a progress bar.

    Raises:
        ValueError: ``data.cache_quality`` or ``data.cache_detail`` is out of range.
        CacheError: what is there is of other clips or settings.
        FrameError: an unreadable frame, with ``data.on_error = raise``.
        InUse: another run is writing there.
        Interrupted: the run was asked to stop; what was written is kept.
        OutputError: the disk is full, and the like; what was written is kept.
    """
    quality, detail = clips.data.cache_quality, clips.data.cache_detail
    if not 1 <= quality <= 100:
        raise ValueError(f"data.cache_quality: expected 1 to 100, got {quality}")
    if not 0 <= detail < math.inf:
        raise ValueError(f"data.cache_detail: expected a number from 0 on, got {detail}")
    started = time.perf_counter()
    with claim(folder, "cache", "data.cache"):
        _check_ours(folder)
        if overwrite:
            with writing(folder):
                # Who reads the old files keeps them. The plan, which says what they are, goes last.
                for name in (COMPLETE, INDEX, TILES, PLAN):
                    (folder / name).unlink(missing_ok=True)
        plan = _read_or_write_plan(clips, folder)
        store = StoreWriter(folder, plan, clips.root)
        if not store.finished:
            loader = _load(_FrameCutter(clips.root, plan, store.kept, _annotations(clips)), workers)
            bar = tqdm(
                total=len(plan.tiles),
                initial=store.kept,
                unit="tile",
                desc="cache",
                disable=None if progress else True,
            )
            with stop_requests() as stop, bar:
                store.write(loader, bar, stop, skip=clips.data.on_error == "skip")
    rows = store.rows
    empty = {frame for (frame, *_), row in zip(plan.tiles, rows, strict=True) if not row["bytes"]}
    return BuildSummary(
        len(rows),
        len(plan.files),
        int(rows["bytes"].sum()),
        len(empty),
        len(rows) - store.kept,
        time.perf_counter() - started,
    )


def _check_ours(folder: Path) -> None:
    """Raises CacheError if files with a store's names are there that are of no store."""
    strangers = [folder / name for name in (TILES, INDEX, COMPLETE) if (folder / name).is_file()]
    if strangers and not (folder / PLAN).exists():
        raise CacheError(
            f"{strangers[0]}: would be replaced, but no {PLAN} beside it says that it is of a "
            "cache: move it, or give another data.cache"
        )


def other_pictures(store: TileCache, workers: int = 0) -> Iterator[str]:
    """Cuts every frame of a store anew; yields an empty text, or the frame if it is another now.

    Sizes and times are compared when a store is opened; a picture that was replaced by one of the
    same size, its time kept, is told by its pixels alone.
    """
    cutter = _FrameCutter(store.root, store.plan, 0, {})
    raw = store.plan.settings["data.cache_format"] == "raw"
    number = 0
    for frame, cut in zip(cutter.frames, _load(cutter, workers), strict=True):
        count = len(cutter.windows[frame])
        new = [data for data, _ in cut.tiles] * (count if cut.error else 1)
        old = [bytes(store.tile_bytes(number + i)) for i in range(count)]
        differ = any(_differ(a, b, raw=raw) for a, b in zip(old, new, strict=True))
        yield store.plan.files[frame] if differ else ""
        number += count


def _differ(old: bytes, new: bytes, *, raw: bool) -> bool:
    """Whether two encoded tiles are of other pictures; decoders of other versions may round."""
    if old == new or not old or not new:
        return old != new
    a, b = (np.frombuffer(d, np.uint8) if raw else decode_picture(d, TILES) for d in (old, new))
    return float(np.abs(a.astype(np.int16) - b).mean()) > _ROUNDING


def source_of(clips: ClipDataset) -> Source:
    """What a cache of these clips is made from."""
    return describe(
        clips.records, clips.root, clips.image_size, clips.num_frames, clips.data, train=clips.train
    )


def _read_or_write_plan(clips: ClipDataset, folder: Path) -> StorePlan:
    """The plan of the store that was begun in ``folder``; a new one if there is none."""
    source = source_of(clips)
    if (folder / PLAN).exists():
        plan, _ = read_plan(folder)
        check_source(folder, plan, source)
        return plan
    format: CacheFormat = clips.data.cache_format
    frames = plan_tiles(
        clips.records, clips.image_size, clips.data, train=clips.train, format=format
    )
    plan = StorePlan(
        source.settings,
        source.digest,
        [relative_name(frame.file, clips.root) for frame in frames],
        [frame.picture_size for frame in frames],
        [(i, factor, *w) for i, frame in enumerate(frames) for factor, w in frame.windows],
    )
    write_bytes(folder / PLAN, plan.dump())
    return plan


def _annotations(clips: ClipDataset) -> dict[str, str]:
    """Frame → the annotation file that says its size."""
    return {file: record.sequence.source for record in clips.records for file in record.files}


class _FrameCutter(Dataset[CutFrame]):
    """The frames of a plan from tile ``first`` on, each decoded and cut into its tiles.

    ``annotations`` says for each frame which file its size is from, for messages.
    """

    def __init__(
        self, root: Path, plan: StorePlan, first: int, annotations: Mapping[str, str]
    ) -> None:
        self.root, self.plan, self.annotations = root, plan, annotations
        self.windows: dict[int, list[tuple[int, Window]]] = {}
        for frame, factor, *sides in plan.tiles[first:]:
            self.windows.setdefault(frame, []).append((factor, Window(*sides)))
        self.frames = list(self.windows)

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> CutFrame:
        frame = self.frames[index]
        file, windows = self.root / self.plan.files[frame], self.windows[frame]
        state = frame_state(file)  # before it is read, so that a change while it is read is seen
        annotation = self.annotations.get(str(file), "the annotation")
        try:
            picture = read_frame(str(file), self.plan.sizes[frame], annotation)
        except FrameError as error:
            return CutFrame(state, [(b"", 0)], str(error))
        tiles = [self._encode(shrink(picture, window, factor)) for factor, window in windows]
        return CutFrame(state, [(data, zlib.crc32(data)) for data in tiles])

    def _encode(self, part: np.ndarray) -> bytes:
        settings = self.plan.settings
        if settings["data.cache_format"] == "raw":
            return cv2.cvtColor(part, cv2.COLOR_BGR2RGB).tobytes()
        quality = [cv2.IMWRITE_JPEG_QUALITY, settings["data.cache_quality"]]
        return cv2.imencode(".jpg", part, quality)[1].tobytes()


def _load(cutter: _FrameCutter, workers: int) -> DataLoader[CutFrame]:
    return DataLoader(
        cutter,
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_start_worker,
        collate_fn=_as_it_is,
    )


def _as_it_is(frame: Any) -> Any:
    return frame


def _start_worker(worker_id: int) -> None:
    """Ctrl-C reaches every process of the terminal; only the one that writes acts on it."""
    worker_init(worker_id)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
