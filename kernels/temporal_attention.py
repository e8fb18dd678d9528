"""Attention over the T = 1..32 frames at each position and head, from a packed QKV projection.

An item of qkv [B, T, S, 3, H, d] is one (b, s, h): q, k, v [T, d], P = softmax(q kᵀ / √d) over the
T keys, o = P v. There are B·S·H items with T² scores each, which is little to compute: memory is
the limit. So every element of q, k, v is read once, where the projection left it, and every
element of the result is written once. The backward pass needs only qkv and do, the gradient of o:
it recomputes P, and δ_i = Σ_j P_ij dP_ij needs no o.

    dP = do vᵀ,  dS = P ∘ (dP − δ),  dv = Pᵀ do,  dq = dS k / √d,  dk = dSᵀ q / √d

- Up to ``ROW_FRAMES`` frames: the ``rows`` kernels. A program takes ROWS items, with h varying
  fastest, so that what is adjacent in memory is adjacent in the program. Each frame of q, k and v
  is a [ROWS, d] tile in the input's dtype, 16 bytes a thread. In the source all loads stand before
  the first computation. The compiler moves some down: of the compiled loads, 6 of 9 come first in
  the forward and 11 of 12 in the backward pass, which leaves enough bytes in flight. The scores
  are T² vectors over the items. Everything stays in registers.
- More frames: the ``tile`` kernels. A program takes one item, with its frames padded to 16 or 32.
  The products run on tensor cores (in float32 as exact FMAs), and their operands pass through
  shared memory. T is not a constant of these kernels: one compilation serves every T. A head
  dimension that is not a power of two is split into parts that are (112 = 64 + 32 + 16), so that no
  channel is padded.

Softmax and sums run in float32.

Options are compiled in, and what is not given is no argument of the compiled kernel, so that
without options the code is what it would be if there were none: ``key`` and ``value``, where q, k
and v are three tensors of any strides; ``scale``; ``CAUSAL``; and ``lengths``, how many of a clip's
frames count. Padded frames are never read. The ``rows`` kernels read a clip's last frame in their
place and give it no weight; their programs then hold items of one clip. In the ``tile`` kernels
padded frames are what the frames from T on are anyway.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmpose.kernels.attention import count_of, given_scale, operands
from cmpose.kernels.configs import config
from cmpose.kernels.launch import arch_of, launch

ROW_FRAMES = 5
"""The most frames that the ``rows`` kernels take.

