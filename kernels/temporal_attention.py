"""Attention over the T = 2..16 frames at each position and head, from a packed QKV projection.

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
- More frames: the ``tile`` kernels. A program takes one item, with its frames padded to 16. The
  products run on tensor cores (in float32 as exact FMAs), and their operands pass through shared
  memory. T is not a constant of these kernels: one compilation serves every T. A head dimension
  that is not a power of two is split into two parts that are (80 = 64 + 16), so that no channel is
  padded.

Softmax and sums run in float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmpose.kernels.configs import config
from cmpose.kernels.launch import arch_of, launch

ROW_FRAMES = 5
"""The most frames that the ``rows`` kernels take.

With T their instructions per byte and their registers grow. The ``tile`` kernels always compute 16
frames, so their instructions per byte shrink and their registers stay. In float16 and bfloat16 the
two cost the same between 5 and 6 frames.
"""

_LOG2_E = tl.constexpr(1.4426950408889634)
_TILE = tl.constexpr(16)


@triton.jit
def _locate(item, S, H: tl.constexpr):
    """(b, s, h) of items, as int64. There are fewer than 2³¹ items: their output would not fit."""
    position = item // H
    return (position // S).to(tl.int64), (position % S).to(tl.int64), (item % H).to(tl.int64)


@triton.jit
def _columns(MAIN: tl.constexpr, REST: tl.constexpr):
    """The head dimension's indices, in one or two parts of a power of two."""
    columns = (tl.arange(0, MAIN),)
    if REST > 0:
        columns = columns + (MAIN + tl.arange(0, REST),)
    return columns


@triton.jit
def _load_frames(pointers, columns, stride, mask):
    """Loads [16, d] in parts, with 0 in the padding, which then adds nothing to any product."""
    parts = ()
    for c in tl.static_range(len(columns)):
        part = pointers[:, None] + columns[c].to(tl.int64)[None, :] * stride
        parts = parts + (tl.load(part, mask=mask[:, None], other=0.0),)
    return parts


@triton.jit
def _load(pointers, mask, PADDED: tl.constexpr):
    """Loads a tile. Where the head dimension is padded nothing is read, and the tile is 0."""
    if PADDED:
        return tl.load(pointers, mask=mask, other=0.0)
    return tl.load(pointers)


@triton.jit
def _scores(x, tiles):
    """Σ_d x · tiles[t], for each t: a tuple of [ROWS]."""
    scores = ()
    for t in tl.static_range(len(tiles)):
        scores = scores + (tl.sum(x.to(tl.float32) * tiles[t].to(tl.float32), 1),)
    return scores


@triton.jit
def _softmax(scores, scale: tl.constexpr):
    """Over the tuple, of scores times scale."""
    largest = scores[0]
    for t in tl.static_range(1, len(scores)):
        largest = tl.maximum(largest, scores[t])
    total = tl.zeros_like(largest)
    powers = ()
    for t in tl.static_range(len(scores)):
        power = tl.exp2((scores[t] - largest) * (scale * _LOG2_E))
        total += power
        powers = powers + (power,)
    inverse = 1.0 / total
    weights = ()
    for t in tl.static_range(len(scores)):
        weights = weights + (powers[t] * inverse,)
    return weights


@triton.jit
def _mix(weights, FIRST: tl.constexpr, STEP: tl.constexpr, tiles):
    """Σ_t weights[FIRST + t·STEP] · tiles[t]."""
    total = weights[FIRST][:, None] * tiles[0].to(tl.float32)
    for t in tl.static_range(1, len(tiles)):
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
    T: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    item = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b, s, h = _locate(tl.minimum(item, items - 1), S, H)
    d = tl.arange(0, PADDED_D)
    mask = (item < items)[:, None] & (d < D)[None, :]
    pointers = (qkv + (b * stride_b + s * stride_s + h * stride_h))[:, None]
    pointers += d.to(tl.int64)[None, :] * stride_d
    channel = tl.cast(stride_c, tl.int64)
    q = ()
    k = ()
    v = ()
    for _ in tl.static_range(T):
        q = q + (_load(pointers, mask, PADDED_D > D),)
        k = k + (_load(pointers + channel, mask, PADDED_D > D),)
        v = v + (_load(pointers + 2 * channel, mask, PADDED_D > D),)
        pointers += stride_t
    results = (out + (b * T * out_t + (s * H + h) * D))[:, None] + d[None, :]
    for i in tl.static_range(T):
        weights = _softmax(_scores(q[i], k), D**-0.5)
        tl.store(results, _mix(weights, 0, 1, v).to(out.dtype.element_ty), mask=mask)
        results += out_t


