"""Cut-outs of frames, for crops that are warped on the device.

A clip's cut-out holds the pixels that its crop is sampled from. Cut-outs differ in size. Those of a
batch stand side by side in one strip, and each clip's matrix maps the strip to its crop. If they
were padded to one size instead, one person who fills a frame would make all of them that large.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from cmpose.data.pictures import shrink_picture
from cmpose.data.transforms import apply_matrix

MAX_WIDTH = 1 << 20
"""Largest width of a strip in pixels: so far ``cmpose.ops.warp_clips`` tells positions apart."""

_MULTIPLE = 16  # divides a strip's sides: kernels are compiled once for all such sizes


class Tile(NamedTuple):
    """A rectangle of a (shrunk) picture's pixels.

    Attributes:
        pixels: uint8 [h, w, 3].
        left: column of the first pixel in the picture.
        top: row of the first pixel in the picture.
        rgb: True for RGB, False for BGR.
    """

    pixels: np.ndarray
    left: int = 0
    top: int = 0
    rgb: bool = False


class Window(NamedTuple):
    """The part of a picture that a crop is sampled from, in pixels.

    ``right`` and ``bottom`` are the first column and row behind it. Columns may lie outside the
    picture; a cut-out is black there. It must hold them, because in the strip the cut-outs of
    other clips stand on its left and right, which the crop must not sample. Rows need not: nothing
    stands above and below.
    """

    left: int
    top: int
    right: int
    bottom: int

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns)."""
        return self.bottom - self.top, self.right - self.left

    def take(self, tile: Tile) -> np.ndarray:
        """The cut-out, RGB uint8 [rows, columns, 3].

        Args:
            tile: holds all pixels of the window that lie in the picture.
        """
        cutout = np.zeros((*self.shape, 3), np.uint8)
        left, right = max(self.left, tile.left), min(self.right, tile.left + tile.pixels.shape[1])
        if left < right:
            rows = slice(self.top - tile.top, self.bottom - tile.top)
            part = tile.pixels[rows, left - tile.left : right - tile.left]
            part = part if tile.rgb else cv2.cvtColor(part, cv2.COLOR_BGR2RGB)
            cutout[:, left - self.left : right - self.left] = part
        return cutout

    def matrix(self, matrix: np.ndarray) -> np.ndarray:
        """The map cut-out → crop, float64 [2, 3], from ``matrix``, picture → crop."""
        return moved_matrix(matrix, self.left, self.top)


def shrunk_matrix(matrix: np.ndarray, factor: int) -> np.ndarray:
    """``matrix``, picture → crop, for the picture shrunk by a whole factor."""
    # x = factor · (x' + 1/2) − 1/2
    origin = apply_matrix(matrix, np.full(2, (factor - 1) / 2))
    return np.concatenate([matrix[:, :2] * factor, origin[:, None]], axis=1)


def reduced_factor(matrix: np.ndarray) -> int:
    """The largest of 1, 2, 4 and 8 that a picture can be shrunk by without a crop losing detail.

    The shrunk picture has at least as many pixels as the crop, along every direction.

    Args:
        matrix: [2, 3], picture → crop.
    """
    enlarged = np.linalg.norm(matrix[:, :2], 2)  # crop pixels a picture pixel, at most
    return max(factor for factor in (1, 2, 4, 8) if factor == 1 or enlarged * factor <= 1)


def shrink(picture: np.ndarray, window: Window, factor: int) -> np.ndarray:
    """Part of the shrunk picture, whose pixels are means of factor × factor pixels.

    Args:
        picture: uint8 [h, w, 3].
        window: which part, in pixels of the shrunk picture.
        factor: whole.
    """
    part = picture[
        window.top * factor : window.bottom * factor, window.left * factor : window.right * factor
    ]
    return shrink_picture(part, factor)


def moved_matrix(matrix: np.ndarray, left: int, top: int) -> np.ndarray:
    """``matrix``, picture → crop, for the part of the picture that begins at (left, top)."""
    origin = apply_matrix(matrix, np.array([left, top]))
    return np.concatenate([matrix[:, :2], origin[:, None]], axis=1)


def sampled_window(
    matrix: np.ndarray, image_size: tuple[int, int], picture_size: tuple[int, int]
) -> Window:
    """The part of a picture that shows in a crop, and up to two pixels around it.

    Args:
        matrix: [2, 3], picture → crop.
        image_size: (H, W) of the crop.
        picture_size: (width, height).

    Returns:
        The window; it has at least one row.
    """
    height, width = image_size
    corners = np.array([[0, 0], [width - 1, 0], [0, height - 1], [width - 1, height - 1]])
    picture_corners = apply_matrix(cv2.invertAffineTransform(matrix), corners)
    # Sampling rounds positions to 1/32 pixel and takes the pixels before and after them.
    left, top = (int(v) - 1 for v in np.floor(picture_corners.min(axis=0)))
    right, bottom = (int(v) + 3 for v in np.floor(picture_corners.max(axis=0)))
    top = min(max(top, 0), picture_size[1] - 1)
    return Window(left, top, right, max(min(bottom, picture_size[1]), top + 1))


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of clips' items; a ``collate_fn`` of a DataLoader.

    Items are stacked by ``torch.utils.data.default_collate``, except that cut-outs, ``frames``
    uint8 [T, h, w, 3] with ``frames_matrix`` [2, 3], cut-out → crop, become one strip: ``frames``
    [T, h', w', 3] has all of them side by side in the items' order, black below the smaller ones,
    and ``frames_matrix`` [B, 2, 3] maps it to each crop.

    Raises:
        ValueError: the cut-outs are wider than ``MAX_WIDTH`` together.
    """
    if "frames" not in items[0]:
        return default_collate(list(items))
    batch = default_collate([{k: v for k, v in i.items() if k != "frames"} for i in items])
    widths = [item["frames"].shape[2] for item in items]
    lefts = np.cumsum([0, *widths])
    if lefts[-1] > MAX_WIDTH:
        raise ValueError(
            f"the cut-outs of a batch of {len(items)} clips are {lefts[-1]} pixels wide together, "
            f"more than {MAX_WIDTH}: use a smaller train.batch_size, or data.warp=host"
        )
    num_frames = items[0]["frames"].shape[0]
    height = max(item["frames"].shape[1] for item in items)
    sides = (-(-int(side) // _MULTIPLE) * _MULTIPLE for side in (height, lefts[-1]))
    strip = torch.zeros(num_frames, *sides, 3, dtype=torch.uint8)
    for item, left, width in zip(items, lefts, widths, strict=False):
        strip[:, : item["frames"].shape[1], left : left + width] = item["frames"]
    batch["frames"] = strip
    # crop = A · (strip − left) + t
    moved = batch["frames_matrix"][:, :, 0] * torch.from_numpy(lefts[:-1])[:, None]
    batch["frames_matrix"][:, :, 2] -= moved
    return batch