With T their instructions per byte and their registers grow. The ``tile`` kernels always compute 16
frames, so their instructions per byte shrink and their registers stay. In float16 and bfloat16 the
two cost the same between 5 and 6 frames.
"""

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _locate(item, S, H: tl.constexpr):
    """(b, s, h) of items, as int64. There are fewer than 2³¹ items: their output would not fit."""
    position = item // H
    return (position // S).to(tl.int64), (position % S).to(tl.int64), (item % H).to(tl.int64)


@triton.jit
def _scaled(score, scale):
    """A score times the scale, if that is given; its default is a factor of :func:`_power`."""
    return score if scale is None else score * scale


@triton.jit
def _power(exponent, scale, D: tl.constexpr):
    """e to a difference of scores, as :func:`_scaled` gives them."""
    return tl.exp2(exponent * ((D**-0.5 if scale is None else 1.0) * _LOG2_E))


# -- rows -----------------------------------------------------------------------------------------


@triton.jit
def _items(lengths, items, S, H: tl.constexpr, ROWS: tl.constexpr):
    """A program's ROWS items, and their b, s and h. Those from ``items`` on do not exist.

    Items are the batch's; or a clip's, with lengths: then b is one number.
    """
    if lengths is None:
        item = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        b, s, h = _locate(tl.minimum(item, items - 1), S, H)
    else:
        blocks = tl.cdiv(items, ROWS)
        clip = tl.program_id(0) // blocks
        item = (tl.program_id(0) - clip * blocks) * ROWS + tl.arange(0, ROWS)
        b = clip.to(tl.int64)
        inside = tl.minimum(item, items - 1)
        s, h = (inside // H).to(tl.int64), (inside % H).to(tl.int64)
    return item, b, s, h


@triton.jit
def _tile_at(tensor, b, s, h, d, stride_b, stride_s, stride_h, stride_d):
    """Pointers to the first frame of items, [ROWS, D]."""
    pointers = (tensor + (b * stride_b + s * stride_s + h * stride_h))[:, None]
    return pointers + d.to(tl.int64)[None, :] * stride_d


@triton.jit
def _load(pointers, mask, PADDED: tl.constexpr):
    """Loads a tile. Where the head dimension is padded nothing is read, and the tile is 0."""
    if PADDED:
        return tl.load(pointers, mask=mask, other=0.0)
    return tl.load(pointers)


@triton.jit
def _step(stride, t, count):
    """From frame t to the next one, if that counts."""
    if count is None:
        return stride
    else:  # the compiler would read on behind the first return
        return (t + 1 < count).to(tl.int64) * stride


@triton.jit
def _store(pointers, values, mask, t, count):
    """Stores frame t of a result; 0 if it does not count, whatever the values are."""
    if count is None:
        tl.store(pointers, values, mask=mask)
    else:
        tl.store(pointers, values, mask=mask & (t < count))
        tl.store(pointers, tl.zeros_like(values), mask=mask & (t >= count))


@triton.jit
def _scores(x, tiles, COUNT: tl.constexpr):
    """Σ_d x · tiles[t], for the first t: a tuple of [ROWS]."""
    scores = ()
    for t in tl.static_range(COUNT):
        scores = scores + (tl.sum(x.to(tl.float32) * tiles[t].to(tl.float32), 1),)
    return scores


@triton.jit
def _softmax(scores, scale, D: tl.constexpr, i, count, CAUSAL: tl.constexpr):
    """Over the tuple, of scores times scale: the weights of a query.

    Keys that do not count have none, but the first, so that the sum is never 0; before a query that
    counts all do. A query that does not count gives none, if ``i`` says which it is. The largest
    score is that of keys that count: the others are copies of one.
    """
    scaled = ()
    for t in tl.static_range(len(scores)):
        scaled = scaled + (_scaled(scores[t], scale),)
    largest = scaled[0]
    for t in tl.static_range(1, len(scaled)):
        largest = tl.maximum(largest, scaled[t])
    total = tl.zeros_like(largest)
    powers = ()
    for t in tl.static_range(len(scaled)):
        power = _power(scaled[t] - largest, scale, D)
        if count is not None and not CAUSAL and t > 0:
            power = tl.where(t < count, power, 0.0)
        total += power
        powers = powers + (power,)
    inverse = 1.0 / total
    if count is not None and i is not None:
        inverse = tl.where(i < count, inverse, 0.0)
    weights = ()
    for t in tl.static_range(len(powers)):
        weights = weights + (powers[t] * inverse,)
    return weights


@triton.jit
def _mix(weights, FIRST: tl.constexpr, STEP: tl.constexpr, tiles, START, END: tl.constexpr):
    """Σ_t weights[FIRST + t·STEP] · tiles[t], for t from START to END − 1."""
    total = weights[FIRST + START * STEP][:, None] * tiles[START].to(tl.float32)
    for t in tl.static_range(START + 1, END):
        total += weights[FIRST + t * STEP][:, None] * tiles[t].to(tl.float32)
    return total


@triton.jit
def temporal_attention_rows_forward(
    qkv,
    out,
    items,
    S,
    stride_b,
    stride_t,
    stride_s,
    stride_c,
    stride_h,
    stride_d,
    out_t,
    key,
    key_b,
    key_t,
    key_s,
    key_h,
    key_d,
    value,
    value_b,
    value_t,
    value_s,
    value_h,
    value_d,
    lengths,
    scale,
    CAUSAL: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    item, b, s, h = _items(lengths, items, S, H, ROWS)
    count = None
    if lengths is not None:
        count = count_of(lengths, b, T)
    d = tl.arange(0, PADDED_D)
    mask = (item < items)[:, None] & (d < D)[None, :]
    pointers = _tile_at(qkv, b, s, h, d, stride_b, stride_s, stride_h, stride_d)
    if key is None:
        channel = tl.cast(stride_c, tl.int64)
    else:
        keys = _tile_at(key, b, s, h, d, key_b, key_s, key_h, key_d)
        values = _tile_at(value, b, s, h, d, value_b, value_s, value_h, value_d)
    q = ()
    k = ()
    v = ()
    for t in tl.static_range(T):
        q = q + (_load(pointers, mask, PADDED_D > D),)
        if key is None:
            k = k + (_load(pointers + channel, mask, PADDED_D > D),)
            v = v + (_load(pointers + 2 * channel, mask, PADDED_D > D),)
        else:
            k = k + (_load(keys, mask, PADDED_D > D),)
            v = v + (_load(values, mask, PADDED_D > D),)
            keys += _step(key_t, t, count)
            values += _step(value_t, t, count)
        pointers += _step(stride_t, t, count)
    results = (out + (b * T * out_t + (s * H + h) * D))[:, None] + d[None, :]
    for i in tl.static_range(T):
        scores = _scores(q[i], k, i + 1 if CAUSAL else T)
        # A query that does not count needs no weights of 0: its result is not stored.
        weights = _softmax(scores, scale, D, None, count, CAUSAL)
        mixed = _mix(weights, 0, 1, v, 0, i + 1 if CAUSAL else T)
        _store(results, mixed.to(out.dtype.element_ty), mask, i, count)
        results += out_t


@triton.jit
# Long: 39 of its lines are parameters.
def temporal_attention_rows_backward(
    grad,
    qkv,
    dqkv,
    items,
    S,
    grad_b,
    grad_t,
    grad_s,
    grad_h,
    grad_d,
    stride_b,
    stride_t,
    stride_s,
    stride_c,
    stride_h,
    stride_d,
    dqkv_t,
    key,
    key_b,
    key_t,
    key_s,
    key_h,
    key_d,
    value,
    value_b,
    value_t,
    value_s,
    value_h,
    value_d,
    lengths,
    scale,
    dkey,
    dvalue,
    CAUSAL: tl.constexpr,
    T: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    item, b, s, h = _items(lengths, items, S, H, ROWS)
    count = None
    if lengths is not None:
        count = count_of(lengths, b, T)
    d = tl.arange(0, PADDED_D)
    mask = (item < items)[:, None] & (d < D)[None, :]
    pointers = _tile_at(qkv, b, s, h, d, stride_b, stride_s, stride_h, stride_d)
    grads = _tile_at(grad, b, s, h, d, grad_b, grad_s, grad_h, grad_d)
    if key is None:
        channel = tl.cast(stride_c, tl.int64)
    else:
        keys = _tile_at(key, b, s, h, d, key_b, key_s, key_h, key_d)
        values = _tile_at(value, b, s, h, d, value_b, value_s, value_h, value_d)
    q = ()
    k = ()
    v = ()
    do = ()
    for t in tl.static_range(T):
        q = q + (_load(pointers, mask, PADDED_D > D),)
        if key is None:
            k = k + (_load(pointers + channel, mask, PADDED_D > D),)
            v = v + (_load(pointers + 2 * channel, mask, PADDED_D > D),)
        else:
            k = k + (_load(keys, mask, PADDED_D > D),)
            v = v + (_load(values, mask, PADDED_D > D),)
            keys += _step(key_t, t, count)
            values += _step(value_t, t, count)
        do = do + (_load(grads, mask, PADDED_D > D),)
        pointers += _step(stride_t, t, count)
        grads += _step(grad_t, t, count)
    # First all T·T entries of P and dS, each of which is a number an item; those of keys that come
    # later than their query are never read. Then the result, one tile at a time.
    factor = D**-0.5 if scale is None else scale
    p = ()
    ds = ()
    for i in tl.static_range(T):
        scores = _scores(q[i], k, i + 1 if CAUSAL else T)
        weights = _softmax(scores, scale, D, i, count, CAUSAL)
        dp = _scores(do[i], v, i + 1 if CAUSAL else T)
        delta = weights[0] * dp[0]
        for j in tl.static_range(1, len(dp)):
            delta += weights[j] * dp[j]
        for j in tl.static_range(len(dp)):
            ds = ds + (weights[j] * (dp[j] - delta) * factor,)
        p = p + weights
        for _ in tl.static_range(T - len(dp)):
            ds = ds + (delta,)
            p = p + (delta,)
    width: tl.constexpr = H * D
    element: tl.constexpr = dqkv.dtype.element_ty
    if key is None:
        results = (dqkv + (b * T * dqkv_t + s * (3 * width) + h * D))[:, None] + d[None, :]
    else:
        offsets = (b * T * dqkv_t + s * width + h * D)[:, None] + d[None, :]
        results, key_results, value_results = dqkv + offsets, dkey + offsets, dvalue + offsets
    for t in tl.static_range(T):
        dq = _mix(ds, t * T, 1, k, 0, t + 1 if CAUSAL else T)
        _store(results, dq.to(element), mask, t, count)
        key_at = results + width if key is None else key_results
        dk = _mix(ds, t, T, q, t if CAUSAL else 0, T)
        _store(key_at, dk.to(element), mask, t, count)
        value_at = results + 2 * width if key is None else value_results
        dv = _mix(p, t, T, do, t if CAUSAL else 0, T)
        _store(value_at, dv.to(element), mask, t, count)
        results += dqkv_t
        if key is not None:
            key_results += dqkv_t
            value_results += dqkv_t


# -- tiles ----------------------------------------------------------------------------------------


@triton.jit
def _columns(D: tl.constexpr):
    """The head dimension's indices, in parts of a power of two, the largest first."""
    columns = ()
    for bit in tl.static_range(4):
        if (D >> (7 - bit)) % 2 == 1:
            columns = columns + ((D >> (8 - bit) << (8 - bit)) + tl.arange(0, 128 >> bit),)
    return columns


