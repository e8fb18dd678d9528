"""Crops of clips: bilinear samples of uint8 frames, normalised, in one launch.

A program computes one tile of one clip's crop in all T frames, which share the source positions. As
in cv2, these come from the inverse matrix in float64. The float64 part is computed once for each
column and row of a tile, not for each pixel: some cards have one float64 unit for 64 of float32.

Positions and weights are the reference's, bit for bit, and sums of weighted grey levels are exact
integers. So the result differs from the reference's by its last rounding at most.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmpose.kernels import configs
from cmpose.kernels.launch import arch_of, launch


@triton.jit
def _fixed(pixels):
    """Float64 pixels to int32 units of 1/1024 pixel: half to even, within ±2³⁰, 2³⁰ for NaN."""
    scaled = pixels * 1024.0
    scaled = tl.where(scaled < 1073741824.0, scaled, 1073741824.0)  # false for NaN
    scaled = tl.where(scaled > -1073741824.0, scaled, -1073741824.0)
    # 1.5·2⁵² + x has no bits for a fraction, so that the sum is rounded half to even, and its low
    # bits are x in two's complement. A compiler cannot simplify this away.
    return (scaled + 6755399441055744.0).to(tl.int64, bitcast=True).to(tl.int32)


@triton.jit
def _taps(position, count):
    """Along one axis, what to read at ``position`` in 1/32 pixel: the pixel ``first`` and the next.

    Returns:
        first, within the axis (int64), and the weights of it and of the next. A pixel outside of
        ``count`` has weight 0; where it would be read, its neighbour inside is.
    """
    whole, share = position >> 5, position & 31
    first = tl.maximum(tl.minimum(whole, count - 2), 0)
    ahead = whole - first  # 0 inside, -1 and 1 where one of the two pixels is outside
    weight = tl.where(ahead == 0, 32 - share, tl.where(ahead == -1, share, 0))
    next_weight = tl.where(ahead == 0, share, tl.where(ahead == 1, 32 - share, 0))
    return first.to(tl.int64), weight, tl.where(count > 1, next_weight, 0)


@triton.jit
def _sample(top, bottom, step, weights, offset):
    """Σ weight · grey level of four pixels, each ``offset`` elements after its pointer; exact."""
    value = tl.load(top + offset).to(tl.int32) * weights[0]
    value += tl.load(top + (offset + step)).to(tl.int32) * weights[1]
    value += tl.load(bottom + offset).to(tl.int32) * weights[2]
    value += tl.load(bottom + (offset + step)).to(tl.int32) * weights[3]
    return value.to(tl.float32)


@triton.jit
# Long: 25 of its lines are parameters; what a tile's pixels share is computed before the loops.
def _warp_clips(
    frames,
    matrices,
    out,
    num_frames,
    height,
    width,
    out_height,
    out_width,
    stride_b,
    stride_t,
    stride_y,
    stride_x,
    stride_c,
    matrix_b,
    matrix_row,
    matrix_column,
    scale_r,
    scale_g,
    scale_b,
    shift_r,
    shift_g,
    shift_b,
    PACKED: tl.constexpr,
    BANDS: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """A tile of BANDS · BLOCK_Y rows, BLOCK_Y of them at a time, by BLOCK_X columns."""
    zero = tl.full((), 0, tl.int64)  # makes sums int64
    across = tl.cdiv(out_width, BLOCK_X)
    tiles = across * tl.cdiv(out_height, BANDS * BLOCK_Y)
    clip = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    first_row = tile // across * (BANDS * BLOCK_Y)
    columns = tile % across * BLOCK_X + tl.arange(0, BLOCK_X)

    # The inverse, crop → frame, is (xx, xy, −offset_x), (yx, yy, −offset_y); 0 if there is none.
    x_ptr = matrices + clip * matrix_b
    y_ptr = x_ptr + matrix_row
    a = tl.load(x_ptr).to(tl.float64)
    b = tl.load(x_ptr + matrix_column).to(tl.float64)
    tx = tl.load(x_ptr + 2 * matrix_column).to(tl.float64)
    c = tl.load(y_ptr).to(tl.float64)
    d = tl.load(y_ptr + matrix_column).to(tl.float64)
    ty = tl.load(y_ptr + 2 * matrix_column).to(tl.float64)
    determinant = a * d - b * c
    singular = determinant == 0.0
    factor = tl.where(singular, 0.0, 1.0 / tl.where(singular, 1.0, determinant))
    negative = 0.0 - factor
    xx, xy = d * factor, b * negative
    yx, yy = c * negative, a * factor
    offset_x = xx * tx + xy * ty
    offset_y = yx * tx + yy * ty

    # What a column adds to x and y, [BLOCK_X, 2], and what a row adds, [2 · BANDS, BLOCK_Y]. Each
    # is one tensor, whose parts are taken out by sums with a single term that is not 0: such a sum
    # is computed only by the threads that hold its terms. Separate vectors would be computed again
    # by every thread that needs them.
    axis = tl.arange(0, 2)[None, :]
    share = _fixed(tl.where(axis == 0, xx, yx) * columns.to(tl.float64)[:, None])
    column_x = tl.sum(tl.where(axis == 0, share, 0), 1)[None, :] + (zero + 16)
    column_y = tl.sum(tl.where(axis == 1, share, 0), 1)[None, :] + (zero + 16)
    band = tl.arange(0, 2 * BANDS)[:, None]
    rows = first_row + (band % BANDS) * BLOCK_Y + tl.arange(0, BLOCK_Y)[None, :]
    shift = tl.where(band < BANDS, offset_x, offset_y)
    shares = _fixed(tl.where(band < BANDS, xy, yy) * rows.to(tl.float64) - shift)

    plane = (zero + out_height) * out_width
    # Elements from a pixel, or a colour, to the next. Written into the instructions they need no
    # addresses of their own.
    if PACKED:
        step: tl.constexpr = 3
        second: tl.constexpr = 1
    else:
        step = tl.where(width > 1, zero + stride_x, 0)
        second = zero + stride_c
    for i in range(tl.minimum(BANDS, tl.cdiv(out_height - first_row, BLOCK_Y))):
        # Source positions in 1/32 pixel: a whole pixel, and the share of the way to the next.
        row_x = tl.sum(tl.where(band == i, shares, 0), 0)[:, None]
        row_y = tl.sum(tl.where(band == i + BANDS, shares, 0), 0)[:, None]
        x = ((column_x + row_x) >> 5).to(tl.int32)
        y = ((column_y + row_y) >> 5).to(tl.int32)
        left, left_weight, right_weight = _taps(x, width)
        upper, upper_weight, lower_weight = _taps(y, height)
        weights = (
            upper_weight * left_weight,
            upper_weight * right_weight,
            lower_weight * left_weight,
            lower_weight * right_weight,
        )
        top = frames + clip * stride_b + upper * stride_y + left * step
        bottom = top + tl.where(height > 1, zero + stride_y, 0)

        row = first_row + i * BLOCK_Y
        inner = tl.arange(0, BLOCK_Y)[:, None]
        inside = (row + inner < out_height) & (columns < out_width)[None, :]
        # The hint gives neighbouring pixels to neighbouring threads, whose reads then share cache
        # lines. Without it a thread would take eight neighbours, for a 16-byte store.
        inner = tl.max_contiguous(inner * out_width + columns[None, :], [1, 1])
        target = out + clip * num_frames * 3 * plane + row.to(tl.int64) * out_width
        for _ in range(num_frames):
            # All loads stand before the first store, because the compiler moves none across it.
            red = _sample(top, bottom, step, weights, 0)
            green = _sample(top, bottom, step, weights, second)
            blue = _sample(top, bottom, step, weights, 2 * second)
            pixel = target + inner
            tl.store(pixel, (red * scale_r + shift_r).to(out.dtype.element_ty), mask=inside)
            pixel += plane
            tl.store(pixel, (green * scale_g + shift_g).to(out.dtype.element_ty), mask=inside)
            pixel += plane
            tl.store(pixel, (blue * scale_b + shift_b).to(out.dtype.element_ty), mask=inside)
            target += 3 * plane
            top += stride_t
            bottom += stride_t


def forward(
    frames: Tensor,
    matrices: Tensor,
    size: tuple[int, int],
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """One crop a clip, sampled as ``cv2.warpAffine`` does and normalised.

    Args:
        frames: uint8 [B, T, h, w, 3] of any strides, also 0; h, w ≥ 1.
        matrices: floating point [B, 2, 3] of any strides, source → crop pixel (x, y).
        size: (H, W) of the crops.
        mean: of R, G and B, in 0 to 1.
        std: likewise.
        dtype: of the result: float32, float16 or bfloat16.

    Returns:
        [B, T, 3, H, W], contiguous: (value / 255 − mean) / std, where value is
        Σ weight · grey level over the four pixels around a source position that is rounded to
        1/32 pixel; pixels outside the frame are 0. A singular matrix counts as zeros.
    """
    batch, num_frames, height, width, _ = frames.shape
    out = torch.empty((batch, num_frames, 3, *size), dtype=dtype, device=frames.device)
    packed = frames.stride()[3:] == (3, 1) and width > 1
    config = configs.config("warp_clips", "packed" if packed else "any", arch_of(frames))
    tile = config.blocks["BANDS"] * config.blocks["BLOCK_Y"], config.blocks["BLOCK_X"]
    programs = batch * triton.cdiv(size[0], tile[0]) * triton.cdiv(size[1], tile[1])
    launch(
        _warp_clips,
        (programs if num_frames else 0,),
        frames,
        matrices,
        out,
        num_frames,
        height,
        width,
        *size,
        *frames.stride(),
        *matrices.stride(),
        *(1.0 / (32**2 * 255.0 * s) for s in std),  # weights sum to 32²
        *(-m / s for m, s in zip(mean, std, strict=True)),
        config=config,
        PACKED=packed,
        fp_fusion=False,
    )
    return out
