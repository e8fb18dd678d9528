"""Squared error against Gaussian heatmaps that are never built, and its gradient, in one pass.

Eq. 13 in two launches. In the first, every program takes a tile of one joint's heatmap. It computes
the target from two profiles (an exponential for each row and column, not for each pixel), stores
one partial sum, and writes the tile of the gradient. The second adds up the partial sums. Every
program adds up the weights for itself; only if there are very many, a launch before the others sums
them in blocks. Bytes: pred is read once and the gradient written once. Of an invisible joint only
the gradient, zero, is written.
"""

from __future__ import annotations

import math

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

SUMMED_BY_ALL = 2048
"""Up to this many weights, every program adds them up itself: that is a few loads from L2."""


@triton.jit
def profile(pixels, centre, rate, reach):
    """One axis of the Gaussian: exp(rate · (pixel − centre)²), 0 beyond ``reach`` or at NaN."""
    offset = pixels.to(tl.float32) - centre
    return tl.where(tl.abs(offset) <= reach, tl.exp(offset * offset * rate), 0.0)


@triton.jit
def forward_kernel(
    pred_ptr,
    keypoints_ptr,
    visible_ptr,
    count_ptr,
    partial_ptr,
    gradient_ptr,
    joints,
    height,
    width,
    counts,
    pred_stride_b,
    pred_stride_k,
    pred_stride_h,
    pred_stride_w,
    keypoints_stride_b,
    keypoints_stride_k,
    keypoints_stride_x,
    rate,
    reach,
    ALIGN: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_COUNT: tl.constexpr,
):
    # Triton itself only detects multiples of 16: without this, a width of 72 would be read element
    # by element.
    width = width // ALIGN * ALIGN
    pred_stride_b = pred_stride_b // ALIGN * ALIGN
    pred_stride_k = pred_stride_k // ALIGN * ALIGN
    pred_stride_h = pred_stride_h // ALIGN * ALIGN

    program = tl.program_id(0)
    columns, rows = tl.cdiv(width, BLOCK_W), tl.cdiv(height, BLOCK_H)
    tile = program // columns
    joint = tile // rows
    y = tile % rows * BLOCK_H + tl.arange(0, BLOCK_H)
    x = program % columns * BLOCK_W + tl.arange(0, BLOCK_W)
    b, k = (joint // joints).to(tl.int64), (joint % joints).to(tl.int64)
    in_row, in_column = (y < height)[:, None], (x < width)[None, :]

    weight = tl.load(visible_ptr + joint).to(tl.float32)
    weight = tl.where(weight > 0, weight, 0.0)  # a NaN counts as 0
    inside = (y < tl.where(weight > 0, height, 0))[:, None] & in_column
    at = b * pred_stride_b + k * pred_stride_k
    at += y.to(tl.int64)[:, None] * pred_stride_h + x.to(tl.int64)[None, :] * pred_stride_w
    pred = tl.load(pred_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if gradient_ptr is not None:
        scale = divide_by_count(2.0 * weight, count_ptr, counts, BLOCK_COUNT)

    centre = keypoints_ptr + b * keypoints_stride_b + k * keypoints_stride_k
    centre_x = tl.load(centre).to(tl.float32)
    centre_y = tl.load(centre + keypoints_stride_x).to(tl.float32)
    target = profile(y, centre_y, rate, reach)[:, None] * profile(x, centre_x, rate, reach)[None, :]
    difference = tl.where(inside, pred - target, 0.0)
    if gradient_ptr is not None:
        # A joint without weight has gradient 0 even where the scale is not finite.
        value = (difference * tl.where(weight > 0, scale, 0.0)).to(gradient_ptr.dtype.element_ty)
        at = (joint.to(tl.int64) * height + y.to(tl.int64)[:, None]) * width + x[None, :]
        tl.store(gradient_ptr + at, value, mask=in_row & in_column)
    tl.store(partial_ptr + program, tl.sum(difference * difference) * weight)


@triton.jit
def scale_kernel(gradient_ptr, visible_ptr, upstream_ptr, pixels, BLOCK: tl.constexpr):
    upstream = tl.load(upstream_ptr)
    if upstream != 1.0:
        joint = tl.program_id(0)
        if tl.load(visible_ptr + joint).to(tl.float32) > 0:
            base = gradient_ptr + joint.to(tl.int64) * pixels
            for start in range(0, pixels, BLOCK):
                index = start + tl.arange(0, BLOCK)
                value = tl.load(base + index, mask=index < pixels, other=0.0).to(tl.float32)
                value = (value * upstream).to(gradient_ptr.dtype.element_ty)
                tl.store(base + index, value, mask=index < pixels)


def forward(
    pred: Tensor,
    keypoints: Tensor,
    visible: Tensor,
    sigma: float,
    normalizer: Tensor | None,
    want_pred: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, and pred's gradient for an upstream gradient of 1.

    Args:
        pred: [B, K, h, w] float32, float16 or bfloat16, any strides; fewer than 2³¹ joints.
        keypoints: [B, K, 2] floating point, centres (x, y) in heatmap pixels, any strides.
        visible: [B, K] bool or floating point, weights.
        sigma: σ > 0 in heatmap pixels.
        normalizer: one element of any real dtype, or None: the sum of the weights.
        want_pred: whether the gradient is wanted.

    Returns:
        The float32 loss, a scalar; pred's gradient, contiguous and of its dtype (float32 for
        float16), or of shape [0] where not wanted.
    """
    batch, joints, height, width = pred.shape
    dtype = gradient_dtype(pred.dtype)
    gradient = torch.empty(pred.shape if want_pred else 0, device=pred.device, dtype=dtype)
    if pred.numel() == 0:
        return torch.zeros((), device=pred.device, dtype=torch.float32), gradient

    weights = numbers(visible)
    if normalizer is not None:
        count = numbers(normalizer)
    elif weights.numel() <= SUMMED_BY_ALL:
        count = weights
    else:
        count = block_sums(weights, torch.float32)
    variant = min(max(triton.next_power_of_2(width), 32), 128)
    pinned = config("heatmap_loss_forward", variant, arch_of(pred))
    tiles = triton.cdiv(height, pinned.blocks["BLOCK_H"])
    tiles *= triton.cdiv(width, pinned.blocks["BLOCK_W"])
    partial = torch.empty(batch * joints * tiles, device=pred.device, dtype=torch.float32)
    launch(
        forward_kernel,
        (batch * joints * tiles,),
        pred,
        keypoints,
        weights,
        count,
        partial,
        gradient if want_pred else None,
        joints,
        height,
        width,
        count.numel(),
        *pred.stride(),
        *keypoints.stride(),
        -0.5 / sigma**2,
        3 * sigma,
        config=pinned,
        ALIGN=math.gcd(8, width, *pred.stride()[:3]),
        BLOCK_COUNT=block_count(count),
    )
    return finish(partial, count, 1), gradient


def scale_(gradient: Tensor, visible: Tensor, upstream: Tensor) -> None:
    """Multiplies the visible joints of ``gradient`` by ``upstream``; if it is 1, touches nothing.

    Args:
        gradient: [B, K, h, w] contiguous, as :func:`forward` gives it.
        visible: [B, K] bool or floating point, weights.
        upstream: float32, one element.
    """
    if gradient.numel() == 0:
        return
    batch, joints, height, width = gradient.shape
    launch(
        scale_kernel,
        (batch * joints,),
        gradient,
        numbers(visible),
        upstream,
        height * width,
        config=config("heatmap_loss_scale", None, arch_of(gradient)),
    )