@triton.jit
def _load_frames(pointers, columns, stride, mask):
    """Loads [FRAMES, d] in parts, with 0 in the padding, which then adds nothing to any product."""
    parts = ()
    for c in tl.static_range(len(columns)):
        part = pointers[:, None] + columns[c].to(tl.int64)[None, :] * stride
        parts = parts + (tl.load(part, mask=mask[:, None], other=0.0),)
    return parts


@triton.jit
def _frames_at(tensor, b, s, h, t, stride_b, stride_t, stride_s, stride_h):
    """Pointers to the frames of an item."""
    return tensor + (b * stride_b + s * stride_s + h * stride_h) + t.to(tl.int64) * stride_t


@triton.jit
def _products(x, y, PRECISION: tl.constexpr):
    """x yᵀ, [FRAMES, FRAMES] of [FRAMES, d] in parts."""
    products = tl.dot(x[0], tl.trans(y[0]), input_precision=PRECISION)
    for c in tl.static_range(1, len(x)):
        products = tl.dot(x[c], tl.trans(y[c]), products, input_precision=PRECISION)
    return products


@triton.jit
def _tile_weights(q, k, allowed, scale, D: tl.constexpr, PRECISION: tl.constexpr):
    """P, [FRAMES, FRAMES]; 0 for keys that a query may not attend to."""
    scores = tl.where(allowed, _scaled(_products(q, k, PRECISION), scale), float("-inf"))
    powers = _power(scores - tl.max(scores, 1)[:, None], scale, D)
    return powers * (1.0 / tl.sum(powers, 1))[:, None]


