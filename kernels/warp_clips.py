"""Crops of clips: bilinear samples of uint8 frames, normalised, in one launch.

A program computes one tile of one clip's crop in all T frames, which share the source positions. As
in cv2, these come from the inverse matrix in float64. The float64 part is computed once for each
column and row of a tile, not for each pixel: some cards have one float64 unit for 64 of float32.

What bounds it is the L2 cache's reads and the instructions of a pixel, whose six bytes of a row lie
anywhere. Where rows allow ("words"), they are cut out of two aligned words of 8 bytes; the upper
row's are those of the pixel above wherever these are the same; and two pixels' products are one
instruction, dp2a. Where the first word has all six, it is read in the second's place too: a load
without a condition needs no predicate and no zeros in its place. Lanes have neighbouring columns,
so that a warp's words share sectors. A lane with several columns could store 4 bytes or more at a
time, but would ask for each sector as many times; the stores' sectors are whole as it is. Pointers
are a lane's own and go on from frame to frame: those that a warp shares are kept, and added to, in
registers of their own, out of which no load can take them.

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
    remaining = 32 - ahead
    weight = tl.maximum(tl.minimum(ahead + 32, remaining), 0)
    most = tl.where(count > 1, 32, -(2**30))  # an axis of one pixel has no next one
    return first, weight, tl.maximum(tl.minimum(remaining + most, ahead), 0)


@triton.jit
def _moved(pointer, count):
    """``pointer`` + ``count``, an int32 or int64: a sum of which LLVM knows nothing.

    It would turn every address of the loop that grows with it into sums of its own, each kept in
    two registers and added to in each round.
    """
    if PLAIN:
        return pointer + count.to(tl.int64)
    LONG: tl.constexpr = count.dtype == tl.int64
    place = tl.inline_asm_elementwise(
        "mad.lo.s64 $0, $1, $2, $3;" if LONG else "mad.wide.s32 $0, $1, $2, $3;",
        "=l,l,l,l" if LONG else "=l,r,r,l",
        (
            count,
            tl.full((), pointer.dtype.element_ty.primitive_bitwidth // 8, count.dtype),
            pointer.to(tl.int64, bitcast=True),
        ),
        tl.int64,
        is_pure=True,
        pack=1,
    )
    return place.to(pointer.dtype, bitcast=True)


@triton.jit
def _again(index):
    """``index`` itself, for which no address is kept from round to round.

    It is multiplied and added to its base in one instruction instead.
    """
    if PLAIN:
        return index.to(tl.int64)
    LONG: tl.constexpr = index.dtype == tl.int64
    return tl.inline_asm_elementwise(
        "mov.b64 $0, $1;" if LONG else "mov.b32 $0, $1;",
        "=l,l" if LONG else "=r,r",
        (index,),
        index.dtype,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _permute(low, high, order):
    """Four bytes of the eight of ``low`` and ``high``, each named by one of the order's nibbles."""
    if PLAIN:
        eight, picked = (high.to(tl.uint64) << 32) | low, low * 0
        for i in tl.static_range(4):
            bits = ((order >> (4 * i)) & 7).to(tl.uint64) * 8
            picked |= ((eight >> bits) & 0xFF).to(tl.uint32) << (8 * i)
        return picked
    return tl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, $3;",
        "=r,r,r,r",
        (low, high, order),
        tl.uint32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _shift(low, high, bits):
    """The lower half of 64 bits, shifted to the right by the lowest five bits of ``bits``."""
    if PLAIN:
        return (((high.to(tl.uint64) << 32) | low) >> (bits & 31).to(tl.uint64)).to(tl.uint32)
    return tl.inline_asm_elementwise(
        "shf.r.wrap.b32 $0, $1, $2, $3;",
        "=r,r,r,r",
        (low, high, bits),
        tl.uint32,
        is_pure=True,
        pack=1,
    )