@triton.jit
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
    T: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    PADDED_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    item = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    b, s, h = _locate(tl.minimum(item, items - 1), S, H)
    d = tl.arange(0, PADDED_D)
    mask = (item < items)[:, None] & (d < D)[None, :]
    pointers = (qkv + (b * stride_b + s * stride_s + h * stride_h))[:, None]
    pointers += d.to(tl.int64)[None, :] * stride_d
    grads = (grad + (b * grad_b + s * grad_s + h * grad_h))[:, None]
    grads += d.to(tl.int64)[None, :] * grad_d
    channel = tl.cast(stride_c, tl.int64)
    q = ()
    k = ()
    v = ()
    do = ()
    for _ in tl.static_range(T):
        q = q + (_load(pointers, mask, PADDED_D > D),)
        k = k + (_load(pointers + channel, mask, PADDED_D > D),)
        v = v + (_load(pointers + 2 * channel, mask, PADDED_D > D),)
        do = do + (_load(grads, mask, PADDED_D > D),)
        pointers += stride_t
        grads += grad_t
    # First all T·T entries of P and dS, each of which is a number an item. Then the result, one
    # tile at a time.
    p = ()
    ds = ()
    for i in tl.static_range(T):
        weights = _softmax(_scores(q[i], k), D**-0.5)
        dp = _scores(do[i], v)
        delta = weights[0] * dp[0]
        for j in tl.static_range(1, T):
            delta += weights[j] * dp[j]
        for j in tl.static_range(T):
            ds = ds + (weights[j] * (dp[j] - delta) * (D**-0.5),)
        p = p + weights
    width: tl.constexpr = H * D
    results = (dqkv + (b * T * dqkv_t + s * (3 * width) + h * D))[:, None] + d[None, :]
    element: tl.constexpr = dqkv.dtype.element_ty
    for t in tl.static_range(T):
        tl.store(results, _mix(ds, t * T, 1, k).to(element), mask=mask)
        tl.store(results + width, _mix(ds, t, T, q).to(element), mask=mask)
        tl.store(results + 2 * width, _mix(p, t, T, do).to(element), mask=mask)
        results += dqkv_t


@triton.jit
def _products(x, y, PRECISION: tl.constexpr):
    """x yᵀ, [16, 16] of [16, d] in parts."""
    products = tl.dot(x[0], tl.trans(y[0]), input_precision=PRECISION)
    for c in tl.static_range(1, len(x)):
        products = tl.dot(x[c], tl.trans(y[c]), products, input_precision=PRECISION)
    return products


@triton.jit
def _tile_weights(q, k, valid, scale: tl.constexpr, PRECISION: tl.constexpr):
    """P, [16, 16]; 0 for keys that are padding."""
    scores = tl.where(valid[None, :], _products(q, k, PRECISION), float("-inf"))
    powers = tl.exp2((scores - tl.max(scores, 1)[:, None]) * (scale * _LOG2_E))
    return powers * (1.0 / tl.sum(powers, 1))[:, None]


@triton.jit
def _store_mixed(pointers, columns, weights, parts, factor, mask, PRECISION: tl.constexpr):
    """Stores weights · parts · factor, one part after the other."""
    for c in tl.static_range(len(columns)):
        mixed = tl.dot(weights, parts[c], input_precision=PRECISION) * factor
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
    H: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b, s, h = _locate(tl.program_id(0), S, H)
    t = tl.arange(0, _TILE)
    valid = t < T
    columns = _columns(MAIN, REST)
    pointers = qkv + (b * stride_b + s * stride_s + h * stride_h) + t.to(tl.int64) * stride_t
    channel = tl.cast(stride_c, tl.int64)
    q = _load_frames(pointers, columns, stride_d, valid)
    k = _load_frames(pointers + channel, columns, stride_d, valid)
    v = _load_frames(pointers + 2 * channel, columns, stride_d, valid)
    D: tl.constexpr = MAIN + REST
    weights = _tile_weights(q, k, valid, D**-0.5, PRECISION).to(qkv.dtype.element_ty)
    results = out + (b * T * out_t + (s * H + h) * D) + t.to(tl.int64) * out_t
    _store_mixed(results, columns, weights, v, 1.0, valid, PRECISION)


