"""Cut-outs of frames, for crops that are warped where the model runs.

A clip's cut-out holds the pixels that its crop is sampled from. Cut-outs differ in size; those of
a batch stand side by side in one strip, and each clip's matrix leads from the strip to its crop.
Padded to one size instead, one person who fills a frame would make them all as large as it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from cmpose.data.transforms import apply_matrix

MAX_WIDTH = 1 << 20
"""Pixels of a strip: as far as ``cmpose.ops.warp_clips`` tells positions apart."""

_MULTIPLE = 16  # of a strip's sides: kernels are compiled for divisible sizes once


class Tile(NamedTuple):
    """Pixels of a (shrunk) picture, uint8 [h, w, 3], and where their first one lies in it.

    Attributes:
        pixels: RGB or BGR.
        left: column of the picture.
        top: row of the picture.
        rgb: the order of the channels.
    """

    pixels: np.ndarray
    left: int = 0
    top: int = 0
    rgb: bool = False


class Window(NamedTuple):
    """The part of a picture that a crop is sampled from; pixels, ``right`` and ``bottom`` past it.

    Columns may lie outside the picture and are black there: left and right of a cut-out stand
    those of other clips, which must not be sampled. Above and below stands nothing.
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
        """The cut-out, RGB [rows, columns, 3], of a tile that holds all of it in the picture."""
        taken = np.zeros((*self.shape, 3), np.uint8)
        left, right = max(self.left, tile.left), min(self.right, tile.left + tile.pixels.shape[1])
        if left < right:
            rows = slice(self.top - tile.top, self.bottom - tile.top)
            part = tile.pixels[rows, left - tile.left : right - tile.left]
            part = part if tile.rgb else cv2.cvtColor(part, cv2.COLOR_BGR2RGB)
            taken[:, left - self.left : right - self.left] = part
        return taken

    def matrix(self, matrix: np.ndarray) -> np.ndarray:
        """Cut-out → crop, float64 [2, 3], of ``matrix``, picture → crop."""
        return moved_matrix(matrix, self.left, self.top)


def shrunk_size(picture_size: tuple[int, int], factor: int) -> tuple[int, int]:
    """(width, height) of a picture shrunk by a whole factor; the last pixels may stand for less."""
    return -(-picture_size[0] // factor), -(-picture_size[1] // factor)


def shrunk_matrix(matrix: np.ndarray, factor: int) -> np.ndarray:
    """``matrix``, picture → crop, for the picture shrunk by a whole factor."""
    # x = factor · (x' + 1/2) − 1/2
    origin = apply_matrix(matrix, np.full(2, (factor - 1) / 2))
    return np.concatenate([matrix[:, :2] * factor, origin[:, None]], axis=1)


def shrink(picture: np.ndarray, window: Window, factor: int) -> np.ndarray:
    """``window`` of the shrunk picture: means of factor × factor pixels; [h, w, 3] of a picture."""
    part = picture[
        window.top * factor : window.bottom * factor, window.left * factor : window.right * factor
    ]
    if factor == 1:
        return part
    height, width = window.shape
    below, right = height * factor - part.shape[0], width * factor - part.shape[1]
    part = cv2.copyMakeBorder(part, 0, below, 0, right, cv2.BORDER_REPLICATE)
    return cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA)


def moved_matrix(matrix: np.ndarray, left: int, top: int) -> np.ndarray:
    """``matrix``, picture → crop, for the part of the picture that begins at (left, top)."""
    origin = apply_matrix(matrix, np.array([left, top]))
    return np.concatenate([matrix[:, :2], origin[:, None]], axis=1)


def sampled_window(
    matrix: np.ndarray, image_size: tuple[int, int], picture_size: tuple[int, int]
) -> Window:
    """What of a picture shows in a crop, and up to two pixels around it; one row at least.

    Args:
        matrix: [2, 3], picture → crop.
        image_size: (H, W) of the crop.
        picture_size: (width, height).
    """
    height, width = image_size
    corners = np.array([[0, 0], [width - 1, 0], [0, height - 1], [width - 1, height - 1]])
    seen = apply_matrix(cv2.invertAffineTransform(matrix), corners)
    # Positions are rounded to 1/32 pixel; sampling takes the pixel before and the one after.
    left, top = (int(v) - 1 for v in np.floor(seen.min(axis=0)))
    right, bottom = (int(v) + 3 for v in np.floor(seen.max(axis=0)))
    top = min(max(top, 0), picture_size[1] - 1)
    return Window(left, top, right, max(min(bottom, picture_size[1]), top + 1))


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """A batch of clips' items, as ``torch.utils.data.default_collate`` makes it, but for cut-outs.

    Of items with ``frames`` uint8 [T, h, w, 3] and ``frames_matrix`` [2, 3], frame → crop, the
    batch has ``frames`` [T, h', w', 3], all cut-outs side by side in the items' order, black below
    the smaller ones, and ``frames_matrix`` [B, 2, 3] from there.

    Raises:
        ValueError: if they are too wide together.
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