@triton.jit
def _store_mixed(
    pointers, columns, weights, parts, factor, mask, valid, LENGTHS: tl.constexpr, PRECISION
):
    """Stores weights · parts · factor, one part after the other; with lengths 0 in the padding."""
    for c in tl.static_range(len(columns)):
        mixed = tl.dot(weights, parts[c], input_precision=PRECISION) * factor
        if LENGTHS:
            mixed = tl.where(valid[:, None], mixed, 0.0)
        values = mixed.to(pointers.dtype.element_ty)
        tl.store(pointers[:, None] + columns[c][None, :], values, mask=mask[:, None])


@triton.jit
def temporal_attention_tile_forward(
    qkv,
    out,
    T,
    S,
    stride_b,
    stride_t,
    stride_s,
    stride_c,
    stride_h,
    stride_d,
    out_t,
    key,
    key_b,
    key_t,
    key_s,
    key_h,
    key_d,
    value,
    value_b,
    value_t,
    value_s,
    value_h,
    value_d,
    lengths,
    scale,
    CAUSAL: tl.constexpr,
    FRAMES: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b, s, h = _locate(tl.program_id(0), S, H)
    t = tl.arange(0, FRAMES)
    mask = t < T
    valid = mask
    if lengths is not None:
        valid = t < count_of(lengths, b, T)
    columns = _columns(D)
    pointers = _frames_at(qkv, b, s, h, t, stride_b, stride_t, stride_s, stride_h)
    q = _load_frames(pointers, columns, stride_d, valid)
    if key is None:
        channel = tl.cast(stride_c, tl.int64)
        k = _load_frames(pointers + channel, columns, stride_d, valid)
        v = _load_frames(pointers + 2 * channel, columns, stride_d, valid)
    else:
        keys = _frames_at(key, b, s, h, t, key_b, key_t, key_s, key_h)
        k = _load_frames(keys, columns, key_d, valid)
        values = _frames_at(value, b, s, h, t, value_b, value_t, value_s, value_h)
        v = _load_frames(values, columns, value_d, valid)
    allowed = valid[None, :]
    if lengths is not None:
        allowed |= (t == 0)[None, :]  # so that every sum of a softmax has a term
    if CAUSAL:
        allowed &= t[:, None] >= t[None, :]
    weights = _tile_weights(q, k, allowed, scale, D, PRECISION).to(qkv.dtype.element_ty)
    results = out + (b * T * out_t + (s * H + h) * D) + t.to(tl.int64) * out_t
    padded: tl.constexpr = lengths is not None
    _store_mixed(results, columns, weights, v, 1.0, mask, valid, padded, PRECISION)


@triton.jit
# Long: 38 of its lines are parameters.
def temporal_attention_tile_backward(
    grad,
    qkv,
    dqkv,
    T,
    S,
    grad_b,
    grad_t,
    grad_s,
    grad_h,
    grad_d,
    stride_b,
    stride_t,
    stride_s,
    stride_c,
    stride_h,
    stride_d,
    dqkv_t,
    key,
    key_b,
    key_t,
    key_s,
    key_h,
    key_d,
    value,
    value_b,
    value_t,
    value_s,
    value_h,
    value_d,
    lengths,
    scale,
    dkey,
    dvalue,
    CAUSAL: tl.constexpr,
    FRAMES: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b, s, h = _locate(tl.program_id(0), S, H)
    t = tl.arange(0, FRAMES)
    mask = t < T
    valid = mask
    if lengths is not None:
        valid = t < count_of(lengths, b, T)
    columns = _columns(D)
    pointers = _frames_at(qkv, b, s, h, t, stride_b, stride_t, stride_s, stride_h)
    grads = _frames_at(grad, b, s, h, t, grad_b, grad_t, grad_s, grad_h)
    q = _load_frames(pointers, columns, stride_d, valid)
    if key is None:
        channel = tl.cast(stride_c, tl.int64)
        k = _load_frames(pointers + channel, columns, stride_d, valid)
        v = _load_frames(pointers + 2 * channel, columns, stride_d, valid)
    else:
        keys = _frames_at(key, b, s, h, t, key_b, key_t, key_s, key_h)
        k = _load_frames(keys, columns, key_d, valid)
        values = _frames_at(value, b, s, h, t, value_b, value_t, value_s, value_h)
        v = _load_frames(values, columns, value_d, valid)
    do = _load_frames(grads, columns, grad_d, valid)
    # A frame and a padded one can give 0 times infinity, which is NaN and must not enter a sum.
    pairs = valid[:, None] & valid[None, :]
    allowed = valid[None, :]
    if lengths is not None:
        allowed |= (t == 0)[None, :]  # so that every sum of a softmax has a term
    if CAUSAL:
        earlier = t[:, None] >= t[None, :]
        pairs &= earlier
        allowed &= earlier
    p = tl.where(pairs, _tile_weights(q, k, allowed, scale, D, PRECISION), 0.0)
    dp = tl.where(pairs, _products(do, v, PRECISION), 0.0)
    delta = tl.sum(p * dp, 1)
    # Rounded before it is scaled: scaled first, more small values would underflow in float16.
    ds = (p * (dp - delta[:, None])).to(qkv.dtype.element_ty)
    factor = D**-0.5 if scale is None else scale
    padded: tl.constexpr = lengths is not None
    width: tl.constexpr = H * D
    if key is None:
        results = dqkv + (b * T * dqkv_t + s * (3 * width) + h * D) + t.to(tl.int64) * dqkv_t
        key_results = results + width
        value_results = results + 2 * width
    else:
        offsets = (b * T * dqkv_t + s * width + h * D) + t.to(tl.int64) * dqkv_t
        results, key_results, value_results = dqkv + offsets, dkey + offsets, dvalue + offsets
    _store_mixed(results, columns, ds, k, factor, mask, valid, padded, PRECISION)
    turned = tl.trans(ds)
    _store_mixed(key_results, columns, turned, q, factor, mask, valid, padded, PRECISION)
    weights = tl.trans(p.to(qkv.dtype.element_ty))
    _store_mixed(value_results, columns, weights, do, 1.0, mask, valid, padded, PRECISION)


# -- launch ---------------------------------------------------------------------------------------


def _precision(qkv: Tensor) -> str:
    """Whether float32 products may be rounded to TF32; it does not affect other dtypes."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and qkv.dtype == torch.float32 else "ieee"


def _choose_kernel(
    rows: Any, tile: Any, name: str, qkv: Tensor, per_clip: bool
) -> tuple[Any, tuple[int], int, dict]:
    """The one of two kernels that takes ``qkv``, its grid, its first size (items or T) and its
    constants. ``per_clip``: whether a program's items are of one clip."""
    B, T, S, H, d = *qkv.shape[:3], *qkv.shape[-2:]
    constants = {"H": H, "D": d}
    if T <= ROW_FRAMES:
        padded = triton.next_power_of_2(d)
        variant = padded, qkv.element_size()
        chosen = config(f"temporal_attention_rows_{name}", variant, arch_of(qkv))
        constants |= {"T": T, "PADDED_D": padded}
        items, groups = (S * H, B) if per_clip else (B * S * H, 1)
        grid = (groups * triton.cdiv(items, chosen.blocks["ROWS"]),)
        return rows, grid, items, {"config": chosen, **constants}
    frames = 16 if T <= 16 else 32
    largest = max(32, 1 << (d.bit_length() - 1))
    variant = largest, qkv.element_size(), frames
    chosen = config(f"temporal_attention_tile_{name}", variant, arch_of(qkv))
    constants |= {"FRAMES": frames, "PRECISION": _precision(qkv)}
    return tile, (B * S * H,), T, {"config": chosen, **constants}


# Many parameters: those of the registered op.
def forward(
    qkv: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """softmax(scale · q kᵀ) v along T.

    Args:
        qkv: [B, T, S, 3, H, d], float32, float16 or bfloat16, of any strides; T 1 to 32, d a
            multiple of 16 up to 128. Or q, [B, T, S, H, d], with ``key`` and ``value`` alike.
        lengths: int64 [B], how many of a clip's frames count; the others give 0 and are not read.
        scale: of the scores; None is 1/√d.
        causal: whether a frame attends to itself and earlier ones only.

    Returns:
        [B, T, S, H, d], contiguous, in qkv's dtype.
    """
    B, T, S, H, d = *qkv.shape[:3], *qkv.shape[-2:]
    out = torch.empty((B, T, S, H, d), dtype=qkv.dtype, device=qkv.device)
    kernel, grid, size, constants = _choose_kernel(
        temporal_attention_rows_forward,
        temporal_attention_tile_forward,
        "forward",
        qkv,
        lengths is not None,
    )
    strides, others = operands(qkv, key, value)
    lengths = None if lengths is None else lengths.contiguous()
    options = *others, lengths, given_scale(scale, qkv)
    arguments = qkv, out, size, S, *strides, out.stride(1), *options
    launch(kernel, grid, *arguments, CAUSAL=causal, **constants)
    return out


# Many parameters: those of the registered op.
def backward(
    grad: Tensor,
    qkv: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> tuple[Tensor, ...]:
    """The gradients of :func:`forward`.

    Args:
        grad: [B, T, S, H, d], the gradient of the result, in qkv's dtype, of any strides. Padded
            frames of it are not read.
        qkv, key, value, lengths, scale, causal: as :func:`forward` got them.

    Returns:
        The gradient to qkv; or those to q, ``key`` and ``value``. Contiguous, in qkv's dtype.
    """
    given = (qkv,) if key is None or value is None else (qkv, key, value)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given]
    kernel, grid, size, constants = _choose_kernel(
        temporal_attention_rows_backward,
        temporal_attention_tile_backward,
        "backward",
        qkv,
        lengths is not None,
    )
    strides, others = operands(qkv, key, value)
    lengths = None if lengths is None else lengths.contiguous()
    options = *others, lengths, given_scale(scale, qkv), *(grads[1:] or (None, None))
    strides = *grad.stride(), *strides, grads[0].stride(1)
    arguments = grad, qkv, grads[0], size, qkv.shape[2], *strides, *options
    launch(kernel, grid, *arguments, CAUSAL=causal, **constants)
    return tuple(grads)
