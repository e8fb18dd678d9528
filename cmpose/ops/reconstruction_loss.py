"""Mean squared error over the corrupted tokens: Eqs. 2 and 3."""

from __future__ import annotations

import torch
from torch import Tensor

from cmpose.ops import backends, checks


def divide_by_count(total: Tensor, count: Tensor) -> Tensor:
    """total / count, and total where the count is 0 (then the total is 0 as well)."""
    count = count.detach().reshape(()).to(total.dtype)
    return total / torch.where(count > 0, count, 1.0)


def reconstruction_loss_reference(
    pred: Tensor,
    target: Tensor,
    corrupted: Tensor,
    per_channel: bool,
    detach_target: bool,
    normalizer: Tensor | None,
) -> Tensor:
    """:func:`reconstruction_loss` as it reads."""
    dtype = checks.accumulator(pred, target)
    target = target.detach() if detach_target else target
    # Masking the difference, not the loss, keeps NaN at other tokens out of the gradient.
    difference = torch.where(corrupted[..., None], pred.to(dtype) - target.to(dtype), 0.0)
    total = difference.square().sum()
    if per_channel:
        total = total / max(pred.shape[-1], 1)
    return divide_by_count(total, corrupted.sum() if normalizer is None else normalizer)


_IMPLEMENTATIONS = {"reference": reconstruction_loss_reference}


def reconstruction_loss(
    pred: Tensor,
    target: Tensor,
    corrupted: Tensor,
    *,
    per_channel: bool = True,
    detach_target: bool = True,
    normalizer: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """(1/|C|) Σ_{i∈C} ‖pred_i − target_i‖² over the corrupted tokens C: Eqs. 2 and 3.

    Args:
        pred: [B, T, N, D] floating point, reconstructed tokens.
        target: [B, T, N, D] floating point, the clean tokens F_v.
        corrupted: [B, T, N] bool, C.
        per_channel: divides by D as well, so that the loss's weight does not depend on the width.
        detach_target: the target takes no gradient.
        normalizer: tensor of one element that replaces |C|; in a distributed run the global count
            over the number of processes. Takes no gradient.
        backend: ``auto``, ``reference``, ``triton`` or ``cuda``.

    Returns:
        A scalar, float32 (float64 if pred or target is), summed in that dtype. 0, with zero
        gradients, when nothing is corrupted or the normalizer is 0. Tokens outside C are not
        looked at: NaN there does nothing; inside, the loss is NaN.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device.
        BackendUnavailable: the backend asked for cannot run here.
    """
    sizes: checks.Sizes = {}
    checks.tensor("pred", pred, "B T N D", sizes)
    checks.tensor("target", target, "B T N D", sizes)
    checks.tensor("corrupted", corrupted, "B T N", sizes, checks.BOOL)
    checks.same_device("pred", pred, target=target, corrupted=corrupted)
    if normalizer is not None:
        checks.normalizer(normalizer, pred)
    run = _IMPLEMENTATIONS[backends.resolve("reconstruction_loss", backend)]
    return run(pred, target, corrupted, per_channel, detach_target, normalizer)
