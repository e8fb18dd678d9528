"""Mean squared error over the corrupted tokens: Eqs. 2 and 3."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cmpose.ops import backends, checks, library
from cmpose.ops.cpu import reconstruction_loss as cpu

# -- reference ------------------------------------------------------------------------------------


def divide_by_count(total: Tensor, count: Tensor) -> Tensor:
    """total / count; 0, with zero gradients, where the count is 0."""
    count = count.detach().reshape(()).to(total.dtype)
    return torch.where(count == 0, 0.0, total / torch.where(count == 0, 1.0, count))


def reconstruction_loss_reference(
    pred: Tensor,
    target: Tensor,
    corrupted: Tensor,
    per_channel: bool,
    detach_target: bool,
    normalizer: Tensor | None,
) -> Tensor:
    """:func:`reconstruction_loss` in plain PyTorch."""
    dtype = checks.accumulator(pred, target)
    target = target.detach() if detach_target else target
    # The difference is masked, not the loss, which keeps NaN at other tokens out of the gradient.
    difference = torch.where(corrupted[..., None], pred.to(dtype) - target.to(dtype), 0.0)
    total = difference.square().sum()
    if per_channel:
        total = total / max(pred.shape[-1], 1)
    return divide_by_count(total, corrupted.sum() if normalizer is None else normalizer)


def reconstruction_loss_with_gradients_reference(
    pred: Tensor,
    target: Tensor,
    corrupted: Tensor,
    normalizer: Tensor | None,
    per_channel: bool,
    want_pred: bool,
    want_target: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and its gradients to pred and target: ±2 (pred − target) / |C| on C, else 0."""
    loss = reconstruction_loss_reference(pred, target, corrupted, per_channel, True, normalizer)
    gradients = []
    difference = torch.where(corrupted[..., None], pred.to(loss.dtype) - target.to(loss.dtype), 0.0)
    two = torch.full_like(loss, 2.0 / max(pred.shape[-1], 1) if per_channel else 2.0)
    factor = divide_by_count(two, corrupted.sum() if normalizer is None else normalizer)
    for tensor, want, sign in ((pred, want_pred, 1.0), (target, want_target, -1.0)):
        dtype = library.gradient_dtype(tensor.dtype)
        gradient = (difference * (sign * factor)).to(dtype).contiguous()
        gradients.append(gradient if want else tensor.new_empty(0, dtype=dtype))
    return loss, gradients[0], gradients[1]