@triton.jit
def _cut_out(words, half, bits):
    """Two pixels of 3 bytes out of two words of 8.

    Args:
        half: of the first word, the one that they begin in: 0x3210, the lower one, or 0x7654.
        bits: how many of that half they begin behind, in the lowest five bits.

    Returns:
        Bytes from the lowest: red, red, green, green; and blue, blue, undefined.
    """
    low, high = words[0].to(tl.uint32), (words[0] >> 32).to(tl.uint32)
    low_2, high_2 = words[1].to(tl.uint32), (words[1] >> 32).to(tl.uint32)
    second = _permute(high, low_2, half)
    four = _shift(_permute(low, high, half), second, bits)
    two = _shift(second, _permute(low_2, high_2, half), bits)
    red_green = _permute(four, two, tl.full(four.shape, 0x4130, tl.uint32))
    return red_green, _permute(four, two, tl.full(four.shape, 0x0052, tl.uint32))


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
def _normalised(value, scale, shift):
    """Of the whole number that was added to the bits of 2²³ as float32: its scale + shift.

    2²³ · scale is exact, so that it goes within the product's rounding: (2²³ + n) · scale - 2²³ ·
    scale is n · scale, rounded once. Conversions have fewer units.
    """
    number = value.to(tl.float32, bitcast=True)
    if PLAIN:  # the interpreter rounds inside tl.fma
        return (number - 8388608.0) * scale + shift
    return tl.fma(number, scale, -8388608.0 * scale) + shift


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
    none = tl.full((), 0, tl.int32)  # makes tensors of numbers that are compiled in
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

    line = none.to(INDEX) + out_width
    plane = line * out_height
    below, ahead = tl.where(height > 1, none + stride_y, 0), none + stride_t
    base = frames + clip * stride_b
    if LAYOUT == "words":
        below, ahead = below >> 3, ahead >> 3
        base = base.to(tl.pointer_type(tl.uint64), bitcast=True)
    # Elements from a pixel, or a colour, to the next. Written into the instructions they need no
    # addresses of their own.
    if LAYOUT == "any":
        step = tl.where(width > 1, zero + stride_x, 0)
        second = zero + stride_c
    else:
        step: tl.constexpr = 3
        second: tl.constexpr = 1
    last_row = out_height - 1 - first_row
    row_to = out + ((clip * num_frames * 3 * out_height + first_row) * out_width + columns)
    for i in range(tl.minimum(BANDS, tl.cdiv(out_height - first_row, BLOCK_Y))):
        # Of each of BLOCK_Y rows: where its pixel is in a frame (in words: the one that it begins
        # in, and the one that the next one ends in), and the weights there.
        row = i * BLOCK_Y
        offsets, ends, halves, bits, fresh, weights, targets = (), (), (), (), (), (), ()
        above_left = tl.full((BLOCK_X,), -1, tl.int32)  # of no pixel
        above_lower = above_left
        for j in tl.static_range(BLOCK_Y):
            here = tl.zeros((BLOCK_X,), tl.int32) + tl.minimum(row + j, last_row)
            # Source positions in 1/32 pixel: a whole pixel, and the share of the way to the next.
            x = ((column_x + tl.gather(rows_x, here, 0)) >> 5).to(tl.int32)
            y = ((column_y + tl.gather(rows_y, here, 0)) >> 5).to(tl.int32)
            left, left_weight, right_weight = _taps(x, width)
            upper, upper_weight, lower_weight = _taps(y, height)
            both = (left_weight + right_weight * 65536).to(tl.uint32)  # two weights in one word
            weights = weights + (both * upper_weight.to(tl.uint32),)
            weights = weights + (both * lower_weight.to(tl.uint32),)
            if LAYOUT == "words":
                place = (left * 3) & 7
                offset = upper * (stride_y >> 3).to(tl.int32) + (left * 3 >> 3)
                end = offset + (place + 5 >> 3)
                halves = halves + (((place & 4) * 0x1111 + 0x3210).to(tl.uint32),)
                bits = bits + ((place * 8).to(tl.uint32),)
            else:
                offset = upper.to(tl.int64) * stride_y + left.to(tl.int64) * step
                end = offset
            offsets, ends = offsets + (offset,), ends + (end,)
            # At a scale near 1 most pixels' upper row is the lower one of the pixel above.
            fresh = fresh + ((upper != above_lower) | (left != above_left),)
            above_left, above_lower = left, upper + 1
            targets = targets + ((here - row) * line,)

        image = base + offsets[0]
        next_row = _moved(image, below)
        red_to, green_to = row_to, _moved(row_to, plane)
        blue_to, row_to = _moved(green_to, plane), _moved(row_to, BLOCK_Y * line)
        for _ in range(num_frames):
            # All loads stand before the first store, because the compiler moves none across it.
            top, bottom = (), ()
            for j in tl.static_range(BLOCK_Y):
                near = _again(offsets[j] - offsets[0])
                if LAYOUT == "words":
                    far = _again(ends[j] - offsets[0])
                    first = tl.load(image + near, mask=fresh[j])
                    top = top + ((first, tl.load(image + far, mask=fresh[j])),)
                    bottom = bottom + ((tl.load(next_row + near), tl.load(next_row + far)),)
                else:
                    top = top + (_load_bytes(image + near, step, second),)
                    bottom = bottom + (_load_bytes(next_row + near, step, second),)
            start = tl.full((BLOCK_X,), 0x4B000000, tl.uint32)  # the bits of 2²³ as float32
            under = (start, start)
            for j in tl.static_range(BLOCK_Y):
                values = (start, start, start)
                if LAYOUT == "words":
                    cut = _cut_out(top[j], halves[j], bits[j])
                    over = (
                        tl.where(fresh[j], cut[0], under[0]),
                        tl.where(fresh[j], cut[1], under[1]),
                    )
                    under = _cut_out(bottom[j], halves[j], bits[j])
                    values = _add_cut(
                        _add_cut(values, over, weights[2 * j]), under, weights[2 * j + 1]
                    )
                else:
                    values = _add_bytes(values, top[j], weights[2 * j])
                    values = _add_bytes(values, bottom[j], weights[2 * j + 1])
                to = _again(targets[j]) if j > 0 else 0
                red = _normalised(values[0], scale_r, shift_r)
                tl.store(red_to + to, red.to(out.dtype.element_ty))
                green = _normalised(values[1], scale_g, shift_g)
                tl.store(green_to + to, green.to(out.dtype.element_ty))
                blue = _normalised(values[2], scale_b, shift_b)
                tl.store(blue_to + to, blue.to(out.dtype.element_ty))
            image, next_row = _moved(image, ahead), _moved(next_row, ahead)
            red_to, green_to = _moved(red_to, 3 * plane), _moved(green_to, 3 * plane)
            blue_to = _moved(blue_to, 3 * plane)


def _layout(frames: Tensor, size: tuple[int, int]) -> str:
    """How the kernel reads ``frames``.

    Returns:
        "words": of 8 bytes, which begin and end where rows do; indices, in words of a frame and in
        elements of a frame's crop, fit 31 bits, and positions in pixels 21. "packed": bytes, with a
        pixel's three, and a row's pixels, side by side. "any": bytes, of any strides.
    """
    height, width = frames.shape[2:4]
    if frames.stride()[3:] != (3, 1) or width == 1:
        return "any"
    aligned = all(n % 8 == 0 for n in (frames.data_ptr(), width, *frames.stride()[:3]))
    words = height * frames.stride(2) // 8
    small = max(height, width, size[1]) < 2**21 and max(words, 3 * size[0] * size[1]) < 2**31
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
    layout = _layout(frames, size)
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
