"""Crops of people out of a clip: warped as cv2.warpAffine does it, normalised, on any device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmpose.ops import backends, checks, library
from cmpose.ops.cpu import warp_clips as cpu

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# cv2 rounds what a pixel's column and its row add to a source position to 1/1024 pixel each, and
# their sum to 1/32 pixel.
_COORDINATE_BITS = 10
_FRACTION_BITS = 5
_FRACTION = 1 << _FRACTION_BITS


# -- reference ------------------------------------------------------------------------------------


def _inverse(matrices: Tensor) -> Tensor:
    """Destination → source, float64 [B, 2, 3]; zeros for a singular matrix."""
    (a, b, tx), (c, d, ty) = (row.unbind(-1) for row in matrices.to(torch.float64).unbind(-2))
    determinant = a * d - b * c
    factor = torch.where(determinant == 0, 0.0, 1.0 / determinant)
    a, b, c, d = d * factor, -b * factor, -c * factor, a * factor
    rows = (a, b, -a * tx - b * ty), (c, d, -c * tx - d * ty)
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _fixed(value: Tensor) -> Tensor:
    """Pixels as int64 in units of 1/1024 pixel; values far outside are clamped."""
    scaled = (value * (1 << _COORDINATE_BITS)).round()
    return scaled.clamp(-(2.0**30), 2.0**30).nan_to_num(2.0**30).to(torch.int64)


def _source(inverse: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Source x and y of every output pixel, each int64 [B, H, W] in units of 1/32 pixel."""
    height, width = size
    half = 1 << (_COORDINATE_BITS - _FRACTION_BITS - 1)
    columns = torch.arange(width, device=inverse.device, dtype=torch.float64)
    rows = torch.arange(height, device=inverse.device, dtype=torch.float64)[:, None]
    x, y = (
        (
            _fixed(slope_x[..., None, None] * columns)
            + _fixed(slope_y[..., None, None] * rows + offset[..., None, None])
            + half
        )
        >> (_COORDINATE_BITS - _FRACTION_BITS)
        for slope_x, slope_y, offset in (row.unbind(-1) for row in inverse.unbind(-2))
    )
    return x, y


def _normalization(mean: Sequence[float], std: Sequence[float]) -> tuple[list[float], list[float]]:
    """Of each channel what (value / 255 − mean) / std multiplies by and adds to a weighted sum."""
    scale = [1.0 / (_FRACTION**2 * 255.0 * s) for s in std]
    return scale, [-m / s for m, s in zip(mean, std, strict=True)]


