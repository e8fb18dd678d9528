"""Mean squared error over the corrupted tokens, and its gradients, in one pass: Eqs. 2 and 3.

There are three launches. The first counts the corrupted tokens (it is left out if a normalizer is
given). In the second, every program takes a tile of tokens × channels, stores one partial sum and
writes the tile of the gradients. The third adds up the partial sums. A token that is not corrupted
is not read, and its gradient is stored as zero. Bytes: two rows are read for each corrupted token,
and one row is written for each token and gradient.

If every program counted by itself, the first launch (about 1.3 µs in a CUDA graph) would be saved,
but every program would read all flags. That pays only if programs are few and large, and such
programs leave the card half idle at the end, which costs more.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmpose.kernels.configs import config
from cmpose.kernels.launch import arch_of, launch
from cmpose.kernels.reduce import (
    block_count,
    block_sums,
    divide_by_count,
    finish,
    gradient_dtype,
    numbers,
)


@triton.jit
def forward_kernel(
    pred_ptr,
    target_ptr,
    corrupted_ptr,
    count_ptr,
    partial_ptr,
    gradient_pred_ptr,
    gradient_target_ptr,
    frames,
    width,
    counts,
    channels,
    pred_stride_b,
    pred_stride_t,
    pred_stride_n,
    pred_stride_d,
    target_stride_b,
    target_stride_t,
    target_stride_n,
    target_stride_d,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_COUNT: tl.constexpr,
):
    program = tl.program_id(0)
    # Chunks of a row are neighbours. A tile lies within one frame, so a program divides once.
    chunks, blocks = tl.cdiv(DIM, BLOCK_D), tl.cdiv(width, ROWS)
    block = program // chunks
    frame = block // blocks
    b, t = (frame // frames).to(tl.int64), (frame % frames).to(tl.int64)
    n = block % blocks * ROWS + tl.arange(0, ROWS)
    column = program % chunks * BLOCK_D + tl.arange(0, BLOCK_D)
    in_row, in_column = n < width, column < DIM
    n, d = n.to(tl.int64), column.to(tl.int64)[None, :]
    row = frame.to(tl.int64) * width + n
    corrupted = tl.load(corrupted_ptr + row, mask=in_row, other=0) != 0
    if gradient_pred_ptr is not None or gradient_target_ptr is not None:
        two = tl.full((), 2.0, tl.float32)
        scale = divide_by_count(two / channels, count_ptr, counts, BLOCK_COUNT)

    inside = corrupted[:, None] & in_column[None, :]
    at = b * pred_stride_b + t * pred_stride_t + n * pred_stride_n
    pred = tl.load(pred_ptr + at[:, None] + d * pred_stride_d, mask=inside, other=0.0)
    at = b * target_stride_b + t * target_stride_t + n * target_stride_n
    target = tl.load(target_ptr + at[:, None] + d * target_stride_d, mask=inside, other=0.0)
    difference = pred.to(tl.float32) - target.to(tl.float32)

    if gradient_pred_ptr is not None or gradient_target_ptr is not None:
        # A token that is not corrupted has gradient 0 even where the scale is not finite.
        gradient = difference * tl.where(corrupted, scale, 0.0)[:, None]
        at = row[:, None] * DIM + d
        stored = in_row[:, None] & in_column[None, :]
        if gradient_pred_ptr is not None:
            value = gradient.to(gradient_pred_ptr.dtype.element_ty)
            tl.store(gradient_pred_ptr + at, value, mask=stored)
        if gradient_target_ptr is not None:
            value = (-gradient).to(gradient_target_ptr.dtype.element_ty)
            tl.store(gradient_target_ptr + at, value, mask=stored)
    tl.store(partial_ptr + program, tl.sum(difference * difference))


@triton.jit
def scale_kernel(
    gradient_ptr,
    corrupted_ptr,
    upstream_ptr,
    tokens,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    upstream = tl.load(upstream_ptr)
    if upstream != 1.0:
        row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        corrupted = tl.load(corrupted_ptr + row, mask=row < tokens, other=0) != 0
        for start in range(0, DIM, BLOCK_D):
            column = start + tl.arange(0, BLOCK_D)
            inside = corrupted[:, None] & (column < DIM)[None, :]
            at = gradient_ptr + row.to(tl.int64)[:, None] * DIM + column[None, :]
            value = tl.load(at, mask=inside, other=0.0).to(tl.float32) * upstream
            tl.store(at, value.to(gradient_ptr.dtype.element_ty), mask=inside)


def _block(dim: int) -> int:
    """Channels of a tile: the largest size that divides D, so that no lane is idle."""
    return next((block for block in (256, 128, 64) if dim % block == 0), 128)


def forward(
    pred: Tensor,
    target: Tensor,
    corrupted: Tensor,
    normalizer: Tensor | None,
    per_channel: bool,
    want_pred: bool,
    want_target: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients for an upstream gradient of 1.

    Args:
        pred: [B, T, N, D] float32, float16 or bfloat16, any strides; fewer than 2³¹ tokens.
        target: [B, T, N, D] of any of these dtypes, any strides.
        corrupted: [B, T, N] bool.
        normalizer: one element of any real dtype, or None: the number of corrupted tokens.
        per_channel: divides by D as well.
        want_pred: whether pred's gradient is wanted.
        want_target: whether target's gradient is wanted.

    Returns:
        The float32 loss, a scalar; pred's and target's gradients, contiguous and of their dtypes
        (float32 for float16), or of shape [0] where not wanted.
    """
    batch, frames, width, dim = pred.shape
    gradients = [
        torch.empty(x.shape if want else 0, device=x.device, dtype=gradient_dtype(x.dtype))
        for x, want in ((pred, want_pred), (target, want_target))
    ]
    if pred.numel() == 0:
        loss = torch.zeros((), device=pred.device, dtype=torch.float32)
        return loss, gradients[0], gradients[1]

    flags = numbers(corrupted)
    count = block_sums(flags, torch.int32) if normalizer is None else numbers(normalizer)
    channels = dim if per_channel else 1
    pinned = config("reconstruction_loss_forward", _block(dim), arch_of(pred))
    blocks = triton.cdiv(width, pinned.blocks["ROWS"])
    programs = batch * frames * blocks * triton.cdiv(dim, pinned.blocks["BLOCK_D"])
    # Where the strides make clips and frames one dimension, as is usual, kernels divide less.
    if all(x.stride(0) == frames * x.stride(1) for x in (pred, target)):
        pred, target = pred.flatten(0, 1).unsqueeze(1), target.flatten(0, 1).unsqueeze(1)
    partial = torch.empty(programs, device=pred.device, dtype=torch.float32)
    launch(
        forward_kernel,
        (programs,),
        pred,
        target,
        flags,
        count,
        partial,
        gradients[0] if want_pred else None,
        gradients[1] if want_target else None,
        pred.shape[1],
        width,
        count.numel(),
        channels,
        *pred.stride(),
        *target.stride(),
        config=pinned,
        DIM=dim,
        BLOCK_COUNT=block_count(count),
    )
    return finish(partial, count, channels), gradients[0], gradients[1]


def scale_(gradient: Tensor, corrupted: Tensor, upstream: Tensor) -> None:
    """Multiplies the corrupted tokens of ``gradient`` by ``upstream``; if it is 1, touches nothing.

    Args:
        gradient: [B, T, N, D] contiguous, as :func:`forward` gives it.
        corrupted: [B, T, N] bool.
        upstream: float32, one element.
    """
    if gradient.numel() == 0:
        return
    dim = gradient.shape[-1]
    tokens = gradient.numel() // dim
    pinned = config("reconstruction_loss_scale", _block(dim), arch_of(gradient))
    launch(
        scale_kernel,
        (triton.cdiv(tokens, pinned.blocks["ROWS"]),),
        gradient,
        numbers(corrupted),
        upstream,
        tokens,
        config=pinned,
        DIM=dim,
    )
