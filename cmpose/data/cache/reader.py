"""Reading a finished cache: the store is opened and checked once, its tiles are mapped."""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Iterator
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct

from cmpose.config import DataConfig
from cmpose.data.cache.store import (
    COMPLETE,
    DAMAGED,
    INDEX,
    PLAN,
    ROW,
    TILES,
    CacheError,
    Source,
    check_frames,
    check_source,
    describe,
    read_plan,
    relative_name,
    store_folder,
)
from cmpose.data.cutouts import Tile, Window
from cmpose.data.formats.reader import Count, read
from cmpose.data.frames import PictureCache
from cmpose.data.pictures import FrameError, decode_picture
from cmpose.data.records import ClipRecord


class Complete(Struct):
    """``complete.json``: the size of the tiles, and checksums of the index and the plan."""

    bytes: Count
    index_crc: Count
    plan_crc: Count


class TileCache:
    """A finished store, opened for reading.

    It can be sent to other processes; each of them maps the file of tiles anew.

    Args:
        folder: the store.
        source: what it must have been made from. Frames must have the size in bytes and the time
            of change that they had then.
        keep_bytes: how much each process keeps of the JPEG tiles that it has decoded.

    Attributes:
        folder: as given.
        root: folder that frames are named relative to.
        plan: what the store holds.
        rows: its index.

    Raises:
        CacheError: unfinished, stale or damaged.
    """

    def __init__(self, folder: Path, source: Source, keep_bytes: int = 0) -> None:
        self.folder, self.root = folder, source.root
        self.plan, plan_crc = read_plan(folder)
        check_source(folder, self.plan, source)
        try:
            complete = read(folder / COMPLETE, Complete, CacheError, DAMAGED)
        except FileNotFoundError:
            raise CacheError(
                f"{folder}: the cache is unfinished: run the same cmpose cache command again, it "
                "goes on where it stopped"
            ) from None
        index = (folder / INDEX).read_bytes()
        size = (folder / TILES).stat().st_size
        if (zlib.crc32(index), plan_crc) != (complete.index_crc, complete.plan_crc):
            raise self._damaged(INDEX, f"or {PLAN}: not as it was written")
        if size != complete.bytes:
            raise self._damaged(TILES, f"{size} bytes, there were {complete.bytes}")
        self.rows = np.frombuffer(index, ROW)
        check_frames(folder, self.plan, self.rows, source.root)
        self._tiles_of: dict[str, list[int]] = {}
        for number, (frame, *_) in enumerate(self.plan.tiles):
            self._tiles_of.setdefault(self.plan.files[frame], []).append(number)
        self._format = self.plan.settings["data.cache_format"]
        self._decoded = PictureCache(keep_bytes)
        self._map: memoryview | None = None

    def _damaged(self, name: str, why: str) -> CacheError:
        return CacheError(
            f"{self.folder / name}: damaged ({why}): run cmpose cache --overwrite to make the "
            "cache anew"
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_map": None}

    @property
    def stored(self) -> str:
        """How pixels differ from the frames': empty if they do not."""
        settings = self.plan.settings
        quality, detail = settings["data.cache_quality"], settings["data.cache_detail"]
        texts = [] if quality is None else [f"as JPEG of quality {quality}"]
        texts += [f"shrunk to data.cache_detail={detail}"] if detail else []
        return ", ".join(texts)

    def tile_bytes(self, number: int) -> memoryview | bytes:
        """What is stored of a tile; nothing for an unreadable frame."""
        if not self.rows["bytes"][number]:
            return b""
        if self._map is None:
            with open(self.folder / TILES, "rb") as file:
                self._map = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        offset, size = int(self.rows["offset"][number]), int(self.rows["bytes"][number])
        return self._map[offset : offset + size]

    def tile(self, file: str, factor: int, window: Window, width: int) -> Tile:
        """The stored tile that holds a window of a frame, as far as the window is in the picture.

        Args:
            file: path of the frame.
            factor: the frame is shrunk by this whole factor.
            window: the part of the shrunk frame that is going to be sampled.
            width: the shrunk frame's, in pixels.

        Raises:
            FrameError: the frame could not be read when the cache was made.
            CacheError: no tile holds the window (never black pixels in its place), or the tile
                does not decode.
        """
        name = relative_name(file, self.root)
        left, right = max(window.left, 0), min(window.right, width)
        if left >= right:  # nothing of the picture shows
            left, right = 0, 0
        for number in self._tiles_of.get(name, ()):
            _, shrunk, *sides = self.plan.tiles[number]
            tile = Window(*sides)
            if right and not (
                shrunk == factor
                and tile.left <= left
                and right <= tile.right
                and tile.top <= window.top
                and window.bottom <= tile.bottom
            ):
                continue
            if not self.rows["bytes"][number]:
                raise FrameError(f"{file}: could not be read when the cache was made")
            return self._decode(number, tile)
        raise CacheError(
            f"{self.folder}: no tile of {name} (shrunk {factor} times) holds the pixels "
            f"{tuple(window)} (left, top, right, bottom) that a crop is sampled from: run cmpose "
            "cache --overwrite"
        )

    def _decode(self, number: int, tile: Window) -> Tile:
        if self._format == "raw":
            pixels = np.frombuffer(self.tile_bytes(number), np.uint8).reshape(*tile.shape, 3)
            return Tile(pixels, tile.left, tile.top, rgb=True)

        def decode(_: str) -> np.ndarray:
            damaged = self._damaged(TILES, f"tile {number} does not decode")
            try:
                decoded = decode_picture(bytes(self.tile_bytes(number)), TILES)
            except FrameError as error:
                raise damaged from error
            if decoded.shape[:2] != tile.shape:
                raise damaged
            return decoded

        return Tile(self._decoded.read(str(number), decode), tile.left, tile.top, rgb=False)

    def verify(self) -> Iterator[str]:
        """Compares every tile with its checksum; yields an empty text, or what is wrong with it."""
        for number, (frame, *_) in enumerate(self.plan.tiles):
            row = self.rows[number]
            wrong = zlib.crc32(self.tile_bytes(number)) != row["tile_crc"]
            yield (
                f"tile {number} ({self.plan.files[frame]}; bytes {row['offset']} to "
                f"{row['offset'] + row['bytes']} of {TILES}) does not match its checksum"
                if wrong
                else ""
            )


def open_cache(
    records: Items[ClipRecord],
    root: Path,
    image_size: tuple[int, int],
    num_frames: int,
    data: DataConfig,
    *,
    train: bool,
) -> TileCache | None:
    """The store of a data set's clips in ``data.cache``.

    Evaluation without a store of its own reads frames: None.

    Args:
        records: the clips.
        root: folder that frames are named relative to.
        image_size: (H, W) of the crops.
        num_frames: T.
        data: names the cache, and says what it must have been made for.
        train: which of its stores.

    Raises:
        CacheError: the store is unfinished, stale or damaged, or there is none to train from.
    """
    store = store_folder(data.cache, train=train)
    if not train and not store.exists():
        return None
    source = describe(records, root, image_size, num_frames, data, train=train)
    return TileCache(store, source, data.frame_cache_mb << 20)