@triton.jit
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
    H: tl.constexpr,
    MAIN: tl.constexpr,
    REST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b, s, h = _locate(tl.program_id(0), S, H)
    t = tl.arange(0, _TILE)
    valid = t < T
    columns = _columns(MAIN, REST)
    pointers = qkv + (b * stride_b + s * stride_s + h * stride_h) + t.to(tl.int64) * stride_t
    grads = grad + (b * grad_b + s * grad_s + h * grad_h) + t.to(tl.int64) * grad_t
    channel = tl.cast(stride_c, tl.int64)
    q = _load_frames(pointers, columns, stride_d, valid)
    k = _load_frames(pointers + channel, columns, stride_d, valid)
    v = _load_frames(pointers + 2 * channel, columns, stride_d, valid)
    do = _load_frames(grads, columns, grad_d, valid)
    D: tl.constexpr = MAIN + REST
    scale: tl.constexpr = D**-0.5
    # A frame and a padded one can give 0 times infinity, which is NaN and must not enter a sum.
    pairs = valid[:, None] & valid[None, :]
    p = tl.where(pairs, _tile_weights(q, k, valid, scale, PRECISION), 0.0)
    dp = tl.where(pairs, _products(do, v, PRECISION), 0.0)
    delta = tl.sum(p * dp, 1)
    # Rounded before it is scaled: scaled first, more small values would underflow in float16.
    ds = (p * (dp - delta[:, None])).to(qkv.dtype.element_ty)
    width: tl.constexpr = H * D
    results = dqkv + (b * T * dqkv_t + s * (3 * width) + h * D) + t.to(tl.int64) * dqkv_t
    _store_mixed(results, columns, ds, k, scale, valid, PRECISION)
    _store_mixed(results + width, columns, tl.trans(ds), q, scale, valid, PRECISION)
    weights = tl.trans(p.to(qkv.dtype.element_ty))
    _store_mixed(results + 2 * width, columns, weights, do, 1.0, valid, PRECISION)


def _precision(qkv: Tensor) -> str:
    """Whether float32 products may be rounded to TF32; it does not affect other dtypes."""
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if tf32 and qkv.dtype == torch.float32 else "ieee"


def _choose_kernel(
    rows: Any, tile: Any, name: str, qkv: Tensor
) -> tuple[Any, tuple[int], int, dict]:
    """The one of two kernels that takes ``qkv``, its grid, its first size (items or T) and its
    constants."""
    B, T, S, _, H, d = qkv.shape
    items = B * S * H
    variant = d, qkv.element_size()
    if T <= ROW_FRAMES:
        chosen = config(f"temporal_attention_rows_{name}", variant, arch_of(qkv))
        constants = {"T": T, "H": H, "D": d, "PADDED_D": triton.next_power_of_2(d)}
        grid = (triton.cdiv(items, chosen.blocks["ROWS"]),)
        return rows, grid, items, {"config": chosen, **constants}
    chosen = config(f"temporal_attention_tile_{name}", variant, arch_of(qkv))
    main = 1 << (d.bit_length() - 1)
    constants = {"H": H, "MAIN": main, "REST": d - main, "PRECISION": _precision(qkv)}
    return tile, (items,), T, {"config": chosen, **constants}


def forward(qkv: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v along T.

    Args:
        qkv: [B, T, S, 3, H, d], float32, float16 or bfloat16, of any strides; T 2 to 16, d 32,
            64, 80 or 128.

    Returns:
        [B, T, S, H, d], contiguous, in qkv's dtype.
    """
    B, T, S, _, H, d = qkv.shape
    out = torch.empty((B, T, S, H, d), dtype=qkv.dtype, device=qkv.device)
    kernel, grid, size, constants = _choose_kernel(
        temporal_attention_rows_forward, temporal_attention_tile_forward, "forward", qkv
    )
    launch(kernel, grid, qkv, out, size, S, *qkv.stride(), out.stride(1), **constants)
    return out


def backward(grad: Tensor, qkv: Tensor) -> Tensor:
    """The gradient of :func:`forward`.

    Args:
        grad: [B, T, S, H, d], the gradient of the result, in qkv's dtype, of any strides.
        qkv: as :func:`forward` got it.

    Returns:
        [B, T, S, 3, H, d], contiguous, in qkv's dtype.
    """
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    kernel, grid, size, constants = _choose_kernel(
        temporal_attention_rows_backward, temporal_attention_tile_backward, "backward", qkv
    )
    strides = *grad.stride(), *qkv.stride(), dqkv.stride(1)
    launch(kernel, grid, grad, qkv, dqkv, size, qkv.shape[2], *strides, **constants)
    return dqkv
