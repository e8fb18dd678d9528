"""Sums in a fixed order, and the last launch of a loss: the same bits at every run.

Each program of a loss's kernel stores one partial sum. :func:`finish` adds them up and divides by
the number of things over which the loss is a mean; that number never leaves the device. It computes
with pairs of float32, a number and what its rounding left out: some cards have one float64 unit for
64 of float32. Of n partial sums with one sign, the sum is within n² · 2⁻⁴⁸ of itself, so that only
the quotient's roundings count: the loss is within 2⁻²³ of the exact one for these partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cmpose.kernels.configs import config
from cmpose.kernels.launch import arch_of, launch


@triton.jit
def sum_all(values_ptr, size, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Σ of ``size`` values, added in ``dtype``: BLOCK running sums, then a tree over them."""
    sums = tl.zeros([BLOCK], dtype)
    for start in range(0, size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        sums += tl.load(values_ptr + index, mask=index < size, other=0).to(dtype)
    return tl.sum(sums, axis=0)


@triton.jit
def divide_by_count(total, count_ptr, counts, BLOCK_COUNT: tl.constexpr):
    """total / c in total's dtype, c the sum of ``counts`` values in float32; 0 where c is 0."""
    count = sum_all(count_ptr, counts, tl.float32, BLOCK_COUNT).to(total.dtype)
    return tl.where(count == 0, 0.0, total / tl.where(count == 0, 1.0, count))


@triton.jit
def block_sums_kernel(values_ptr, sums_ptr, size, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    index = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(values_ptr + index, mask=index < size, other=0)
    tl.store(sums_ptr + program, tl.sum(values.to(sums_ptr.dtype.element_ty), axis=0))


@triton.jit
def _add_pairs(high, low, other_high, other_low):
    """The sum of two pairs. ``left`` is exactly what rounding takes from ``total`` (Knuth)."""
    total = high + other_high
    part = total - high
    left = (high - (total - part)) + (other_high - part)
    return total, left + (low + other_low)


@triton.jit
def _divide_pair(high, low, divisor):
    quotient = high / divisor
    return quotient, (tl.fma(-quotient, divisor, high) + low) / divisor


@triton.jit
def finish_kernel(
    partial_ptr,
    count_ptr,
    loss_ptr,
    partials,
    counts,
    channels,
    BLOCK: tl.constexpr,
    BLOCK_COUNT: tl.constexpr,
):
    count = sum_all(count_ptr, counts, tl.float32, BLOCK_COUNT)
    high, low = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, partials, BLOCK):
        index = start + tl.arange(0, BLOCK)
        value = tl.load(partial_ptr + index, mask=index < partials, other=0.0)
        high, low = _add_pairs(high, low, value, 0.0)
    high, low = tl.reduce((high, low), 0, _add_pairs)
    high, low = _divide_pair(high, low, tl.cast(channels, tl.float32))
    high, low = _divide_pair(high, low, tl.where(count == 0, 1.0, count))
    # What infinities leave out is NaN, and they are the result.
    loss = tl.where(low == low, high + low, high)
    tl.store(loss_ptr, tl.where(count == 0, 0.0, loss))


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of a gradient for an upstream gradient of 1; float16's range is too small."""
    return torch.float32 if dtype == torch.float16 else dtype


def numbers(values: Tensor) -> Tensor:
    """Values as the kernels take them: contiguous, with bool as 0 and 1 (uint8)."""
    values = values.contiguous()
    return values.view(torch.uint8) if values.dtype == torch.bool else values


def block_sums(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums of consecutive blocks of ``values``, one launch.

    Args:
        values: any shape, from :func:`numbers`.
        dtype: of the sums, and in which they are added.

    Returns:
        [⌈elements / block⌉]; one element up to 32,768.
    """
    pinned = config("block_sums", None, arch_of(values))
    programs = triton.cdiv(values.numel(), pinned.blocks["BLOCK"])
    sums = torch.empty(programs, device=values.device, dtype=dtype)
    launch(block_sums_kernel, (programs,), values, sums, values.numel(), config=pinned)
    return sums


def block_count(count: Tensor) -> int:
    """The block size with which :func:`divide_by_count` sums ``count``; 1 for a single number."""
    return 1 if count.numel() == 1 else 512


def finish(partial: Tensor, count: Tensor, channels: int) -> Tensor:
    """Σ partial / channels / Σ count, and 0 where Σ count is 0.

    Args:
        partial: float32, one sum a program.
        count: one or a few numbers of any dtype, from :func:`numbers`.
        channels: a divisor the host knows.

    Returns:
        A float32 scalar.
    """
    loss = torch.empty((), device=partial.device, dtype=torch.float32)
    variant = next(size for size in (32, 512, 4096) if partial.numel() <= size or size == 4096)
    launch(
        finish_kernel,
        (1,),
        partial,
        count,
        loss,
        partial.numel(),
        count.numel(),
        channels,
        config=config("finish", variant, arch_of(partial)),
        BLOCK_COUNT=block_count(count),
    )
    return loss
