"""Which parts of the frames a set of clips can ever sample: what a cache of them must hold.

All frames of a clip go through one matrix, so each of them is sampled around the box of the clip's
key frame. A frame serves several clips: the windows of consecutive key frames nearly coincide, and
those of people who stand together overlap. So each frame is cut into a few *tiles*, which together
hold the windows of all clips.

With ``data.cache_detail`` people who are much larger than the crop are kept in a picture that is
shrunk by a whole factor, the same for all frames of a clip. Their windows and tiles are in pixels
of the shrunk picture.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np

from cmpose.config import AugmentConfig, DataConfig
from cmpose.data.cutouts import Window
from cmpose.data.pictures import shrunk_size
from cmpose.data.records import ClipRecord
from cmpose.data.transforms import Region, crop_region, half_body_region

CacheFormat = Literal["raw", "jpeg"]

_BEFORE, _AFTER = 2, 4
"""Pixels kept before and after what shows in a crop. ``cutouts.sampled_window`` takes one fewer:
rounding must not decide whether a tile holds it."""


class FrameTiles(NamedTuple):
    """The tiles that a frame is cut into.

    Attributes:
        file: path of the frame.
        picture_size: (width, height) that the frame must have.
        windows: of each tile, the factor that the frame is shrunk by, and the tile's window there.
    """

    file: str
    picture_size: tuple[int, int]
    windows: tuple[tuple[int, Window], ...]


def _reach(along: float, across: float, degrees: float) -> float:
    """Largest |cos r|·along + |sin r|·across for −degrees ≤ r ≤ degrees."""
    # The sum grows until the turned side lies along the rectangle's diagonal; then it falls.
    angle = min(np.deg2rad(abs(degrees)), np.arctan2(across, along))
    return float(np.cos(angle) * along + np.sin(angle) * across)


def strongest(augment: AugmentConfig) -> tuple[float, float]:
    """The largest scale and the largest rotation, in degrees, that augmentation can draw."""
    return 1 + abs(augment.scale), augment.rotation * (2 if augment.sampling == "dcpose" else 1)


def _window(regions: Iterable[Region], scale: float, rotation: float, size: tuple[int, int]):
    """The part of a picture that regions can show; at least one pixel.

    Args:
        regions: any of them may be drawn.
        scale: the largest factor that they can be scaled by.
        rotation: the largest angle that they can be turned by, in degrees.
        size: (width, height) of the picture.
    """
    low, high = [], []
    for region in regions:
        width, height = (float(side) * scale for side in region.size)
        half = np.array([_reach(width, height, rotation), _reach(height, width, rotation)]) / 2
        low.append(region.center - half)
        high.append(region.center + half)
    left, top = (int(v) - _BEFORE for v in np.floor(np.min(low, axis=0)))
    right, bottom = (int(v) + _AFTER for v in np.floor(np.max(high, axis=0)))
    left, top = min(max(left, 0), size[0] - 1), min(max(top, 0), size[1] - 1)
    return Window(left, top, max(min(right, size[0]), left + 1), max(min(bottom, size[1]), top + 1))


def shrink_factor(record: ClipRecord, image_size: tuple[int, int], data: DataConfig) -> int:
    """The whole factor that a clip's pictures are shrunk by in a cache; 1 keeps their size."""
    if data.cache_detail <= 0:
        return 1
    region = crop_region(record.box, image_size, data.box_enlarge)
    return max(1, int(region.size[1] / (data.cache_detail * image_size[0])))


def clip_window(
    record: ClipRecord, image_size: tuple[int, int], data: DataConfig, *, train: bool
) -> Window:
    """The part of its frames that a clip can sample under any augmentation.

    Args:
        record: the clip.
        image_size: (H, W) of the crops.
        data: the enlargement of boxes and the augmentation.
        train: whether clips are augmented.

    Returns:
        The window, inside the picture, in pixels of the picture shrunk by ``shrink_factor``.
    """
    regions = [crop_region(record.box, image_size, data.box_enlarge)]
    factor = shrink_factor(record, image_size, data)
    size = shrunk_size(record.picture_size, factor)
    if not (train and data.augment.enabled and record.person is not None):
        return _window([_shrunk(region, factor) for region in regions], 1.0, 0.0, size)
    joints = record.person.keypoints
    if data.augment.half_body > 0 and record.person.num_visible > data.augment.half_body_min_joints:
        skeleton = record.sequence.skeleton
        halves = (
            half_body_region(joints, image_size, upper=upper, skeleton=skeleton)
            for upper in (True, False)
        )
        regions += [half for half in halves if half is not None]
    return _window([_shrunk(r, factor) for r in regions], *strongest(data.augment), size)


def _shrunk(region: Region, factor: int) -> Region:
    return Region((region.center + 0.5) / factor - 0.5, region.size / factor)


def _area(window: Window) -> int:
    rows, columns = window.shape
    return rows * columns


def merge(
    windows: Iterable[Window], picture_size: tuple[int, int], format: CacheFormat
) -> tuple[Window, ...]:
    """Few tiles that together hold every window.

    Any part of a raw tile can be read, so two windows share a tile where that takes no more bytes
    than two tiles; and where all tiles together are as large as the picture, it is the only one. A
    JPEG tile is decoded as a whole: two windows share it only if it is at most a quarter larger
    than the larger of them.
    """
    tiles: list[Window] = []
    for window in dict.fromkeys(windows):
        grown = window
        while True:
            for tile in tiles:
                hull = Window(
                    min(grown.left, tile.left),
                    min(grown.top, tile.top),
                    max(grown.right, tile.right),
                    max(grown.bottom, tile.bottom),
                )
                apart = _area(grown), _area(tile)
                limit = sum(apart) if format == "raw" else 1.25 * max(apart)
                if _area(hull) <= limit:
                    tiles.remove(tile)
                    grown = hull
                    break
            else:
                break
        tiles.append(grown)
    whole = Window(0, 0, *picture_size)
    if format == "raw" and sum(map(_area, tiles)) >= _area(whole):
        return (whole,)
    return tuple(tiles)


def plan_tiles(
    records: Iterable[ClipRecord],
    image_size: tuple[int, int],
    data: DataConfig,
    *,
    train: bool,
    format: CacheFormat,
) -> list[FrameTiles]:
    """Every frame of the clips once, in order of path, with the tiles that it is cut into.

    Args:
        records: the clips.
        image_size: (H, W) of the crops.
        data: the enlargement of boxes, the augmentation and ``cache_detail``.
        train: whether clips are augmented.
        format: how tiles are stored, which decides when windows share one.
    """
    windows: dict[str, dict[int, list[Window]]] = {}
    sizes: dict[str, tuple[int, int]] = {}
    for record in records:
        window = clip_window(record, image_size, data, train=train)
        factor = shrink_factor(record, image_size, data)
        for file in record.files:
            windows.setdefault(file, {}).setdefault(factor, []).append(window)
            sizes[file] = record.picture_size
    return [
        FrameTiles(
            file,
            sizes[file],
            tuple(
                (factor, tile)
                for factor, shrunk_windows in sorted(windows[file].items())
                for tile in merge(shrunk_windows, shrunk_size(sizes[file], factor), format)
            ),
        )
        for file in sorted(windows)
    ]
