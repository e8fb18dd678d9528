"""Making a cache of tiles, see ``cmpose.data.cache.store``: each frame is decoded once.

Tiles are appended, then made durable, and only then get their rows in the index; so whatever stops
the run, what the index lists is whole, and the next run goes on behind it.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from cmpose.data.cache.store import (
    COMPLETE,
    INDEX,
    PLAN,
    ROW,
    TILES,
    CacheError,
    Plan,
    Source,
    check_frames,
    check_source,
    describe,
    read_plan,
    relative_name,
    row_crcs,
    whole_rows,
)
from cmpose.data.cache.tiles import CacheFormat, plan
from cmpose.data.clips import ClipDataset, worker_init
from cmpose.data.cutouts import Window, shrink
from cmpose.data.frames import FrameError, check_size, read_picture
from cmpose.files import alone_in

_COMMIT_BYTES = 128 << 20
_COMMIT_SECONDS = 2.0


class BuildSummary(NamedTuple):
    """What a call has done, and what the store holds.

    Attributes:
        tiles: in the store.
        frames: in the store.
        bytes: of the tiles.
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
        kept = self.tiles - self.written
        if kept:
            text += f", {kept} tiles were there"
        return text + f"; {self.written} written in {self.seconds:.1f} s"


class _Frame(NamedTuple):
    """A frame's size and time of change, its tiles as (bytes, checksum), or why there are none."""

    stat: tuple[int, int]
    tiles: list[tuple[bytes, int]]
    error: str = ""


class _Frames(Dataset[_Frame]):
    """Frames of a plan as their tiles' bytes; loaded by as many processes as one likes."""

    def __init__(self, root: Path, made: Plan, first: int) -> None:
        self.root, self.plan = root, made
        self.windows: dict[int, list[tuple[int, Window]]] = {}
        for place, factor, *sides in made.tiles[first:]:
            self.windows.setdefault(place, []).append((factor, Window(*sides)))
        self.places = list(self.windows)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> _Frame:
        place = self.places[index]
        file, windows = self.root / self.plan.files[place], self.windows[place]
        stat = (-1, -1)
        try:
            found = os.stat(file)  # before it is read: a later change is one
            stat = (found.st_size, found.st_mtime_ns)
            picture = read_picture(file)
            check_size(str(file), picture, self.plan.sizes[place], "the annotation")
        except (FrameError, OSError) as error:
            return _Frame(stat, [(b"", 0)], str(error))
        tiles = [self._encode(shrink(picture, window, factor)) for factor, window in windows]
        return _Frame(stat, [(data, zlib.crc32(data)) for data in tiles])

    def _encode(self, part: np.ndarray) -> bytes:
        settings = self.plan.settings
        if settings["data.cache_format"] == "raw":
            return cv2.cvtColor(part, cv2.COLOR_BGR2RGB).tobytes()
        quality = [cv2.IMWRITE_JPEG_QUALITY, settings["data.cache_quality"]]
        return cv2.imencode(".jpg", part, quality)[1].tobytes()


def source_of(clips: ClipDataset) -> Source:
    """What a cache of these clips is made from."""
    return describe(
        clips.records, clips.root, clips.image_size, clips.num_frames, clips.data, train=clips.train
    )


def _make_plan(clips: ClipDataset) -> Plan:
    source = source_of(clips)
    format: CacheFormat = clips.data.cache_format
    frames = plan(clips.records, clips.image_size, clips.data, train=clips.train, format=format)
    return Plan(
        source.settings,
        source.digest,
        [relative_name(frame.file, clips.root) for frame in frames],
        [frame.picture_size for frame in frames],
        [(i, factor, *w) for i, frame in enumerate(frames) for factor, w in frame.windows],
    )


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
        folder: of the store; made if absent.
        overwrite: throws away what is there.
        workers: processes that decode; 0 decodes in this one.
        progress: shows a progress bar.

    Raises:
        ValueError: ``data.cache_quality`` or ``data.cache_detail`` is out of range.
        CacheError: another run is writing there, or what is there is of other clips or settings.
        FrameError: an unreadable frame, with ``data.on_error = raise``.
        OSError: the disk is full, and the like; what was written is kept.
    """
    quality, detail = clips.data.cache_quality, clips.data.cache_detail
    if not 1 <= quality <= 100:
        raise ValueError(f"data.cache_quality: expected 1 to 100, got {quality}")
    if not 0 <= detail < math.inf:
        raise ValueError(f"data.cache_detail: expected a number from 0 on, got {detail}")
    started = time.perf_counter()
    with alone_in(folder, "cache", "data.cache", CacheError):
        if overwrite:
            for name in (COMPLETE, PLAN, INDEX, TILES):  # readers of the old files keep them
                (folder / name).unlink(missing_ok=True)
        made, rows, done = _begin(clips, folder)
        if not (folder / COMPLETE).exists():
            loader = DataLoader(
                _Frames(clips.root, made, done),
                batch_size=None,
                num_workers=workers,
                worker_init_fn=_start_worker,
                collate_fn=_as_it_is,
            )
            bar = tqdm(
                total=len(made.tiles), initial=done, unit="tile", desc="cache", disable=not progress
            )
            with bar:
                skip = clips.data.on_error == "skip"
                _write(folder, made, rows, done, loader, bar, skip=skip)
            _complete(folder, rows)
    unreadable = {
        place for (place, *_), row in zip(made.tiles, rows, strict=True) if not row["bytes"]
    }
    return BuildSummary(
        len(rows),
        len(made.files),
        int(rows["bytes"].sum()),
        len(unreadable),
        len(rows) - done,
        time.perf_counter() - started,
    )


def _as_it_is(frame: Any) -> Any:
    return frame


def _start_worker(worker_id: int) -> None:
    """Ctrl-C reaches every process of the terminal; it is for the writing one to end the run."""
    worker_init(worker_id)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _begin(clips: ClipDataset, folder: Path) -> tuple[Plan, np.ndarray, int]:
    """The plan, the index's rows, and how many tiles are there; the rest of the files is cut."""
    if (folder / PLAN).exists():
        made, _ = read_plan(folder)
        check_source(folder, made, source_of(clips))
    else:
        made = _make_plan(clips)
        _write_durably(folder / PLAN, made.dump())
    rows = np.zeros(len(made.tiles), ROW)
    if (folder / INDEX).exists():
        found = np.frombuffer((folder / INDEX).read_bytes()[: rows.nbytes], np.uint8)
        rows.view(np.uint8)[: len(found)] = found
    tiles = folder / TILES
    done = whole_rows(rows)
    size = tiles.stat().st_size if tiles.exists() else 0
    ends = (rows["offset"] + rows["bytes"])[:done]
    done = int(np.searchsorted(ends, size, side="right"))  # no row without its tile
    check_frames(folder, made, rows[:done], clips.root)
    if done < len(rows) or not (folder / COMPLETE).exists():
        (folder / COMPLETE).unlink(missing_ok=True)
        rows[done:] = 0
        written = int(rows["bytes"][:done].sum())
        _check_space(folder, made, done, written)
        with open(tiles, "ab") as file:
            file.truncate(written)
        # As large as it will be, so that a full disk does not keep finished tiles from their rows.
        with open(folder / INDEX, "r+b" if (folder / INDEX).exists() else "w+b") as file:
            file.write(rows.tobytes())
            file.truncate()
            os.fsync(file.fileno())
    return made, rows, done


