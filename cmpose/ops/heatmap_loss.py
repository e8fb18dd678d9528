"""Squared error against Gaussian heatmaps, of which the centres are given: Eq. 13."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from cmpose.ops import backends, checks, library
from cmpose.ops.cpu import heatmap_loss as cpu
from cmpose.ops.reconstruction_loss import divide_by_count

SIGMAS = (1e-15, 1e15)

# -- reference ------------------------------------------------------------------------------------


def _profile(centres: Tensor, length: int, sigma: float) -> Tensor:
    """One axis of the Gaussian, cut at 3σ: centres [B, K] → [B, K, length]."""
    pixels = torch.arange(length, device=centres.device, dtype=centres.dtype)
    offset = pixels - centres[..., None]
    # What is cut is not computed: it would be subnormal, which takes a CPU long.
    value = (offset.square() * (-0.5 / sigma**2)).clamp(min=-5.0).exp()
    return torch.where(offset.abs() <= 3 * sigma, value, 0.0)


def _difference(pred: Tensor, keypoints: Tensor, weight: Tensor, sigma: float) -> Tensor:
    """pred − G where a joint counts, else 0; the target is built from its two axes."""
    height, width = pred.shape[-2:]
    centres = keypoints.detach().to(weight.dtype)
    columns = _profile(centres[..., 0], width, sigma)
    rows = _profile(centres[..., 1], height, sigma)
    target = rows[..., :, None] * columns[..., None, :]
    return torch.where((weight > 0)[..., None, None], pred.to(weight.dtype) - target, 0.0)


def heatmap_loss_reference(
    pred: Tensor, keypoints: Tensor, visible: Tensor, sigma: float, normalizer: Tensor | None
) -> Tensor:
    """:func:`heatmap_loss` in plain PyTorch."""
    weight = visible.detach().to(checks.accumulator(pred))
    difference = _difference(pred, keypoints, weight, sigma)
    # Weights that do not count, NaN or negative, are made 0.
    counted = torch.where(weight > 0, weight, 0.0)
    total = (difference.square().sum(dim=(-2, -1)) * counted).sum()
    return divide_by_count(total, weight.sum() if normalizer is None else normalizer)


def heatmap_loss_with_gradient_reference(
    pred: Tensor,
    keypoints: Tensor,
    visible: Tensor,
    sigma: float,
    normalizer: Tensor | None,
    want_pred: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, and its gradient to pred: 2 v_j (pred_j − G_j) / Σ v."""
    loss = heatmap_loss_reference(pred, keypoints, visible, sigma, normalizer)
    dtype = library.gradient_dtype(pred.dtype)
    if not want_pred:
        return loss, pred.new_empty(0, dtype=dtype)
    weight = visible.detach().to(loss.dtype)
    factor = divide_by_count(
        torch.full_like(loss, 2.0), weight.sum() if normalizer is None else normalizer
    )
    scale = torch.where(weight > 0, weight, 0.0) * factor
    gradient = _difference(pred, keypoints, weight, sigma) * scale[..., None, None]
    return loss, gradient.to(dtype).contiguous()


def _cpu_forward(
    pred: Tensor,
    keypoints: Tensor,
    visible: Tensor,
    sigma: float,
    normalizer: Tensor | None,
    want_pred: bool,
) -> tuple[Tensor, Tensor]:
    dtype = library.gradient_dtype(pred.dtype)
    loss, parts = cpu.parts(pred, keypoints, visible, sigma, normalizer)
    if not want_pred:
        return loss, pred.new_empty(0, dtype=dtype)
    return loss, cpu.gradient(torch.ones_like(loss), *parts).to(dtype)


# -- registered op --------------------------------------------------------------------------------


def _forward_fake(
    pred: Tensor,
    keypoints: Tensor,
    visible: Tensor,
    sigma: float,
    normalizer: Tensor | None,
    want_pred: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    loss = pred.new_empty((), dtype=checks.accumulator(pred))
    dtype = library.gradient_dtype(pred.dtype)
    return loss, pred.new_empty(pred.shape if want_pred else (0,), dtype=dtype)


_forward = library.register(
    "heatmap_loss(Tensor pred, Tensor keypoints, Tensor visible, float sigma, "
    "Tensor? normalizer, bool want_pred, str backend) -> (Tensor, Tensor)",
    _forward_fake,
    reference=heatmap_loss_with_gradient_reference,
    cpu=_cpu_forward,
    triton=library.triton_kernel("heatmap_loss", "forward"),
)
_scale = library.register(
    "heatmap_loss_scale_(Tensor(a!) gradient, Tensor visible, Tensor upstream, str backend) -> ()",
    lambda gradient, visible, upstream, backend: None,
    reference=library.scale_reference,
    cpu=library.scale_cpu,
    triton=library.triton_kernel("heatmap_loss", "scale_"),
)


class _HeatmapLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pred: Tensor,
        keypoints: Tensor,
        visible: Tensor,
        sigma: float,
        normalizer: Tensor | None,
        backend: str,
    ) -> Tensor:
        ctx.sigma, ctx.backend = sigma, backend
        ctx.save_for_backward(pred, keypoints, visible, normalizer)
        arguments = pred, keypoints, visible, sigma, normalizer
        # Where nothing in torch watches the op, the gradient is computed in the backward pass only.
        if library.at_once((*arguments, backend)):
            loss, ctx.parts = cpu.parts(*arguments)
            ctx.gradient = None
        else:
            loss, ctx.gradient = _forward(*arguments, True, backend)
            ctx.parts = None
        return loss

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        pred, keypoints, visible, normalizer = ctx.saved_tensors
        # The gradient is given away, not copied; a second backward pass of a retained graph
        # computes it again.
        gradient, ctx.gradient = ctx.gradient, None
        parts, ctx.parts = ctx.parts, None
        if gradient is None and parts is None:
            _, gradient = _forward(
                pred, keypoints, visible, ctx.sigma, normalizer, True, ctx.backend
            )

        def scaled(upstream: Tensor, pred: Tensor) -> Tensor:
            if parts is not None:
                return cpu.gradient(upstream, *parts).to(pred.dtype)
            return library.scaled(gradient, upstream, pred.dtype, _scale, visible, ctx.backend)

        d_pred = library.first_order("heatmap_loss", scaled, upstream, pred)
        return d_pred, None, None, None, None, None