def warp_clips_reference(
    frames: Tensor,
    matrices: Tensor,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """:func:`warp_clips` in plain PyTorch: it gathers the four neighbours of every position."""
    batch, num_frames, height, width, _ = frames.shape
    x, y = _source(_inverse(matrices), size)
    x0, y0 = x >> _FRACTION_BITS, y >> _FRACTION_BITS
    fraction_x, fraction_y = x & (_FRACTION - 1), y & (_FRACTION - 1)
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    clip = torch.arange(batch, device=frames.device)[:, None, None, None]
    frame = torch.arange(num_frames, device=frames.device)[:, None, None]
    value = torch.zeros((), dtype=accumulate, device=frames.device)
    for down, weight_y in ((0, _FRACTION - fraction_y), (1, fraction_y)):
        for right, weight_x in ((0, _FRACTION - fraction_x), (1, fraction_x)):
            row, column = y0 + down, x0 + right
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            weight = (weight_x * weight_y * inside).to(accumulate)[:, None, :, :, None]
            pixel = frames[
                clip,
                frame,
                row.clamp(0, height - 1)[:, None],
                column.clamp(0, width - 1)[:, None],
            ]
            value = value + weight * pixel
    scale, shift = _normalization(mean, std)
    channels = [value[..., c] * scale[c] + shift[c] for c in range(3)]
    return torch.stack(channels, dim=2).to(dtype)


def _cpu_forward(
    frames: Tensor,
    matrices: Tensor,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    positions = _source(_inverse(matrices), size)
    return cpu.forward(frames, *positions, _FRACTION_BITS, *_normalization(mean, std), dtype)


# -- registered op --------------------------------------------------------------------------------


def _fake(
    frames: Tensor,
    matrices: Tensor,
    size: Sequence[int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return frames.new_empty(*frames.shape[:2], 3, *size, dtype=dtype)


_forward = library.register(
    "warp_clips(Tensor frames, Tensor matrices, SymInt[2] size, float[3] mean, float[3] std, "
    "ScalarType dtype, str backend) -> Tensor",
    _fake,
    reference=warp_clips_reference,
    cpu=_cpu_forward,
    triton=library.triton_kernel("warp_clips", "forward"),
)


# -- public ---------------------------------------------------------------------------------------


def warp_clips(
    frames: Tensor,
    matrices: Tensor,
    size: tuple[int, int],
    *,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> Tensor:
    """Warps one crop out of all frames of each clip, and normalises it.

    The bilinear sampling is that of ``cv2.warpAffine(..., flags=cv2.INTER_LINEAR)`` with a border
    of 0. Source positions are rounded to 1/32 pixel as there. The sampled values are not rounded to
    whole grey levels, so the two differ by at most half a level.

    Args:
        frames: uint8 [B, T, h, w, 3] RGB, of any strides. For several people of one clip, expand
            the clip over B; only the pixels that the crops need are copied.
        matrices: [B, 2, 3] floating point, source → destination pixel (x, y), as warpAffine takes
            it without WARP_INVERSE_MAP. float64 is the precision in which cv2 computes.
        size: (H, W) of the crops.
        mean: means of R, G and B, in 0 to 1 as a rule; ImageNet's by default.
        std: standard deviations of R, G and B, 1e-30 to 1e30; ImageNet's by default.
        dtype: the result's: float32, float64, bfloat16 or float16.
        backend: ``auto``, ``reference``, ``cpu``, ``triton`` or ``cuda``.

    Returns:
        [B, T, 3, H, W] of ``dtype``: (value / 255 − mean) / std, computed in at least float32.
        Outside the frame the value is 0. No gradients.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device, size, mean or std; on the CPU also a NaN, infinite or
            singular matrix. Elsewhere the crop of a singular matrix has one colour, and that of a
            matrix that is not finite is undefined.
        BackendUnavailable: the backend asked for cannot run here.
    """
    sizes: checks.Sizes = {}
    checks.tensor("frames", frames, "B T h w 3", sizes, checks.UINT8)
    checks.tensor("matrices", matrices, "B 2 3", sizes)
    checks.same_device("frames", frames, matrices=matrices)
    for side in checks.several("size", size, 2):
        checks.between("size", side, 1, 2**31 - 1)
    for value in checks.several("mean", mean, 3):
        checks.between("mean", value, -1e30, 1e30)
    for value in checks.several("std", std, 3):
        checks.between("std", value, 1e-30, 1e30)
    if not isinstance(dtype, torch.dtype) or dtype not in checks.FLOATING:
        raise TypeError(f"dtype must be a floating-point dtype, got {dtype!r}")
    checks.finite("matrices", matrices)
    if checks.readable(matrices) and bool((_inverse(matrices)[:, :, :2] == 0).all((1, 2)).any()):
        raise ValueError("matrices must be invertible, got a singular one")
    chosen = backends.choose("warp_clips", backend, frames.device, dtype, matrices)
    sides, means, stds = (int(size[0]), int(size[1])), [*map(float, mean)], [*map(float, std)]
    arguments = (frames, matrices.detach(), sides, means, stds, dtype)
    if chosen == backends.PLAIN:
        return warp_clips_reference(*arguments)
    return _forward(*arguments, chosen)


def _triton_limits(dtype: torch.dtype, matrices: Tensor) -> str | None:
    if dtype == torch.float64:
        return "dtype is float64; the kernel writes float32, float16 and bfloat16"
    return backends.interpreter_refusal(dtype=dtype, matrices=matrices)


backends.entry(warp_clips, "frames", cpu=None, triton=_triton_limits)
