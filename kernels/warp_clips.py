"""Crops of clips: bilinear samples of uint8 frames, normalised, in one launch.

A program computes one tile of one clip's crop in all T frames, which share the source positions. As
in cv2, these come from the inverse matrix in float64. The float64 part is computed once for each
column and row of a tile, not for each pixel: some cards have one float64 unit for 64 of float32.

What bounds it is the L2 cache's reads and the instructions of a pixel, whose six bytes of a row lie
anywhere. Where rows allow ("words"), they are cut out of two aligned words of 8 bytes, of which the
second is read only if it has some of them; the upper row's are those of the pixel above wherever
these are the same; and two pixels' products are one instruction, dp2a. Lanes have neighbouring
columns, so that a warp's words share sectors. A lane with several columns could store 4 bytes or
more at a time, but would ask for each sector as many times; the stores' sectors are whole as it is.

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
from cmpose.kernels.launch import INTERPRETED, arch_of, launch

PLAIN = tl.constexpr(INTERPRETED)
"""Whether what is one instruction of the card is written out, as the interpreter needs it."""


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
        first, within the axis, and the weights of it and of the next. A pixel outside of
        ``count`` has weight 0; where it would be read, its neighbour inside is.
    """
    first = tl.maximum(tl.minimum(position >> 5, count - 2), 0)
    ahead = position - first * 32  # a pixel has weight 32 where it is, and 0 from the next one on
    weight = tl.maximum(tl.minimum(32 + ahead, 32 - ahead), 0)
    return first, weight, tl.maximum(tl.minimum(ahead, 64 - ahead), 0)


@triton.jit
def _as_it_is(offset):
    """``offset`` itself, of which LLVM knows nothing.

    It would turn every address of the loop that grows with it into a sum of its own, kept in two
    registers and added to in each round.
    """
    if PLAIN:
        return offset
    return tl.inline_asm_elementwise(
        "mov.b64 $0, $1;", "=l,l", (offset,), tl.int64, is_pure=True, pack=1
    )


@triton.jit
def _again(index):
    """``index`` itself, for which no address is kept from round to round.

    It is multiplied and added to its base in one instruction instead.
    """
    if PLAIN:
        return index
    return tl.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", (index,), tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _load_words(image, word, place, wanted):
    """The two aligned words of 8 bytes that hold 6 bytes from byte ``place`` of the first.

    What is not wanted, or not needed, is not read and undefined.
    """
    words = (image + word.to(tl.uint32).to(tl.int64) * 8).to(
        tl.pointer_type(tl.uint64), bitcast=True
    )
    return tl.load(words, mask=wanted), tl.load(words + 1, mask=wanted & (place > 2))


@triton.jit
def _cut_out(words, place):
    """Two pixels of 3 bytes, from byte ``place`` of two words of 8.

    Returns:
        Bytes from the lowest: red, red, green, green; and blue, blue, undefined.
    """
    middle, last = (words[0] >> 32).to(tl.uint32), words[1].to(tl.uint32)
    far = place > 3
    first = tl.where(far, middle, words[0].to(tl.uint32))
    second = tl.where(far, last, middle)
    third = tl.where(far, (words[1] >> 32).to(tl.uint32), last)
    bits = ((place & 3) * 8).to(tl.uint64)
    four = (((second.to(tl.uint64) << 32) | first) >> bits).to(tl.uint32)
    two = (((third.to(tl.uint64) << 32) | second) >> bits).to(tl.uint32)
    if PLAIN:
        red_green = (four & 0xFF) | (four >> 24 << 8) | ((four << 8) & 0xFF0000) | (two << 24)
        return red_green, ((four >> 16) & 0xFF) | (two & 0xFF00)
    permute: tl.constexpr = "prmt.b32 $0, $1, $2, $3;"
    order = tl.full(four.shape, 0x4130, tl.uint32), tl.full(four.shape, 0x0052, tl.uint32)
    red_green = tl.inline_asm_elementwise(
        permute, "=r,r,r,r", (four, two, order[0]), tl.uint32, is_pure=True, pack=1
    )
    blue = tl.inline_asm_elementwise(
        permute, "=r,r,r,r", (four, two, order[1]), tl.uint32, is_pure=True, pack=1
    )
    return red_green, blue


