"""Writing a store so that whatever stops the run, the next one goes on from there.

Tiles are appended, then made durable, and only then get their rows in the index. So all that the
index lists is whole, and what lies behind it is cut off when the store is opened again.
"""

from __future__ import annotations

import io
import json
import os
import threading
import time
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from tqdm import tqdm

from cmpose.data.cache.store import (
    COMPLETE,
    INDEX,
    ROW,
    TILES,
    StorePlan,
    check_frames,
    read_plan,
    row_crcs,
    whole_rows,
)
from cmpose.data.pictures import FrameError
from cmpose.files import Interrupted, OutputError, write_bytes, writing

_COMMIT_BYTES = 128 << 20
_COMMIT_SECONDS = 2.0


class CutFrame(NamedTuple):
    """A frame's tiles, ready to be stored.

    Attributes:
        state: the frame's size in bytes and time of change in ns, from before it was read.
        tiles: of each tile, its bytes and their CRC-32; a single empty one if there was an error.
        error: why the frame could not be read; empty if it could.
    """

    state: tuple[int, int]
    tiles: list[tuple[bytes, int]]
    error: str = ""


class StoreWriter:
    """A store that is being made, or is finished.

    Args:
        folder: the store's; its plan is written already.
        plan: what it is going to hold.
        root: the data set's folder.

    Attributes:
        rows: the index; rows of tiles that are not written yet are zero.
        kept: tiles that were there already.
        finished: whether there is nothing left to write.

    Raises:
        CacheError: frames of the tiles that are there have changed.
        OutputError: a raw store does not fit on the disk, or the folder cannot be written.
    """

    def __init__(self, folder: Path, plan: StorePlan, root: Path) -> None:
        self.folder, self.plan = folder, plan
        self.rows = np.zeros(len(plan.tiles), ROW)
        index = folder / INDEX
        if index.exists():
            stored = np.frombuffer(index.read_bytes()[: self.rows.nbytes], np.uint8)
            self.rows.view(np.uint8)[: len(stored)] = stored
        whole = whole_rows(self.rows)
        ends = (self.rows["offset"] + self.rows["bytes"])[:whole]
        # A row counts only if its tile is there.
        self.kept = int(np.searchsorted(ends, self._tiles_size(), side="right"))
        check_frames(folder, plan, self.rows[: self.kept], root)
        self.finished = self.kept == len(self.rows) and (folder / COMPLETE).exists()
        self._written = self._committed = self.kept
        self._offset = self._committed_bytes = int(self.rows["bytes"][: self.kept].sum())
        self._commit_failed = False
        if not self.finished:
            with writing(folder, "run the same command again"):
                self._cut_off()

    def _tiles_size(self) -> int:
        path = self.folder / TILES
        return path.stat().st_size if path.exists() else 0

    def _cut_off(self) -> None:
        """Drops all that lies behind the last whole tile."""
        (self.folder / COMPLETE).unlink(missing_ok=True)
        self.rows[self.kept :] = 0
        self._check_space()
        with open(self.folder / TILES, "ab") as tiles:
            tiles.truncate(self._offset)
        # The index gets its final size now: a disk that fills up later has room for the rows of
        # the tiles that it holds.
        path = self.folder / INDEX
        with open(path, "r+b" if path.exists() else "w+b") as index:
            index.write(self.rows.tobytes())
            index.truncate()
            os.fsync(index.fileno())

    def _check_space(self) -> None:
        """The size of raw tiles is known beforehand: what cannot fit is not begun."""
        if self.plan.settings["data.cache_format"] != "raw":
            return
        needed = sum(3 * (r - x) * (b - y) for _, _, x, y, r, b in self.plan.tiles[self.kept :])
        disk = os.statvfs(self.folder)
        # What lies behind the last whole tile is about to be cut off.
        cut = max(0, self._tiles_size() - self._offset)
        free = disk.f_bavail * disk.f_frsize + cut
        if needed > free:
            raise OutputError(
                f"{self.folder}: {needed / 1e9:,.2f} GB are needed there and {free / 1e9:,.2f} GB "
                "are free: give another data.cache, or data.cache_format=jpeg"
            )

    def write(
        self, frames: Iterable[CutFrame], bar: tqdm, stop: threading.Event, *, skip: bool
    ) -> None:
        """Appends the tiles of the frames that follow those that are kept, and finishes the store.

        Args:
            frames: in the plan's order.
            bar: is told how many tiles were written.
            stop: ends the run between two frames.
            skip: an unreadable frame gets empty tiles in place of an error.

        Raises:
            FrameError: an unreadable frame, without ``skip``.
            Interrupted: ``stop`` was set.
            OutputError: the disk is full, and the like. What was written is kept in each case.
        """
        path = self.folder / TILES
        with (
            writing(path, "run the same command again"),
            open(path, "r+b", buffering=0) as tiles,
            open(self.folder / INDEX, "r+b") as index,
        ):
            tiles.seek(self._offset)
            try:
                self._append_all(frames, tiles, index, bar, stop, skip=skip)
            except OSError:
                self._commit(tiles, index)
                with writing(path, f"run the same command again: {self._progress()}"):
                    raise
            finally:
                self._commit(tiles, index)
        self._complete()

    def _append_all(
        self,
        frames: Iterable[CutFrame],
        tiles: io.FileIO,
        index: BinaryIO,
        bar: tqdm,
        stop: threading.Event,
        *,
        skip: bool,
    ) -> None:
        last = time.monotonic()
        for frame in frames:
            if frame.error and not skip:
                raise FrameError(
                    f"{frame.error} (data.on_error=skip leaves such frames out of the cache)"
                )
            bar.update(self._append(tiles, frame))
            due = time.monotonic() - last >= _COMMIT_SECONDS
            if due or self._offset - self._committed_bytes >= _COMMIT_BYTES:
                self._commit(tiles, index)
                last = time.monotonic()
            if stop.is_set() and self._written < len(self.rows):
                self._commit(tiles, index)
                raise Interrupted(
                    f"{self.folder}: stopped; run the same command again: {self._progress()}"
                )

    def _progress(self) -> str:
        return (
            f"it goes on from the {self._committed} of {len(self.rows)} tiles "
            f"({self._committed_bytes / 1e6:,.1f} MB) that are written"
        )

    def _append(self, tiles: io.FileIO, frame: CutFrame) -> int:
        """Appends a frame's tiles and fills their rows; returns how many there are."""
        first = self._written
        frame_index = self.plan.tiles[first][0]
        while self._written < len(self.rows) and self.plan.tiles[self._written][0] == frame_index:
            # An unreadable frame comes with one empty tile, which stands for all of its own.
            data, crc = frame.tiles[min(self._written - first, len(frame.tiles) - 1)]
            _write_all(tiles, data)
            self.rows[self._written] = (self._offset, len(data), *frame.state, crc, 0)
            self._offset += len(data)
            self._written += 1
        return self._written - first

    def _commit(self, tiles: io.FileIO, index: BinaryIO) -> None:
        """Makes the tiles durable, then their rows; does nothing once this has failed.

        After a failed ``fsync`` the next one may pass although bytes are lost.
        """
        if self._commit_failed or self._committed == self._written:
            return
        self._commit_failed = True
        os.fsync(tiles.fileno())
        new = self.rows[self._committed : self._written]
        new["row_crc"] = row_crcs(new)
        index.seek(self._committed * ROW.itemsize)
        index.write(new.tobytes())
        index.flush()
        os.fsync(index.fileno())
        self._committed += len(new)
        self._committed_bytes += int(new["bytes"].sum())
        self._commit_failed = False

    def _complete(self) -> None:
        """Marks the store as finished, with what a reader compares it to."""
        _, plan_crc = read_plan(self.folder)
        values = {
            "bytes": int(self.rows["bytes"].sum()),
            "index_crc": zlib.crc32(self.rows.tobytes()),
            "plan_crc": plan_crc,
        }
        write_bytes(
            self.folder / COMPLETE, json.dumps(values).encode(), "run the same command again"
        )


def _write_all(file: io.FileIO, data: bytes) -> None:
    """Writes all of ``data``: a file without buffer may take less, as just before a full disk."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]
