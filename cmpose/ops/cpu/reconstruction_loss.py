"""The reconstruction loss; the difference becomes the gradient in place."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def parts(
    pred: Tensor, target: Tensor, corrupted: Tensor, normalizer: Tensor | None, per_channel: bool
) -> tuple[Tensor, tuple[Tensor, float]]:
    """The loss; and pred − target and a factor, whose product with ``corrupted`` is its gradient to
    pred."""
    wide = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), torch.float32)
    width = pred.shape[-1] if per_channel else 1
    count = float(corrupted.sum() if normalizer is None else normalizer)
    count = count or math.inf  # then the loss is 0
    # All tokens are read: that is faster than gathering the corrupted ones.
    difference = pred - target if pred.dtype == wide else pred.to(wide).sub_(target)
    difference = difference.contiguous()
    squares = torch.linalg.vector_norm(difference, dim=3).square_()
    total = (squares * corrupted).sum()
    if not math.isfinite(total.item()):  # 0 · NaN is not 0
        difference.masked_fill_(~corrupted[..., None], 0.0)
        total = squares.masked_fill_(~corrupted, 0.0).sum()
    return total.div_(width).div_(count), (difference, 2.0 / width / count)


# Many parameters: what the backward pass has.
def gradients(
    upstream: Tensor,
    corrupted: Tensor,
    dtypes: tuple[torch.dtype, torch.dtype],
    want_pred: bool,
    want_target: bool,
    difference: Tensor,
    factor: float,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of what :func:`parts` gives, to pred and target in those dtypes, None unless
    wanted; ``difference`` becomes that to pred."""
    difference.mul_((corrupted * (upstream * factor)).unsqueeze(3))
    return (
        difference.to(dtypes[0]) if want_pred else None,
        (-difference).to(dtypes[1]) if want_target else None,
    )
