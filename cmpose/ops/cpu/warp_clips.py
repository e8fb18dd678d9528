"""Crops out of clips, a part of one channel of one frame at a time: its pixels are read where they
lie, with any strides, and its crop is written as it is laid out.

A weight is a whole number of 1/1024, so sums are exact, in whatever order they are taken.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

_AT_ONCE = (1 << 15) - 1
"""Pixels of a crop that are worked on at once: the most that torch does not divide among threads,
which over hundreds of steps wait for one another where cores are busy."""


def _axis(position: Tensor, length: int, bits: int, dtype: torch.dtype) -> list[list[Tensor]]:
    """The two pixels of an axis that each position is between, clamped to 0 .. length − 1, and
    their weights, 0 of a pixel outside; position: int64 [H, W] in units of 2^−bits pixel."""
    first, fraction = position >> bits, (position & ((1 << bits) - 1)).to(dtype)
    pixels = [first.clamp(0, length - 1), (first + 1).clamp_(0, length - 1)]
    weights = [(1 << bits) - fraction, fraction]
    weights[0] *= pixels[0] == first
    weights[1] *= pixels[1] == first.add_(1)
    return [pixels, weights]


# Many parameters: those of the op, its matrices as positions.
def forward(
    frames: Tensor,
    x: Tensor,
    y: Tensor,
    bits: int,
    scale: list[float],
    shift: list[float],
    dtype: torch.dtype,
) -> Tensor:
    """sum · scale_c + shift_c, [B, T, 3, H, W], of sums that are 4^bits times a grey level.

    Args:
        frames: uint8 [B, T, h, w, 3].
        x, y: int64 [B, H, W], source positions in units of 2^−bits pixel.
        scale, shift: of each channel.
        dtype: the result's.
    """
    batch, num_frames, height, width, _ = frames.shape
    down, right = frames.stride()[2:4]
    reach = (height - 1) * down + (width - 1) * right + 1
    crops = frames.new_empty(batch, num_frames, 3, *x.shape[1:], dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    lines = max(1, _AT_ONCE // x.shape[2])
    for clip, top in product(range(batch), range(0, x.shape[1], lines)):
        part = slice(top, top + lines)
        columns, column_weights = _axis(x[clip, part], width, bits, wide)
        rows, row_weights = _axis(y[clip, part], height, bits, wide)
        at = [(r * down + c * right).flatten() for r in rows for c in columns]
        weights = [(r * c).flatten() for r in row_weights for c in column_weights]
        total, pixel = torch.empty_like(weights[0]), torch.empty_like(weights[0])
        for frame, channel in product(range(num_frames), range(3)):
            source = frames[clip, frame, :, :, channel].as_strided((reach,), (1,))
            total.zero_()
            for index, weight in zip(at, weights, strict=True):
                total.addcmul_(pixel.copy_(source.index_select(0, index)), weight)
            total.mul_(scale[channel]).add_(shift[channel])
            crops[clip, frame, channel, part].copy_(total.view(rows[0].shape))
    return crops
