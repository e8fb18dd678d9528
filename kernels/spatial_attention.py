"""Attention over the S tokens of a frame. It reads the packed QKV projection where it lies.

An item is one head of one frame of one clip. Matrix products take their operands in the dtype in
which they are stored and add up in float32. The softmax is computed in base 2, in float32.

- A head's d channels are split into two tiles: LOW, a power of two up to 64, and HIGH, the rest
  (80 is 64 + 16). So a head need not be padded to the next power of two.
- Forward: each program takes a block of queries and passes over the keys once (online softmax).
  Keys come in one tail of 16, 32, ... keys, then full blocks, so that 207 keys cost as much as 208.
  Programs of the same item are neighbours, so all but the first read K and V from the L2 cache.
- Backward of short sequences (:data:`WHOLE`): each program takes one item, holds all of its keys
  and passes over its queries once. Whole columns of Pᵀ and dPᵀ are on the chip, so that
  δ = Σ P∘dP needs neither ``out`` nor another kernel: 4 tensors are read, 3 written, and there are
  5 products.
- Backward of longer sequences: one kernel for dQ and δ = Σ out∘dO, then one for dK and dV, with 7
  products in all.

Sums run in a fixed order, so the bits are the same every time. The equations are those of
FlashAttention-2 (Dao, 2023, arXiv:2307.08691, algorithms 1 and 2).

Options are compiled in, and what is not given is no argument of the compiled kernel, so that
without options the code is what it would be if there were none: ``key`` and ``value``, where q, k
and v are three tensors of any strides; ``lengths``, how many of a frame's tokens count; ``scale``;
and ``grad_lse``, the gradient of the log-sum-exp. Padding is never read: loops end with the last
token that counts, and rows of the result behind it are stored as 0.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmpose.kernels import configs
from cmpose.kernels.attention import count_of, given_scale, operands
from cmpose.kernels.launch import arch_of, launch

LOG2_E = tl.constexpr(math.log2(math.e))
LOG_2 = tl.constexpr(math.log(2))

SIZES = ["T", "S", "H", "blocks"]
"""Parameters on whose values Triton must not specialise: one compiled kernel serves all sizes.

(Of each stride it still distinguishes three kinds: 1, multiples of 16, and all others.)
"""


@triton.jit
def _load(
    pointer,
    rows,
    count,
    row_stride,
    column_stride,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    """Loads two tiles, [rows, LOW] and [rows, HIGH], with 0 outside of the matrix.

    If HIGH is 0 the second is the first again; nothing uses it.
    """
    offsets = rows.to(tl.int64)[:, None] * row_stride
    mask = (rows < count)[:, None]
    columns = tl.arange(0, LOW).to(tl.int64)[None, :]
    low = tl.load(pointer + (offsets + columns * column_stride), mask=mask, other=0.0)
    high = low
    if HIGH > 0:
        columns = LOW + tl.arange(0, HIGH).to(tl.int64)[None, :]
        if LOW + HIGH > D:
            mask = mask & (columns < D)
        high = tl.load(pointer + (offsets + columns * column_stride), mask=mask, other=0.0)
    return low, high


@triton.jit
def _store(
    pointer,
    low,
    high,
    rows,
    count,
    row_stride,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    """Stores the two tiles of a matrix whose columns are adjacent, in the rows below ``count``."""
    offsets = rows.to(tl.int64)[:, None] * row_stride
    mask = (rows < count)[:, None]
    dtype = pointer.dtype.element_ty
    tl.store(pointer + (offsets + tl.arange(0, LOW)[None, :]), low.to(dtype), mask=mask)
    if HIGH > 0:
        columns = LOW + tl.arange(0, HIGH)[None, :]
        if LOW + HIGH > D:
            mask = mask & (columns < D)
        tl.store(pointer + (offsets + columns), high.to(dtype), mask=mask)


@triton.jit
def _clear(
    pointer,
    rows,
    count,
    S,
    row_stride,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
):
    """Stores 0 in those rows of a matrix of S rows that do not count."""
    zeros = tl.zeros([rows.shape[0], LOW], tl.float32)
    zeros_high = zeros
    if HIGH > 0:
        zeros_high = tl.zeros([rows.shape[0], HIGH], tl.float32)
    rows = tl.where(rows < count, S, rows)
    _store(pointer, zeros, zeros_high, rows, S, row_stride, D, LOW, HIGH)


@triton.jit
def _inner(a, a_high, b, b_high, HIGH: tl.constexpr, PRECISION: tl.constexpr):
    """a bᵀ: the inner products of rows, over all channels."""
    product = tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if HIGH > 0:
        product = tl.dot(a_high, tl.trans(b_high), product, input_precision=PRECISION)
    return product


@triton.jit
def _add_mixed(total, total_high, weights, x, x_high, HIGH: tl.constexpr, PRECISION: tl.constexpr):
    """total + weights x: sums of rows."""
    weights = weights.to(x.dtype)
    total = tl.dot(weights, x, total, input_precision=PRECISION)
    if HIGH > 0:
        total_high = tl.dot(weights, x_high, total_high, input_precision=PRECISION)
    return total, total_high


@triton.jit
def _item(pid, T, H):
    """From an item's number: clip, frame, head, and the frame's number over all clips; int64."""
    head = (pid % H).to(tl.int64)
    row = pid // H
    return (row // T).to(tl.int64), (row % T).to(tl.int64), head, row.to(tl.int64)


@triton.jit
def _matrix(tensor, clip, frame, head, stride_b, stride_t, stride_h):
    """Where an item's matrix begins."""
    return tensor + clip * stride_b + frame * stride_t + head * stride_h


