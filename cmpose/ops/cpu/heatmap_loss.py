"""The heatmap loss; the targets are subtracted as the outer products of their two axes."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forward(
    pred: Tensor,
    columns: Tensor,
    rows: Tensor,
    weight: Tensor,
    normalizer: Tensor | None,
    gradient_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None]:
    """The loss, and its gradient to pred in ``gradient_dtype``; None without one.

    Args:
        pred: [B, K, h, w].
        columns, rows: [B, K, w] and [B, K, h], the axes of the Gaussians, in float32 or float64.
        weight: [B, K] of that dtype.
        normalizer: one element, or None.
    """
    count = (weight.sum() if normalizer is None else normalizer).reshape(()).to(weight.dtype)
    count = torch.where(count == 0, torch.inf, count)  # then the loss is 0
    counted = weight > 0
    weight = torch.where(counted, weight, 0.0)  # of those that are negative or NaN too
    difference = torch.addcmul(
        pred.to(weight.dtype), rows[..., None], columns[..., None, :], value=-1
    ).contiguous()
    squares = difference.square().sum(dim=(2, 3))
    total = (squares * weight).sum()
    if not math.isfinite(total.item()):  # 0 · NaN is not 0
        difference.masked_fill_(~counted[..., None, None], 0.0)
        total = (squares.masked_fill(~counted, 0.0) * weight).sum()
    if gradient_dtype is None:
        return total / count, None
    difference *= (weight * (2.0 / count))[..., None, None]
    return total / count, difference.to(gradient_dtype)