def _check_space(folder: Path, made: Plan, done: int, written: int) -> None:
    """Raw tiles have a size that is known: what cannot fit is not begun."""
    if made.settings["data.cache_format"] != "raw":
        return
    needed = sum(3 * (r - x) * (b - y) for _, _, x, y, r, b in made.tiles[done:])
    state = os.statvfs(folder)
    # What lies behind the last whole tile is about to be cut off.
    tiles = folder / TILES
    free = state.f_bavail * state.f_frsize
    free += max(0, (tiles.stat().st_size if tiles.exists() else 0) - written)
    if needed > free:
        raise OSError(
            f"{folder}: {needed / 1e9:,.2f} GB are needed there and {free / 1e9:,.2f} GB are free: "
            "give another data.cache, or data.cache_format=jpeg"
        )


def _write(
    folder: Path,
    made: Plan,
    rows: np.ndarray,
    done: int,
    frames: Iterable[_Frame],
    bar: tqdm,
    *,
    skip: bool,
) -> None:
    """Appends frames' tiles; fills ``rows`` from ``done`` on."""
    place = committed = done
    offset = int(rows["bytes"][:done].sum())
    pending, mark, failed = 0, time.monotonic(), False
    with open(folder / TILES, "r+b", buffering=0) as tiles, open(folder / INDEX, "r+b") as index:
        tiles.seek(offset)

        def commit() -> None:
            nonlocal committed, pending, mark, failed
            failed = True  # after a failed fsync, the next one may pass though bytes are lost
            os.fsync(tiles.fileno())
            new = rows[committed:place]
            new["row_crc"] = row_crcs(new)
            index.seek(committed * ROW.itemsize)
            index.write(new.tobytes())
            index.flush()
            os.fsync(index.fileno())
            committed, pending, mark, failed = place, 0, time.monotonic(), False

        try:
            for frame in frames:
                if frame.error and not skip:
                    raise FrameError(
                        f"{frame.error} (data.on_error=skip leaves such frames out of the cache)"
                    )
                first, owner = place, made.tiles[place][0]
                while place < len(rows) and made.tiles[place][0] == owner:
                    # An unreadable frame has one empty tile in place of all of its own.
                    data, crc = frame.tiles[min(place - first, len(frame.tiles) - 1)]
                    _write_all(tiles, data)
                    rows[place] = (offset, len(data), *frame.stat, crc, 0)
                    offset, pending, place = offset + len(data), pending + len(data), place + 1
                bar.update(place - first)
                if pending >= _COMMIT_BYTES or time.monotonic() - mark >= _COMMIT_SECONDS:
                    commit()
        except OSError as error:
            if not failed:
                commit()
            kept = int(rows["bytes"][:committed].sum())
            raise OSError(
                f"{folder / TILES}: {error.strerror or error}; {committed} of {len(rows)} tiles "
                f"({kept / 1e6:,.1f} MB) are written and kept: make room there and run the same "
                "command again, it goes on from them"
            ) from error
        finally:
            if not failed:
                commit()


def _write_all(file, data: bytes) -> None:
    """A raw file may take less than it is given, as before a disk is full."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _complete(folder: Path, rows: np.ndarray) -> None:
    _, plan_crc = read_plan(folder)
    values = {
        "bytes": int(rows["bytes"].sum()),
        "index_crc": zlib.crc32(rows.tobytes()),
        "plan_crc": plan_crc,
    }
    _write_durably(folder / COMPLETE, json.dumps(values).encode())


def _write_durably(path: Path, data: bytes) -> None:
    """Writes a file beside its place, and renames it there once it is on the disk."""
    partial = path.with_name(f".{path.name}.tmp")
    with open(partial, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