# -- public ---------------------------------------------------------------------------------------


def heatmap_loss(
    pred: Tensor,
    keypoints: Tensor,
    visible: Tensor,
    sigma: float = 2.0,
    *,
    normalizer: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Σ_j v_j Σ_pixels (pred_j − G_j)² / Σ_j v_j: Eq. 13, summed over a heatmap's pixels.

    G_j(x, y) = exp(−((x−c_x)² + (y−c_y)²) / 2σ²) where |x−c_x| ≤ 3σ and |y−c_y| ≤ 3σ, else 0.
    A centre far outside the heatmap has an empty target. An empty prediction costs about πσ².

    Args:
        pred: [B, K, h, w] floating point.
        keypoints: [B, K, 2] floating point, centres (x, y) in heatmap pixels, used as given
            (a pixel's centre is at whole numbers).
        visible: [B, K] bool or floating point ≥ 0 (no integers), weights v. Of joints of weight 0
            neither the heatmap nor the centre counts, even if it is NaN.
        sigma: σ in heatmap pixels, 1e-15 to 1e15: σ² is a number of float32.
        normalizer: tensor of one element that replaces Σ v; in a distributed run the global sum
            divided by the number of processes. It gets no gradient.
        backend: ``auto``, ``reference``, ``cpu``, ``triton`` or ``cuda``.

    Returns:
        A scalar, float32 (float64 if pred is), summed in that dtype; 0 with zero gradients when
        no joint is visible or the normalizer is 0. Gradients flow to pred only.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or sigma; on the CPU also a negative or NaN weight and
            a visible joint whose centre is NaN. Elsewhere negative and NaN weights count in Σ v
            only, and a NaN centre has an empty target.
        BackendUnavailable: the backend asked for cannot run here.
    """
    sizes: checks.Sizes = {}
    checks.tensor("pred", pred, "B K h w", sizes)
    checks.tensor("keypoints", keypoints, "B K 2", sizes)
    checks.tensor("visible", visible, "B K", sizes, (*checks.BOOL, *checks.FLOATING))
    checks.same_device("pred", pred, keypoints=keypoints, visible=visible)
    checks.between("sigma", sigma, *SIGMAS)
    sigma = float(sigma)
    if normalizer is not None:
        checks.normalizer(normalizer, pred)
    if checks.readable(visible):
        if visible.dtype != torch.bool and visible.numel() and not visible.min().item() >= 0:
            raise ValueError("visible must be ≥ 0 everywhere, got a negative or NaN weight")
        any_nan = math.isnan(keypoints.sum().item())  # which mostly tells that there is none
        if any_nan and bool((keypoints.isnan().any(dim=-1) & (visible > 0)).any()):
            raise ValueError("keypoints must not be NaN where visible > 0")
    chosen = backends.choose(
        "heatmap_loss", backend, pred.device, pred, keypoints, visible, normalizer
    )
    if chosen == backends.PLAIN:
        return heatmap_loss_reference(pred, keypoints, visible, sigma, normalizer)
    keypoints, visible = keypoints.detach(), visible.detach()
    normalizer = None if normalizer is None else normalizer.detach()
    if library.wants_gradient("heatmap_loss", pred):
        return _HeatmapLoss.apply(pred, keypoints, visible, sigma, normalizer, chosen)
    return _forward(pred, keypoints, visible, sigma, normalizer, False, chosen)[0]


def _triton_limits(
    pred: Tensor, keypoints: Tensor, visible: Tensor, normalizer: Tensor | None
) -> str | None:
    return backends.dtype_refusal(pred=pred) or backends.interpreter_refusal(
        pred=pred, keypoints=keypoints, visible=visible, normalizer=normalizer
    )


backends.entry(heatmap_loss, "pred", cpu=None, triton=_triton_limits)
