"""The reconstruction loss; the difference becomes the gradient in place."""

from __future__ import annotations

import math

import torch
from torch import Tensor


# Many parameters: those of the registered op.
def forward(
    pred: Tensor,
    target: Tensor,
    gradient_dtypes: tuple[torch.dtype, torch.dtype],
    corrupted: Tensor,
    normalizer: Tensor | None,
    per_channel: bool,
    want_pred: bool,
    want_target: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients to pred and target in those dtypes, empty unless wanted."""
    wide = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
    width = pred.shape[-1] if per_channel else 1
    count = (corrupted.sum() if normalizer is None else normalizer).reshape(()).to(wide)
    count = count if count.item() else torch.full_like(count, math.inf)  # then the loss is 0
    # Of one dtype none is cast for itself; all tokens are read, which is sooner than some.
    difference = pred - target if pred.dtype == wide else pred.to(wide).sub_(target)
    difference = difference.contiguous()
    squares = torch.linalg.vector_norm(difference, dim=3).square_()
    total = (squares * corrupted).sum()
    if not math.isfinite(total.item()):  # 0 · NaN is not 0
        difference.masked_fill_(~corrupted[..., None], 0.0)
        total = squares.masked_fill_(~corrupted, 0.0).sum()
    gradients = [pred.new_empty(0, dtype=dtype) for dtype in gradient_dtypes]
    if want_pred or want_target:
        difference *= (corrupted * (2.0 / width / count))[..., None]
    if want_target:
        gradients[1] = (-difference).to(gradient_dtypes[1])
    if want_pred:
        gradients[0] = difference.to(gradient_dtypes[0])
    return total / width / count, gradients[0], gradients[1]
