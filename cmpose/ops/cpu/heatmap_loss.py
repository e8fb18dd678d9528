"""The heatmap loss; the targets are subtracted as the outer products of their two axes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _profiles(centres: Tensor, length: int, sigma: float) -> Tensor:
    """Both axes of the Gaussians, cut at 3σ: [B, K, 2] → [B, K, 2, length]."""
    offset = torch.arange(length, dtype=centres.dtype) - centres.unsqueeze(3)
    inside = offset.abs() <= 3 * sigma  # nowhere if the centre is NaN
    # What is cut is not computed: it would be subnormal, which takes a CPU long.
    value = offset.square_().mul_(-0.5 / sigma**2).clamp_(min=-5.0).exp_()
    return torch.where(inside, value, 0.0)


def parts(
    pred: Tensor, keypoints: Tensor, visible: Tensor, sigma: float, normalizer: Tensor | None
) -> tuple[Tensor, tuple[Tensor, Tensor, float]]:
    """The loss; and pred − G, weights and a factor, whose product is its gradient."""
    weight = visible.to(torch.promote_types(pred.dtype, torch.float32))
    count = float(weight.sum() if normalizer is None else normalizer)
    count = count or math.inf  # then the loss is 0
    height, width = pred.shape[2:]
    axes = _profiles(keypoints.to(weight.dtype), max(height, width), sigma)
    columns, rows = (axis.unsqueeze(n) for n, axis in zip((2, 3), axes.unbind(2), strict=True))
    columns, rows = columns.narrow(3, 0, width), rows.narrow(2, 0, height)
    difference = torch.addcmul(pred.to(weight.dtype), rows, columns, value=-1).contiguous()
    squares = difference.square().sum(dim=(2, 3))
    counted = weight.clamp(min=0.0)
    total = (squares * counted).sum()
    if not math.isfinite(total.item()):  # 0 · NaN is not 0
        counted = torch.where(weight > 0, weight, 0.0)  # of those that are NaN too
        none = counted == 0
        difference.masked_fill_(none[..., None, None], 0.0)
        total = (squares.masked_fill_(none, 0.0) * counted).sum()
    return total.div_(count), (difference, counted, 2.0 / count)


def gradient(upstream: Tensor, difference: Tensor, counted: Tensor, factor: float) -> Tensor:
    """The gradient to pred of what :func:`parts` gives; ``difference`` becomes it."""
    return difference.mul_((counted * factor).mul_(upstream)[..., None, None])
