"""A cache of the parts of frames that clips are made from: one memory-mapped file with an index.

A store is a folder of ``plan.json`` (what it is made of: settings, a digest of boxes and frame
names, the tiles), ``tiles.bin`` (the pixels, one tile after the other), ``index.bin`` (a row a
tile: where, how large, checksum, and the frame's size and time of change) and, once it is whole,
``complete.json``. Only a whole store is read. ``cmpose.data.cache.build`` writes it.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Iterator
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from cmpose.config import DataConfig
from cmpose.data.cache.tiles import strongest
from cmpose.data.cutouts import Tile, Window
from cmpose.data.frames import FrameError, PictureCache
from cmpose.data.records import ClipRecord
from cmpose.data.skeleton import POSETRACK

VERSION = 1
PLAN, TILES, INDEX, COMPLETE = "plan.json", "tiles.bin", "index.bin", "complete.json"

ROW = np.dtype(
    [
        ("offset", "<u8"),  # in tiles.bin
        ("bytes", "<u8"),  # 0: the frame could not be read
        ("frame_bytes", "<i8"),
        ("frame_time", "<i8"),  # of its last change, ns
        ("tile_crc", "<u4"),
        ("row_crc", "<u4"),  # of the row's other fields: tells a row that is only half written
    ]
)


class CacheError(RuntimeError):
    """A cache that is unfinished, stale or damaged; the message says which, and what to do."""


class Source(NamedTuple):
    """What a cache is made from, as far as it decides what the cache must hold.

    Attributes:
        root: the data set's folder; frames are named relative to it, so that it may move.
        settings: name → value of what decides where crops can reach and how they are stored.
        digest: of the clips: boxes, frames' names and sizes, and the joints if crops depend on
            them.
    """

    root: Path
    settings: dict[str, Any]
    digest: str


def describe(
    records: Items[ClipRecord],
    root: Path,
    image_size: tuple[int, int],
    num_frames: int,
    data: DataConfig,
    *,
    train: bool,
) -> Source:
    """The :class:`Source` of a data set's clips; arguments as ``ClipDataset`` has them."""
    augmented = train and data.augment.enabled
    scale, rotation = strongest(data.augment) if augmented else (1.0, 0.0)
    halves = augmented and data.augment.half_body > 0
    settings = {
        "model.image_size": list(image_size),
        "model.num_frames": num_frames,
        "data.box_enlarge": data.box_enlarge,
        "largest scale of data.augment": scale,
        "largest rotation of data.augment": rotation,
        "half bodies of more joints than": data.augment.half_body_min_joints if halves else None,
        "data.cache_detail": max(data.cache_detail, 0.0),
        "data.cache_format": data.cache_format,
        "data.cache_quality": data.cache_quality if data.cache_format == "jpeg" else None,
    }
    digest = hashlib.sha256()
    for record in records:
        names = [relative_name(file, root) for file in record.files]
        digest.update(json.dumps([names, record.picture_size, record.person is None]).encode())
        digest.update(record.box.tobytes())
        if halves and record.person is not None:
            digest.update(record.person.keypoints.tobytes())
            skeleton = record.sequence.skeleton
            if skeleton != POSETRACK:
                digest.update(repr((skeleton.upper_body, skeleton.lower_body)).encode())
    return Source(root, settings, digest.hexdigest())


def relative_name(file: str, root: Path) -> str:
    """A frame's path below the data set's folder; one that lies elsewhere keeps its own."""
    return file.removeprefix(f"{root}{os.sep}")


class Plan(NamedTuple):
    """What a store holds, written before its first tile.

    Attributes:
        settings: of the source.
        digest: of the source.
        files: the frames, relative to the root.
        sizes: (width, height) of each frame.
        tiles: (frame's place in ``files``, the factor that the frame is shrunk by, left, top,
            right, bottom in the shrunk frame) of each tile, in the order in which they are stored.
    """

    settings: dict[str, Any]
    digest: str
    files: list[str]
    sizes: list[tuple[int, int]]
    tiles: list[tuple[int, int, int, int, int, int]]

    def dump(self) -> bytes:
        """As ``plan.json``."""
        return json.dumps({"version": VERSION} | self._asdict()).encode()