def _cpu_forward(
    pred: Tensor,
    target: Tensor,
    corrupted: Tensor,
    normalizer: Tensor | None,
    per_channel: bool,
    want_pred: bool,
    want_target: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtypes = library.gradient_dtype(pred.dtype), library.gradient_dtype(target.dtype)
    loss, parts = cpu.parts(pred, target, corrupted, normalizer, per_channel)
    none = tuple(pred.new_empty(0, dtype=dtype) for dtype in dtypes)
    if not (want_pred or want_target):
        return loss, none[0], none[1]
    one, wants = torch.ones_like(loss), (want_pred, want_target)
    gradients = cpu.gradients(one, corrupted, dtypes, *wants, *parts)
    d_pred, d_target = (b if a is None else a for a, b in zip(gradients, none, strict=True))
    return loss, d_pred, d_target


# -- registered op --------------------------------------------------------------------------------


def _forward_fake(
    pred: Tensor,
    target: Tensor,
    corrupted: Tensor,
    normalizer: Tensor | None,
    per_channel: bool,
    want_pred: bool,
    want_target: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = pred.new_empty((), dtype=checks.accumulator(pred, target))
    gradients = [
        tensor.new_empty(tensor.shape if want else (0,), dtype=library.gradient_dtype(tensor.dtype))
        for tensor, want in ((pred, want_pred), (target, want_target))
    ]
    return loss, gradients[0], gradients[1]


# The forward pass reads the tokens and writes their gradients at once, for an upstream gradient of
# 1. A gradient that is not wanted is an empty tensor.
_forward = library.register(
    "reconstruction_loss(Tensor pred, Tensor target, Tensor corrupted, Tensor? normalizer, "
    "bool per_channel, bool want_pred, bool want_target, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    _forward_fake,
    reference=reconstruction_loss_with_gradients_reference,
    cpu=_cpu_forward,
    triton=library.triton_kernel("reconstruction_loss", "forward"),
)
_scale = library.register(
    "reconstruction_loss_scale_(Tensor(a!) gradient, Tensor corrupted, Tensor upstream, "
    "str backend) -> ()",
    lambda gradient, corrupted, upstream, backend: None,
    reference=library.scale_reference,
    cpu=library.scale_cpu,
    triton=library.triton_kernel("reconstruction_loss", "scale_"),
)


class _ReconstructionLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pred: Tensor,
        target: Tensor,
        corrupted: Tensor,
        normalizer: Tensor | None,
        *options: Any,
    ) -> Tensor:
        ctx.options = options  # per_channel, want_pred, want_target, backend
        ctx.save_for_backward(pred, target, corrupted, normalizer)
        arguments = pred, target, corrupted, normalizer, *options
        # Where nothing in torch watches the op, gradients are computed in the backward pass only.
        if library.at_once(arguments):
            loss, ctx.parts = cpu.parts(*arguments[:5])
            ctx.gradients = None
        else:
            loss, *ctx.gradients = _forward(*arguments)
            ctx.parts = None
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        pred, target, corrupted, normalizer = ctx.saved_tensors
        # The gradients are given away, not copied; a second backward pass of a retained graph
        # computes them again.
        gradients, ctx.gradients = ctx.gradients, None
        parts, ctx.parts = ctx.parts, None
        if gradients is None and parts is None:
            _, *gradients = _forward(pred, target, corrupted, normalizer, *ctx.options)
        _, want_pred, want_target, backend = ctx.options

        def scaled(upstream: Tensor, pred: Tensor, target: Tensor) -> tuple[Tensor | None, ...]:
            if parts is not None:
                dtypes = pred.dtype, target.dtype
                return cpu.gradients(upstream, corrupted, dtypes, want_pred, want_target, *parts)
            return tuple(
                library.scaled(gradient, upstream, tensor.dtype, _scale, corrupted, backend)
                if want
                else None
                for gradient, tensor, want in zip(
                    gradients, (pred, target), (want_pred, want_target), strict=True
                )
            )

        results = library.first_order("reconstruction_loss", scaled, upstream, pred, target)
        return *results, None, None, None, None, None, None


# -- public ---------------------------------------------------------------------------------------


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
        detach_target: the target gets no gradient.
        normalizer: tensor of one element that replaces |C|; in a distributed run the global count
            divided by the number of processes. It gets no gradient.
        backend: ``auto``, ``reference``, ``cpu``, ``triton`` or ``cuda``.

    Returns:
        A scalar, float32 (float64 if pred or target is), summed in that dtype. 0, with zero
        gradients, when nothing is corrupted or the normalizer is 0. A NaN outside C has no effect;
        one inside makes the loss NaN.

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
    checks.boolean("per_channel", per_channel)
    checks.boolean("detach_target", detach_target)
    chosen = backends.choose("reconstruction_loss", backend, pred.device, pred, target, normalizer)
    if chosen == backends.PLAIN:
        return reconstruction_loss_reference(
            pred, target, corrupted, per_channel, detach_target, normalizer
        )
    target = target.detach() if detach_target else target
    normalizer = None if normalizer is None else normalizer.detach()
    want_pred, want_target = (
        library.wants_gradient("reconstruction_loss", t) for t in (pred, target)
    )
    arguments = (pred, target, corrupted, normalizer, per_channel, want_pred, want_target, chosen)
    if want_pred or want_target:
        return _ReconstructionLoss.apply(*arguments)
    return _forward(*arguments)[0]


def _triton_limits(pred: Tensor, target: Tensor, normalizer: Tensor | None) -> str | None:
    return backends.dtype_refusal(pred=pred, target=target) or backends.interpreter_refusal(
        pred=pred, target=target, normalizer=normalizer
    )


backends.entry(reconstruction_loss, "pred", cpu=None, triton=_triton_limits)
