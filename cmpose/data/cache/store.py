"""How a cache lies on disk: one file of tiles with an index, and what it was made from.

A cache has a store for each split, a folder of

- ``plan.json``: the settings, a digest of boxes and frame names, and the list of tiles;
- ``tiles.bin``: the pixels, one tile after the other;
- ``index.bin``: a row for each tile with its offset, size and checksum, and the size and time of
  change that its frame had;
- ``complete.json``: written last. Only a store that has it is read.

``cmpose.data.cache.build`` writes a store, ``cmpose.data.cache.reader`` reads it.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from msgspec import Struct, structs

from cmpose.config import DataConfig
from cmpose.data.cache.tiles import strongest
from cmpose.data.formats.reader import Whole, convert, parse, refuse_os_error
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


DAMAGED = "the cache is damaged: run cmpose cache --overwrite to make it anew"


class CacheError(RuntimeError):
    """A cache that is unfinished, stale or damaged; the message says which, and what to do."""


class Source(NamedTuple):
    """What a cache is made from, as far as it decides what the cache must hold.

    Attributes:
        root: the data set's folder; frames are named relative to it, so that it may move.
        settings: name → value of what decides where crops can reach and how they are stored.
        digest: SHA-256 of the clips' boxes, of their frames' names and sizes, and of the joints if
            crops depend on them.
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
    """The :class:`Source` of a data set's clips; the arguments are those of ``ClipDataset``."""
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


class _Versioned(Struct):
    version: Whole


class StorePlan(Struct, frozen=True):
    """What a store holds, written before its first tile.

    Attributes:
        settings: of the source.
        digest: of the source.
        files: the frames, relative to the root.
        sizes: (width, height) of each frame.
        tiles: of each tile, in the order in which they are stored: the frame's index in ``files``,
            the factor that the frame is shrunk by, and left, top, right, bottom in the shrunk
            frame.
    """

    settings: dict[str, Any]
    digest: str
    files: list[str]
    sizes: list[tuple[Whole, Whole]]
    tiles: list[tuple[Whole, Whole, Whole, Whole, Whole, Whole]]

    def dump(self) -> bytes:
        """As ``plan.json``."""
        return json.dumps({"version": VERSION} | structs.asdict(self)).encode()


def read_plan(folder: Path) -> tuple[StorePlan, int]:
    """A store's plan and its checksum.

    Raises:
        CacheError: there is none, it is damaged, or of another version.
    """
    path = folder / PLAN
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise CacheError(
            f"{folder}: no cache there; make it: cmpose cache with the same recipe and data.cache"
        ) from None
    except OSError as error:
        raise refuse_os_error(path, error, CacheError, DAMAGED) from error
    document = parse(text, str(path), CacheError, DAMAGED)
    version = convert(document, _Versioned, str(path), CacheError, remedy=DAMAGED).version
    if version != VERSION:
        raise CacheError(
            f"{path}: a cache of layout {version}, this version of cmpose reads {VERSION}: "
            "run cmpose cache --overwrite"
        )
    plan = convert(document, StorePlan, str(path), CacheError, remedy=DAMAGED)
    if len(plan.sizes) != len(plan.files):
        raise CacheError(f"{path}: sizes: {len(plan.sizes)} of {len(plan.files)} files; {DAMAGED}")
    for number, (frame, *_) in enumerate(plan.tiles):
        if not 0 <= frame < len(plan.files):
            raise CacheError(
                f"{path}: tiles[{number}][0]: {frame} is none of the {len(plan.files)} files; "
                f"{DAMAGED}"
            )
    return plan, zlib.crc32(text)


def check_source(folder: Path, plan: StorePlan, source: Source) -> None:
    """Raises CacheError, saying what differs, unless a plan was made from ``source``."""
    old, new = plan.settings, source.settings
    changed = [k for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)]
    if not changed and plan.digest == source.digest:
        return
    if changed:
        why = "; ".join(
            f"{k:.60} was {old.get(k)!s:.60}, is {new.get(k)!s:.60}" for k in changed[:10]
        )
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
    """How many rows from the first on are whole: checksums fit, and tiles follow one another."""
    ends = np.cumsum(rows["bytes"], dtype=np.uint64)
    good = (rows["row_crc"] == row_crcs(rows)) & (rows["offset"] == ends - rows["bytes"])
    return len(rows) if good.all() else int(np.argmin(good))


def frame_state(path: Path) -> tuple[int, int]:
    """A frame's size in bytes and its time of change in ns; (-1, -1) if there is none."""
    try:
        state = os.stat(path)
    except OSError:
        return -1, -1
    return state.st_size, state.st_mtime_ns


def check_frames(folder: Path, plan: StorePlan, rows: np.ndarray, root: Path) -> None:
    """Raises CacheError where a frame was changed after its tiles were made."""
    last = -1
    changed, first = 0, ""
    for (frame, *_), row in zip(plan.tiles, rows, strict=False):
        if frame == last:
            continue
        last = frame
        if frame_state(root / plan.files[frame]) != (row["frame_bytes"], row["frame_time"]):
            changed += 1
            first = first or plan.files[frame]
    if changed:
        raise CacheError(
            f"{folder}: the cache is stale: {changed} frames have another size or time of change "
            f"than when it was made, the first is {root / first}. Run cmpose cache --overwrite "
            "to make it anew (copying a data set keeps times with cp -p or rsync -t)"
        )


def store_folder(folder: str | os.PathLike[str], *, train: bool) -> Path:
    """The folder of a split's store below ``folder``, which is ``data.cache``."""
    return Path(folder).expanduser() / ("train" if train else "val")