def read_plan(folder: Path) -> tuple[Plan, int]:
    """A store's plan and its checksum.

    Raises:
        CacheError: there is none, it is damaged, or of another version.
    """
    path = folder / PLAN
    try:
        text = path.read_bytes()
        values = json.loads(text)
        version = values.pop("version")
        if version != VERSION:
            raise CacheError(
                f"{path}: a cache of layout {version}, this version of cmpose reads {VERSION}: "
                "run cmpose cache --overwrite"
            )
        return Plan(**values), zlib.crc32(text)
    except FileNotFoundError:
        raise CacheError(
            f"{folder}: no cache there; make it: cmpose cache with the same recipe and data.cache"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CacheError(
            f"{path}: damaged ({error}): run cmpose cache --overwrite to make the cache anew"
        ) from error


def check_source(folder: Path, plan: Plan, source: Source) -> None:
    """Raises CacheError unless a plan was made from ``source``; says what differs."""
    old, new = plan.settings, source.settings
    changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    if not changed and plan.digest == source.digest:
        return
    if changed:
        why = "; ".join(f"{k} was {old.get(k)}, is {new.get(k)}" for k in changed)
    else:
        why = "the annotations' people, boxes or frames have changed"
    raise CacheError(
        f"{folder}: the cache is stale: {why}. Run cmpose cache --overwrite to make it anew, give "
        "another data.cache, or none"
    )


def row_crcs(rows: np.ndarray) -> np.ndarray:
    """The checksum that each index row should hold, uint32."""
    size = ROW.itemsize
    data = np.ascontiguousarray(rows).tobytes()
    return np.array(
        [zlib.crc32(data[i : i + size - 4]) for i in range(0, len(data), size)], np.uint32
    )


def whole_rows(rows: np.ndarray) -> int:
    """How many of the index's rows, from the first, are written and follow one another."""
    ends = np.cumsum(rows["bytes"], dtype=np.uint64)
    good = (rows["row_crc"] == row_crcs(rows)) & (rows["offset"] == ends - rows["bytes"])
    return len(rows) if good.all() else int(np.argmin(good))


def check_frames(folder: Path, plan: Plan, rows: np.ndarray, root: Path) -> None:
    """Raises CacheError where a frame was changed after its tiles were made."""
    seen = -1
    changed, first = 0, ""
    for (place, *_), row in zip(plan.tiles, rows, strict=False):
        if place == seen:
            continue
        seen = place
        try:
            found = os.stat(root / plan.files[place])
            now = (found.st_size, found.st_mtime_ns)
        except OSError:
            now = (-1, -1)
        if now != (row["frame_bytes"], row["frame_time"]):
            changed += 1
            first = first or plan.files[place]
    if changed:
        raise CacheError(
            f"{folder}: the cache is stale: {changed} frames have another size or time of change "
            f"than when it was made, the first is {root / first}. Run cmpose cache --overwrite "
            "to make it anew (copying a data set keeps times with cp -p or rsync -t)"
        )


class TileCache:
    """A whole store, opened for reading.

    Pickles as its folder; each process maps the file itself.

    Args:
        folder: the store.
        source: what it must have been made from; also of the frames' sizes and times of change.
        keep_bytes: decoded JPEG tiles that each process keeps.

    Attributes:
        plan: what it holds.

    Raises:
        CacheError: unfinished, stale or damaged.
    """

    def __init__(self, folder: Path, source: Source, keep_bytes: int = 0) -> None:
        self.folder, self.root = folder, source.root
        self.plan, plan_crc = read_plan(folder)
        check_source(folder, self.plan, source)
        try:
            complete = json.loads((folder / COMPLETE).read_bytes())
        except FileNotFoundError:
            raise CacheError(
                f"{folder}: the cache is unfinished: run the same cmpose cache command again, it "
                "goes on where it stopped"
            ) from None
        except ValueError as error:
            raise self._damaged(COMPLETE, str(error)) from error
        index = (folder / INDEX).read_bytes()
        size = (folder / TILES).stat().st_size
        if (zlib.crc32(index), plan_crc) != (complete["index_crc"], complete["plan_crc"]):
            raise self._damaged(INDEX, f"or {PLAN}: not as it was written")
        if size != complete["bytes"]:
            raise self._damaged(TILES, f"{size} bytes, there were {complete['bytes']}")
        self.rows = np.frombuffer(index, ROW)
        check_frames(folder, self.plan, self.rows, source.root)
        self._places: dict[str, list[int]] = {}
        for place, (file, *_) in enumerate(self.plan.tiles):
            self._places.setdefault(self.plan.files[file], []).append(place)
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

    def _bytes(self, place: int) -> memoryview | bytes:
        if not self.rows["bytes"][place]:
            return b""
        if self._map is None:
            with open(self.folder / TILES, "rb") as file:
                self._map = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        offset, size = int(self.rows["offset"][place]), int(self.rows["bytes"][place])
        return self._map[offset : offset + size]

    def tile(self, file: str, factor: int, window: Window, width: int) -> Tile:
        """The stored tile that holds a window of a frame, as far as the window is in the picture.

        Args:
            file: path of the frame.
            factor: that the frame is shrunk by.
            window: what is going to be sampled of the shrunk frame.
            width: of the shrunk frame.

        Raises:
            FrameError: the frame could not be read when the cache was made.
            CacheError: no tile holds the window (never black pixels in its place), or the tile
                does not decode.
        """
        name = relative_name(file, self.root)
        left, right = max(window.left, 0), min(window.right, width)
        if left >= right:  # nothing of the picture shows
            left, right = 0, 0
        for place in self._places.get(name, ()):
            _, shrunk, *sides = self.plan.tiles[place]
            tile = Window(*sides)
            if right and not (
                shrunk == factor
                and tile.left <= left
                and right <= tile.right
                and tile.top <= window.top
                and window.bottom <= tile.bottom
            ):
                continue
            if not self.rows["bytes"][place]:
                raise FrameError(f"{file}: could not be read when the cache was made")
            return self._decode(place, tile)
        raise CacheError(
            f"{self.folder}: no tile of {name} (shrunk {factor} times) holds the pixels "
            f"{tuple(window)} (left, top, right, bottom) that a crop is sampled from: run cmpose "
            "cache --overwrite"
        )

    def _decode(self, place: int, tile: Window) -> Tile:
        if self._format == "raw":
            pixels = np.frombuffer(self._bytes(place), np.uint8).reshape(*tile.shape, 3)
            return Tile(pixels, tile.left, tile.top, rgb=True)

        def decode(_: str) -> np.ndarray:
            data = np.frombuffer(self._bytes(place), np.uint8)
            decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
            if decoded is None or decoded.shape[:2] != tile.shape:
                raise self._damaged(TILES, f"tile {place} does not decode")
            return decoded

        return Tile(self._decoded.read(str(place), decode), tile.left, tile.top, rgb=False)

    def verify(self) -> Iterator[str]:
        """Compares every tile with its checksum; yields an empty text, or what is wrong with it."""
        for place, (file, *_) in enumerate(self.plan.tiles):
            row = self.rows[place]
            wrong = zlib.crc32(self._bytes(place)) != row["tile_crc"]
            yield (
                f"tile {place} ({self.plan.files[file]}; bytes {row['offset']} to "
                f"{row['offset'] + row['bytes']} of {TILES}) does not match its checksum"
                if wrong
                else ""
            )


def open_cache(
    folder: str | os.PathLike[str],
    records: Items[ClipRecord],
    root: Path,
    image_size: tuple[int, int],
    num_frames: int,
    data: DataConfig,
    *,
    train: bool,
    keep_bytes: int,
) -> TileCache | None:
    """The store of a data set's clips in ``folder``: ``train`` or ``val``.

    Evaluation without a store of its own reads frames: None.

    Raises:
        CacheError: unfinished, stale, damaged, or none to train from.
    """
    store = store_folder(folder, train=train)
    if not train and not store.exists():
        return None
    source = describe(records, root, image_size, num_frames, data, train=train)
    return TileCache(store, source, keep_bytes)


def store_folder(folder: str | os.PathLike[str], *, train: bool) -> Path:
    """Where below ``data.cache`` the store of a split lies."""
    return Path(folder).expanduser() / ("train" if train else "val")
