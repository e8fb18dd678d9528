"""The reconstruction loss; its gradients are made of the corrupted tokens alone."""

from __future__ import annotations

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
    count = corrupted.sum() if normalizer is None else normalizer
    count = count.reshape(()).to(wide)
    count = torch.where(count == 0, torch.inf, count)  # then the loss is 0
    gradients = [pred.new_empty(0, dtype=dtype) for dtype in gradient_dtypes]
    if not (want_pred or want_target):  # then reading all is sooner than looking for some
        squares = (pred.to(wide) - target.to(wide)).square_().sum(dim=3)
        total = squares.masked_fill_(~corrupted, 0.0).sum()
        return total / width / count, gradients[0], gradients[1]
    rows = corrupted.nonzero(as_tuple=True)
    difference = pred[rows].to(wide) - target[rows].to(wide)
    loss = difference.square().sum() / width / count
    difference *= 2.0 / width / count
    for i, wanted in enumerate((want_pred, want_target)):
        if wanted:
            gradients[i] = torch.zeros(pred.shape, dtype=gradient_dtypes[i])
            gradients[i][rows] = (difference if i == 0 else -difference).to(gradient_dtypes[i])
    return loss, gradients[0], gradients[1]