@triton.jit
def _dot(weights, grey, total, HIGH: tl.constexpr):
    """total + the sum of two 16-bit weights times the two low, or high, bytes of ``grey``."""
    if PLAIN:
        pair = grey >> 16 if HIGH else grey
        return total + (weights & 0xFFFF) * (pair & 0xFF) + (weights >> 16) * ((pair >> 8) & 0xFF)
    dot: tl.constexpr = "dp2a.hi.u32.u32" if HIGH else "dp2a.lo.u32.u32"
    return tl.inline_asm_elementwise(
        dot + " $0, $1, $2, $3;",
        "=r,r,r,r",
        (weights, grey, total),
        tl.uint32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _add_cut(values, cut, weights):
    """Adds a row's two pixels, from :func:`_cut_out`, to the sums of three colours."""
    red = _dot(weights, cut[0], values[0], False)
    green = _dot(weights, cut[0], values[1], True)
    return red, green, _dot(weights, cut[1], values[2], False)


@triton.jit
def _level(value):
    """The whole number that was added to the bits of 2²³ as float32, as float32.

    Additions have more units than conversions.
    """
    return value.to(tl.float32, bitcast=True) - 8388608.0


@triton.jit
def _load_bytes(pointer, step, second):
    """Three colours of a pixel, then those of the next, one by one."""
    grey = ()
    for colour in tl.static_range(3):
        grey = grey + (tl.load(pointer + colour * second),)
    for colour in tl.static_range(3):
        grey = grey + (tl.load(pointer + (step + colour * second)),)
    return grey


@triton.jit
def _add_bytes(values, grey, weights):
    """Adds a row's two pixels, from :func:`_load_bytes`, to the sums of three colours."""
    sums = ()
    for colour in tl.static_range(3):
        value = values[colour] + grey[colour].to(tl.uint32) * (weights & 0xFFFF)
        sums = sums + (value + grey[3 + colour].to(tl.uint32) * (weights >> 16),)
    return sums


@triton.jit
# Long: 25 of its lines are parameters; what pixels and frames share is computed before the loops.
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
    LAYOUT: tl.constexpr,
    BANDS: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
):
    """A tile of BANDS · BLOCK_Y rows, BLOCK_Y of them at a time, by BLOCK_X columns."""
    zero = tl.full((), 0, tl.int64)  # makes sums int64
    # A sum of int32 that is too large ends far on the frame's other side, where weights are 0 too.
    INDEX: tl.constexpr = tl.int32 if LAYOUT == "words" else tl.int64
    across = tl.cdiv(out_width, BLOCK_X)
    tiles = across * tl.cdiv(out_height, BANDS * BLOCK_Y)
    clip = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    first_row = tile // across * (BANDS * BLOCK_Y)
    # What is behind the crop's last column, or row, is computed, and written, once more.
    columns = tl.minimum(tile % across * BLOCK_X + tl.arange(0, BLOCK_X), out_width - 1)

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

    # What a column adds to x and y, and what a row adds. A lane has a column and a row or two; the
    # rows' go round by shuffles, as every lane would compute them again otherwise.
    column_x = _fixed(xx * columns.to(tl.float64)).to(INDEX) + 16
    column_y = _fixed(yx * columns.to(tl.float64)).to(INDEX) + 16
    rows = (first_row + tl.arange(0, BANDS * BLOCK_Y)).to(tl.float64)
    rows_x = _fixed(xy * rows - offset_x)
    rows_y = _fixed(yy * rows - offset_y)

    plane = (zero + out_height) * out_width
    below = tl.where(height > 1, zero + stride_y, 0)
    # Elements from a pixel, or a colour, to the next. Written into the instructions they need no
    # addresses of their own.
    if LAYOUT == "any":
        step = tl.where(width > 1, zero + stride_x, 0)
        second = zero + stride_c
    else:
        step: tl.constexpr = 3
        second: tl.constexpr = 1
    # Two weights are in one word. A frame of one column or row has no next one.
    beside, under_it = tl.where(width > 1, 65536, 0), tl.where(height > 1, 1, 0)
    last_row = out_height - 1 - first_row
    for i in range(tl.minimum(BANDS, tl.cdiv(out_height - first_row, BLOCK_Y))):
        # Of each of BLOCK_Y rows: where its pixel is in a frame (in words: the one that it
        # begins in), and the weights there.
        row = i * BLOCK_Y
        offsets, places, fresh, weights, targets = (), (), (), (), ()
        above_left = tl.full((BLOCK_X,), -1, tl.int32)  # of no pixel
        above_lower = above_left
        for j in tl.static_range(BLOCK_Y):
            here = tl.zeros((BLOCK_X,), tl.int32) + tl.minimum(row + j, last_row)
            # Source positions in 1/32 pixel: a whole pixel, and the share of the way to the next.
            x = ((column_x + tl.gather(rows_x, here, 0)) >> 5).to(tl.int32)
            y = ((column_y + tl.gather(rows_y, here, 0)) >> 5).to(tl.int32)
            left, left_weight, right_weight = _taps(x, width)
            upper, upper_weight, lower_weight = _taps(y, height)
            both = (left_weight + right_weight * beside).to(tl.uint32)
            weights = weights + (both * upper_weight.to(tl.uint32),)
            weights = weights + (both * (lower_weight * under_it).to(tl.uint32),)
            if LAYOUT == "words":
                offset = upper * (stride_y >> 3).to(tl.int32) + (left * 3 >> 3)
            else:
                offset = upper.to(tl.int64) * stride_y + left.to(tl.int64) * step
            offsets = offsets + (offset,)
            places = places + ((left * 3) & 7,)
            # At a scale near 1 most pixels' upper row is the lower one of the pixel above.
            fresh = fresh + ((upper != above_lower) | (left != above_left),)
            above_left, above_lower = left, upper + 1
            pixel = here.to(INDEX) * out_width + columns
            targets = targets + (pixel,)

        moved, written = (
            clip * stride_b,
            (clip * num_frames * 3 * out_height + first_row) * out_width,
        )
        for _ in range(num_frames):
            # All loads stand before the first store, because the compiler moves none across it.
            image, next_row = frames + _as_it_is(moved), frames + _as_it_is(moved + below)
            top, bottom = (), ()
            for j in tl.static_range(BLOCK_Y):
                if LAYOUT == "words":
                    word = _again(offsets[j])
                    top = top + (_load_words(image, word, places[j], fresh[j]),)
                    bottom = bottom + (_load_words(next_row, word, places[j], True),)
                else:
                    top = top + (_load_bytes(image + offsets[j], step, second),)
                    bottom = bottom + (_load_bytes(next_row + offsets[j], step, second),)
            target, last = out + _as_it_is(written), out + _as_it_is(written + 2 * plane)
            start = tl.full((BLOCK_X,), 0x4B000000, tl.uint32)  # the bits of 2²³ as float32
            under = (start, start)
            for j in tl.static_range(BLOCK_Y):
                values = (start, start, start)
                if LAYOUT == "words":
                    cut = _cut_out(top[j], places[j])
                    over = (
                        tl.where(fresh[j], cut[0], under[0]),
                        tl.where(fresh[j], cut[1], under[1]),
                    )
                    under = _cut_out(bottom[j], places[j])
                    values = _add_cut(
                        _add_cut(values, over, weights[2 * j]), under, weights[2 * j + 1]
                    )
                else:
                    values = _add_bytes(values, top[j], weights[2 * j])
                    values = _add_bytes(values, bottom[j], weights[2 * j + 1])
                to = (
                    _again(targets[j]).to(tl.uint32).to(tl.int64)
                    if LAYOUT == "words"
                    else targets[j]
                )
                red = _level(values[0]) * scale_r + shift_r
                tl.store(target + to, red.to(out.dtype.element_ty))
                green = _level(values[1]) * scale_g + shift_g
                tl.store(target + plane + to, green.to(out.dtype.element_ty))
                blue = _level(values[2]) * scale_b + shift_b
                tl.store(last + to, blue.to(out.dtype.element_ty))
            moved += stride_t
            written += 3 * plane


def _layout(frames: Tensor, out_width: int) -> str:
    """How the kernel reads ``frames``.

    Returns:
        "words": of 8 bytes, which begin and end where rows do; indices, in words of a frame and in
        elements of a tile of the crop, fit 31 bits, and positions in pixels 21. "packed": bytes,
        with a pixel's three, and a row's pixels, side by side. "any": bytes, of any strides.
    """
    height, width = frames.shape[2:4]
    if frames.stride()[3:] != (3, 1) or width == 1:
        return "any"
    aligned = all(n % 8 == 0 for n in (frames.data_ptr(), width, *frames.stride()[:3]))
    words = height * frames.stride(2) // 8
    small = max(height, width, out_width) < 2**21 and words < 2**31
    return "words" if aligned and small else "packed"


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
    layout = _layout(frames, size[1])
    config = configs.config("warp_clips", layout, arch_of(frames))
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
        LAYOUT=layout,
        fp_fusion=False,
    )
    return out