@triton.jit
def _not_negative(stride_b, stride_t, stride_h):
    """Says so of strides."""
    tl.assume(stride_b >= 0)
    tl.assume(stride_t >= 0)
    tl.assume(stride_h >= 0)


@triton.jit
def _attend(
    q,
    q_high,
    k_pointer,
    v_pointer,
    count,
    top,
    norm,
    out,
    out_high,
    key_s,
    key_d,
    value_s,
    value_d,
    factor,
    NEGATIVE: tl.constexpr,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PRECISION: tl.constexpr,
    KEYS: tl.constexpr,
    MASK: tl.constexpr,
):
    """Takes KEYS more keys, the first ``count`` of which exist, into the online softmax.

    The logits are in base 2: q kᵀ times ``factor``, which may be NEGATIVE.
    """
    keys = tl.arange(0, KEYS)
    k, k_high = _load(k_pointer, keys, count, key_s, key_d, D, LOW, HIGH)
    v, v_high = _load(v_pointer, keys, count, value_s, value_d, D, LOW, HIGH)
    logits = _inner(q, q_high, k, k_high, HIGH, PRECISION)
    if MASK:
        none = float("inf") if NEGATIVE else float("-inf")
        logits = tl.where((keys < count)[None, :], logits, none)
    largest = tl.min(logits, 1) if NEGATIVE else tl.max(logits, 1)
    new_top = tl.maximum(top, largest * factor)
    weights = tl.exp2(logits * factor - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    norm = norm * shrink + tl.sum(weights, 1)
    out = out * shrink[:, None]
    if HIGH > 0:
        out_high = out_high * shrink[:, None]
    out, out_high = _add_mixed(out, out_high, weights, v, v_high, HIGH, PRECISION)
    return new_top, norm, out, out_high


@triton.jit(do_not_specialize=SIZES)
# Long: 34 of its lines are parameters.
def spatial_attention_forward(
    qkv,
    out,
    lse,
    T,
    S,
    H,
    blocks,
    stride_b,
    stride_t,
    stride_s,
    stride_p,
    stride_h,
    stride_d,
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
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    TAIL: tl.constexpr,
    NEGATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out and lse of BLOCK_M queries of an item."""
    pid = tl.program_id(0)
    if lengths is None:
        clip, frame, head, number = _item(pid // blocks, T, H)
        start = (pid % blocks) * BLOCK_M
    else:  # divisions without a sign are shorter, which makes up for what lengths add
        pid, blocks = pid.to(tl.uint32), blocks.to(tl.uint32)
        clip, frame, head, number = _item(pid // blocks, T.to(tl.uint32), H.to(tl.uint32))
        start = ((pid % blocks) * BLOCK_M).to(tl.int32)
    q_pointer = _matrix(qkv, clip, frame, head, stride_b, stride_t, stride_h)
    if key_s is None:
        key_b, key_t, key_s, key_h, key_d = stride_b, stride_t, stride_s, stride_h, stride_d
        value_b, value_t, value_s, value_h, value_d = key_b, key_t, key_s, key_h, key_d
    else:
        # Neither factor of place · stride is negative: one 64-bit product, not three instructions.
        tl.assume(key_s >= 0)
        tl.assume(value_s >= 0)
        if lengths is not None:  # without, an item's numbers have a sign
            _not_negative(key_b, key_t, key_h)
            _not_negative(value_b, value_t, value_h)
    if key is None:
        k_pointer = q_pointer + stride_p
        v_pointer = k_pointer + stride_p
    else:
        k_pointer = _matrix(key, clip, frame, head, key_b, key_t, key_h)
        v_pointer = _matrix(value, clip, frame, head, value_b, value_t, value_h)
    rows = start + tl.arange(0, BLOCK_M)
    count = S
    if lengths is not None:
        count = count_of(lengths, number, S)
        if tl.minimum(start + BLOCK_M, S) > count:  # here, where few registers are in use
            _clear(out + (number * S * H + head) * D, rows, count, S, H * D, D, LOW, HIGH)
            nothing = tl.full([BLOCK_M], float("-inf"), tl.float32)
            padding = tl.where(rows < count, S, rows)
            tl.store(lse + (number * H + head) * S + padding, nothing, mask=padding < S)

    q, q_high = _load(q_pointer, rows, count, stride_s, stride_d, D, LOW, HIGH)
    factor = LOG2_E * D**-0.5 if scale is None else scale
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    norm = tl.zeros([BLOCK_M], tl.float32)
    sums = tl.zeros([BLOCK_M, LOW], tl.float32)
    sums_high = sums
    if HIGH > 0:
        sums_high = tl.zeros([BLOCK_M, HIGH], tl.float32)
    k_step = tl.full((), BLOCK_N, tl.int64) * key_s
    v_step = tl.full((), BLOCK_N, tl.int64) * value_s
    # First: behind the loop, the zeros of a loop without rounds would meet its last product in
    # the accumulator, and ptxas then makes each wgmma wait for the one before (C7515).
    end = count
    if lengths is not None:
        # The last 1 to TAIL keys; then, of a multiple of TAIL, what is no multiple of BLOCK_N.
        end = tl.maximum(count - 1, 0) // TAIL * TAIL
        k_tail = k_pointer + end.to(tl.int64) * key_s
        v_tail = v_pointer + end.to(tl.int64) * value_s
        top, norm, sums, sums_high = _attend(
            q, q_high, k_tail, v_tail, count - end, top, norm, sums, sums_high, key_s, key_d,
            value_s, value_d, factor, NEGATIVE, D, LOW, HIGH, PRECISION, TAIL, True,
        )  # fmt: skip
        for doubled in tl.static_range(2):  # a BLOCK_N of 64 is 4 of the smallest tail
            if TAIL << doubled < BLOCK_N:  # noqa: SIM102, as this is known when it is compiled
                if end // (TAIL << doubled) % 2 > 0:
                    k_tail -= tl.full((), TAIL << doubled, tl.int64) * key_s
                    v_tail -= tl.full((), TAIL << doubled, tl.int64) * value_s
                    top, norm, sums, sums_high = _attend(
                        q, q_high, k_tail, v_tail, TAIL << doubled, top, norm, sums, sums_high,
                        key_s, key_d, value_s, value_d, factor, NEGATIVE, D, LOW, HIGH, PRECISION,
                        TAIL << doubled, False,
                    )  # fmt: skip
    elif TAIL > 0:
        k_tail = k_pointer + k_step * (count // BLOCK_N)
        v_tail = v_pointer + v_step * (count // BLOCK_N)
        top, norm, sums, sums_high = _attend(
            q, q_high, k_tail, v_tail, count % BLOCK_N, top, norm, sums, sums_high, key_s, key_d,
            value_s, value_d, factor, NEGATIVE, D, LOW, HIGH, PRECISION, TAIL, True,
        )  # fmt: skip
    for _ in range(end // BLOCK_N):
        top, norm, sums, sums_high = _attend(
            q, q_high, k_pointer, v_pointer, BLOCK_N, top, norm, sums, sums_high, key_s, key_d,
            value_s, value_d, factor, NEGATIVE, D, LOW, HIGH, PRECISION, BLOCK_N, False,
        )  # fmt: skip
        k_pointer += k_step
        v_pointer += v_step

    inverse = (1.0 / norm)[:, None]
    if HIGH > 0:
        sums_high = sums_high * inverse
    out += (number * S * H + head) * D
    _store(out, sums * inverse, sums_high, rows, count, H * D, D, LOW, HIGH)
    lse += (number * H + head) * S + rows
    total = (top + tl.log2(norm)) * LOG_2
    tl.store(lse, total, mask=rows < count)


@triton.jit
def _weights(logits, norm, scale, D: tl.constexpr):
    """P = exp2(log2 e · scale · logits - norm), where ``norm`` is known.

    It is at most 1, and NaN where an input is NaN.

    Logits of keys that exist are at most ``norm`` up to rounding. The limit of 1 is for the zeros
    that are loaded in place of keys beyond the last: it keeps their P finite, so that its product
    with a zero of K or V is 0 and not NaN.
    """
    if scale is None:
        exponent = logits * (LOG2_E * D**-0.5) - norm
    else:  # a factor that is not finite would make NaN of a logit of 0
        exponent = logits * tl.minimum(tl.maximum(LOG2_E * scale, -3e38), 3e38) - norm
    return tl.exp2(tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL))


@triton.jit(do_not_specialize=SIZES)
# Long: 41 of its lines are parameters.
def spatial_attention_backward_dq(
    grad,
    qkv,
    out,
    lse,
    delta,
    dqkv,
    T,
    S,
    H,
    blocks,
    grad_b,
    grad_t,
    grad_s,
    grad_h,
    grad_d,
    stride_b,
    stride_t,
    stride_s,
    stride_p,
    stride_h,
    stride_d,
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
    grad_lse,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dQ and δ of BLOCK_M queries of an item; of δ the gradient of lse is taken away."""
    factor = D**-0.5 if scale is None else scale
    pid = tl.program_id(0)
    clip, frame, head, number = _item(pid // blocks, T, H)
    start = (pid % blocks) * BLOCK_M
    q_pointer = _matrix(qkv, clip, frame, head, stride_b, stride_t, stride_h)
    if key_s is None:
        key_b, key_t, key_s, key_h, key_d = stride_b, stride_t, stride_s, stride_h, stride_d
        value_b, value_t, value_s, value_h, value_d = key_b, key_t, key_s, key_h, key_d
    if key is None:
        k_pointer = q_pointer + stride_p
        v_pointer = k_pointer + stride_p
    else:
        k_pointer = _matrix(key, clip, frame, head, key_b, key_t, key_h)
        v_pointer = _matrix(value, clip, frame, head, value_b, value_t, value_h)
    grad = _matrix(grad, clip, frame, head, grad_b, grad_t, grad_h)
    out += (number * S * H + head) * D
    rows = start + tl.arange(0, BLOCK_M)
    count = S
    if lengths is not None:
        count = count_of(lengths, number, S)
        count = tl.where(start < count, count, 0)  # queries that are padding need no keys

    q, q_high = _load(q_pointer, rows, count, stride_s, stride_d, D, LOW, HIGH)
    do, do_high = _load(grad, rows, count, grad_s, grad_d, D, LOW, HIGH)
    o, o_high = _load(out, rows, count, H * D, 1, D, LOW, HIGH)
    row_delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if HIGH > 0:
        row_delta += tl.sum(o_high.to(tl.float32) * do_high.to(tl.float32), 1)
    item_rows = (number * H + head) * S + rows
    if grad_lse is not None:
        row_delta -= tl.load(grad_lse + item_rows, mask=rows < count, other=0.0)
    tl.store(delta + item_rows, row_delta, mask=rows < S)
    norm = tl.load(lse + item_rows, mask=rows < count, other=float("inf")) * LOG2_E

    dq = tl.zeros([BLOCK_M, LOW], tl.float32)
    dq_high = dq
    if HIGH > 0:
        dq_high = tl.zeros([BLOCK_M, HIGH], tl.float32)
    keys = tl.arange(0, BLOCK_N)
    k_step = tl.full((), BLOCK_N, tl.int64) * key_s
    v_step = tl.full((), BLOCK_N, tl.int64) * value_s
    for first in tl.range(0, count, BLOCK_N, disable_licm=True):
        k, k_high = _load(k_pointer, keys, count - first, key_s, key_d, D, LOW, HIGH)
        v, v_high = _load(v_pointer, keys, count - first, value_s, value_d, D, LOW, HIGH)
        p = _weights(_inner(q, q_high, k, k_high, HIGH, PRECISION), norm[:, None], scale, D)
        dp = _inner(do, do_high, v, v_high, HIGH, PRECISION)
        ds = p * (dp - row_delta[:, None])
        dq, dq_high = _add_mixed(dq, dq_high, ds, k, k_high, HIGH, PRECISION)
        k_pointer += k_step
        v_pointer += v_step

    if HIGH > 0:
        dq_high = dq_high * factor
    dqkv += (number * S * 3 * H + head) * D if key is None else (number * S * H + head) * D
    dq = dq * factor
    row_stride = 3 * H * D if key is None else H * D
    if lengths is not None:
        padding = tl.minimum(start + BLOCK_M, S) > count
        if padding:
            _clear(dqkv, rows, count, S, row_stride, D, LOW, HIGH)
    _store(dqkv, dq, dq_high, rows, count, row_stride, D, LOW, HIGH)


@triton.jit
def _store_dq(
    pointer,
    ds,
    k,
    k_high,
    rows,
    start,
    end,
    count,
    row_stride,
    factor,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PRECISION: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
):
    """Stores dQ of ``rows``, computed from dSᵀ [keys, rows] of all keys.

    Triton gives all matrix products that depend on each other within one basic block the same
    distribution over the warps; sharing a computed address is dependence enough. The product here
    has another shape than those of the loop around it: with their distribution several warps would
    compute the same part of it. ``if start < end`` is always true, but puts it into a basic block
    of its own. ``row_stride`` is computed by the caller, so that the stores of the two tiles do not
    share a computation either.
    """
    if start < end:
        if CHANNELS_FIRST:
            dq = tl.trans(tl.dot(tl.trans(k), ds, input_precision=PRECISION)) * factor
        else:
            dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION) * factor
        dq_high = dq
        if HIGH > 0:
            dq_high = tl.dot(tl.trans(ds), k_high, input_precision=PRECISION) * factor
        _store(pointer, dq, dq_high, rows, count, row_stride, D, LOW, HIGH)


@triton.jit(do_not_specialize=SIZES)
# Long: 45 of its lines are parameters, and each pointer and tile of the loop is named once.
def spatial_attention_backward_dkv(
    grad,
    qkv,
    lse,
    delta,
    dqkv,
    T,
    S,
    H,
    blocks,
    grad_b,
    grad_t,
    grad_s,
    grad_h,
    grad_d,
    stride_b,
    stride_t,
    stride_s,
    stride_p,
    stride_h,
    stride_d,
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
    grad_lse,
    dkey,
    dvalue,
    D: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WHOLE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """dK and dV of BLOCK_N keys of an item; if these are all its keys (WHOLE), dQ as well.

    All matrices are computed as [keys, queries], so that Pᵀ and dSᵀ can be left operands directly.
    GROUPS says whether groups of warps multiply together (:data:`WGMMA`).
    """
    factor = D**-0.5 if scale is None else scale
    pid = tl.program_id(0)
    clip, frame, head, number = _item(pid // blocks, T, H)
    q_pointer = _matrix(qkv, clip, frame, head, stride_b, stride_t, stride_h)
    if key_s is None:
        key_b, key_t, key_s, key_h, key_d = stride_b, stride_t, stride_s, stride_h, stride_d
        value_b, value_t, value_s, value_h, value_d = key_b, key_t, key_s, key_h, key_d
    if key is None:
        k_pointer = q_pointer + stride_p
    else:
        k_pointer = _matrix(key, clip, frame, head, key_b, key_t, key_h)
    grad = _matrix(grad, clip, frame, head, grad_b, grad_t, grad_h)
    item_rows = (number * H + head) * S
    row_stride = tl.full((), 3 * D if key is None else D, tl.int64) * H
    dqkv += number * S * row_stride + head * D
    first = (pid % blocks) * BLOCK_N
    count = S
    end = S
    if lengths is not None:
        count = count_of(lengths, number, S)
        end = tl.where(first < count, count, 0)  # keys that are padding need no queries
        if WHOLE:
            end = tl.maximum(count, 1)

    keys = first + tl.arange(0, BLOCK_N)
    k, k_high = _load(k_pointer, keys, count, key_s, key_d, D, LOW, HIGH)
    if key is None:
        v_pointer = k_pointer + stride_p
    else:
        v_pointer = _matrix(value, clip, frame, head, value_b, value_t, value_h)
    v, v_high = _load(v_pointer, keys, count, value_s, value_d, D, LOW, HIGH)
    dk = tl.zeros([BLOCK_N, LOW], tl.float32)
    dv = tl.zeros([BLOCK_N, LOW], tl.float32)
    dk_high = dk
    dv_high = dv
    if HIGH > 0:
        dk_high = tl.zeros([BLOCK_N, HIGH], tl.float32)
        dv_high = tl.zeros([BLOCK_N, HIGH], tl.float32)

    if WHOLE and GROUPS:
        # A loop without rounds would bring zeros to where its products' accumulators are (C7515).
        tl.assume(end > 0)
    for start in tl.range(0, end, BLOCK_M, disable_licm=True):
        rows = start + tl.arange(0, BLOCK_M)
        q, q_high = _load(q_pointer, rows, count, stride_s, stride_d, D, LOW, HIGH)
        norm = tl.load(lse + item_rows + rows, mask=rows < count, other=float("inf")) * LOG2_E
        p = _weights(_inner(k, k_high, q, q_high, HIGH, PRECISION), norm[None, :], scale, D)
        do, do_high = _load(grad, rows, count, grad_s, grad_d, D, LOW, HIGH)
        dv, dv_high = _add_mixed(dv, dv_high, p, do, do_high, HIGH, PRECISION)
        dp = _inner(v, v_high, do, do_high, HIGH, PRECISION)
        if WHOLE:
            column_delta = tl.sum(p * dp, 0)
            if grad_lse is not None:
                at = grad_lse + item_rows + rows
                column_delta -= tl.load(at, mask=rows < count, other=0.0)
        else:
            column_delta = tl.load(delta + item_rows + rows, mask=rows < count, other=0.0)
        ds = (p * (dp - column_delta[None, :])).to(q.dtype)
        dk, dk_high = _add_mixed(dk, dk_high, ds, q, q_high, HIGH, PRECISION)
        if WHOLE:
            _store_dq(
                dqkv, ds, k, k_high, rows, start, end, count, row_stride, factor, D, LOW, HIGH,
                PRECISION, GROUPS and LOW == 64,
            )  # fmt: skip

    if HIGH > 0:
        dk_high = dk_high * factor
    if key is None:
        dkey = dqkv + (first * row_stride + H * D)
    else:
        dkey += number * S * row_stride + head * D + first * row_stride
    keys = tl.arange(0, BLOCK_N)
    _store(dkey, dk * factor, dk_high, keys, count - first, row_stride, D, LOW, HIGH)
    if key is None:
        dvalue = dkey + H * D
    else:
        dvalue += number * S * row_stride + head * D + first * row_stride
    _store(dvalue, dv, dv_high, keys, count - first, row_stride, D, LOW, HIGH)
    if lengths is not None:
        if WHOLE:
            for start in tl.range(count, S, BLOCK_M):
                _clear(dqkv, start + tl.arange(0, BLOCK_M), 0, S, row_stride, D, LOW, HIGH)
        if tl.minimum(first + BLOCK_N, S) > count:
            _clear(dkey, keys, count - first, S - first, row_stride, D, LOW, HIGH)
            _clear(dvalue, keys, count - first, S - first, row_stride, D, LOW, HIGH)


WHOLE = ((64, 64), (64, 128), (64, 256), (80, 256), (128, 128))
"""(head dimension, tokens): the largest items that one program can hold, in 16-bit dtypes."""

WGMMA = range(90, 120)
"""Cards whose tensor cores (wgmma) multiply 64 rows or more at a time. There dQ of fewer queries
is computed transposed, with the channels as rows."""


def _width(d: int) -> int:
    """The head dimension under which the table of configurations lists ``d``."""
    return 64 if d <= 64 else 128


def _whole(d: int, S: int, dtype: torch.dtype) -> tuple[int, int] | None:
    """The smallest of :data:`WHOLE` that holds d channels and S tokens, if any."""
    if dtype.itemsize > 2:
        return None
    return next(((width, keys) for width, keys in WHOLE if d <= width and keys >= S), None)


def _constants(qkv: Tensor) -> dict[str, int | str]:
    """The kernels' common ``tl.constexpr`` parameters."""
    d = qkv.shape[-1]
    low = min(64, 1 << (d.bit_length() - 1))
    high = max(16, triton.next_power_of_2(d - low)) if d > low else 0
    # Products of other dtypes are not affected by this setting.
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32" and qkv.dtype == torch.float32
    return {"D": d, "LOW": low, "HIGH": high, "PRECISION": "tf32" if tf32 else "ieee"}


def _operands(
    qkv: Tensor, key: Tensor | None, value: Tensor | None
) -> tuple[tuple[int | None, ...], tuple[Any, ...]]:
    """:func:`operands`, but None in place of strides that are those of ``qkv``."""
    if key is None or value is None or not qkv.stride() == key.stride() == value.stride():
        return operands(qkv, key, value)
    same = (None,) * 5
    return operands(qkv, key, value)[0], (key, *same, value, *same)


# Many parameters: those of the registered op.
def forward(
    qkv: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v along S.

    Args:
        qkv: [B, T, S, 3, H, d], float32, float16 or bfloat16, of any strides; d a multiple of 16
            up to 128. Or q, [B, T, S, H, d], with ``key`` and ``value`` alike.
        lengths: int64 [B, T], how many of a frame's tokens count; the others give 0 and are not
            read.
        scale: of the logits; None is 1/√d.

    Returns:
        out: [B, T, S, H, d], contiguous, in qkv's dtype.
        lse: [B, T, H, S], contiguous, float32: log Σ exp of a query's scaled logits; −inf where
            the query is padding.
    """
    B, T, S, H, d = *qkv.shape[:3], *qkv.shape[-2:]
    out = torch.empty((B, T, S, H, d), dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty((B, T, H, S), dtype=torch.float32, device=qkv.device)
    variant = _width(d), qkv.element_size()
    config = configs.config("spatial_attention_forward", variant, arch_of(qkv))
    blocks = triton.cdiv(S, config.blocks["BLOCK_M"])
    most = config.blocks["BLOCK_N"]  # keys at a time
    tail = max(16, triton.next_power_of_2(S % most)) if S % most else most * (lengths is not None)
    strides, others = _operands(qkv, key, value)
    lengths = None if lengths is None else lengths.contiguous()
    factor = given_scale(scale, qkv)
    if factor is not None:  # finite and not 0, so that its product with infinity is no NaN
        factor = math.copysign(min(max(abs(factor) * LOG2_E.value, 1.2e-38), 3e38), factor)
    options = *others, lengths, factor
    launch(
        spatial_attention_forward,
        (B * T * H * blocks,),
        *(qkv, out, lse, T, S, H, blocks, *strides, *options),
        config=config,
        **_constants(qkv),
        TAIL=tail,
        NEGATIVE=scale is not None and scale < 0,
    )
    return out, lse


# Many parameters: those of the registered op.
def backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float | None = None,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The gradients of :func:`forward`.

    Args:
        grad: [B, T, S, H, d], the gradient of out, in qkv's dtype, of any strides. Padding in it
            is not read.
        qkv, key, value, lengths, scale: as :func:`forward` got them.
        out: what :func:`forward` returned, contiguous; short sequences do not read it.
        lse: what :func:`forward` returned, contiguous.
        grad_lse: [B, T, H, S], float32, the gradient of lse; None is 0. Padding in it is not read.

    Returns:
        The gradient to qkv; or those to q, ``key`` and ``value``. Contiguous, in qkv's dtype.
    """
    B, T, S, H, d = *qkv.shape[:3], *qkv.shape[-2:]
    given = (qkv,) if key is None or value is None else (qkv, key, value)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in given]
    dqkv, others = grads[0], grads[1:] or (None, None)
    constants = _constants(qkv)
    strides, separate = _operands(qkv, key, value)
    strides = *grad.stride(), *strides
    lengths = None if lengths is None else lengths.contiguous()
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    options = *separate, lengths, given_scale(scale, qkv), grad_lse
    arch = arch_of(qkv)
    whole = _whole(d, S, qkv.dtype)
    # Of more than 64 channels, of which all 255 registers are in use, others than lengths spill.
    if whole and (d <= 64 or (*separate, given_scale(scale, qkv), grad_lse) == (None,) * 14):
        launch(
            spatial_attention_backward_dkv,
            (B * T * H,),
            *(grad, qkv, lse, None, dqkv, T, S, H, 1, *strides, *options, *others),
            config=configs.config("spatial_attention_backward_whole", whole, arch),
            **constants,
            BLOCK_N=whole[1],
            WHOLE=True,
            GROUPS=arch in WGMMA,
        )
        return tuple(grads)
    delta = torch.empty_like(lse)
    variant = _width(d), qkv.element_size()
    config = configs.config("spatial_attention_backward_dq", variant, arch)
    blocks = triton.cdiv(S, config.blocks["BLOCK_M"])
    launch(
        spatial_attention_backward_dq,
        (B * T * H * blocks,),
        *(grad, qkv, out, lse, delta, dqkv, T, S, H, blocks, *strides, *options),
        config=config,
        **constants,
    )
    config = configs.config("spatial_attention_backward_dkv", variant, arch)
    blocks = triton.cdiv(S, config.blocks["BLOCK_N"])
    launch(
        spatial_attention_backward_dkv,
        (B * T * H * blocks,),
        *(grad, qkv, lse, delta, dqkv, T, S, H, blocks, *strides, *options[:-1], None, *others),
        config=config,
        **constants,
        WHOLE=False,
        GROUPS=arch in WGMMA,
    )
    return tuple(grads)
