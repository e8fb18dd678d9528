"""Squared error against Gaussian heatmaps that are given by their centres: Eq. 13."""

from __future__ import annotations

import torch
from torch import Tensor

from cmpose.ops import backends, checks
from cmpose.ops.reconstruction_loss import divide_by_count


def _profile(centres: Tensor, length: int, sigma: float) -> Tensor:
    """One axis of the Gaussian, cut at 3σ: centres [B, K] → [B, K, length]."""
    pixels = torch.arange(length, device=centres.device, dtype=centres.dtype)
    offset = pixels - centres[..., None]
    value = torch.exp(offset.square() * (-0.5 / sigma**2))
    return torch.where(offset.abs() <= 3 * sigma, value, 0.0)


def heatmap_loss_reference(
    pred: Tensor, keypoints: Tensor, visible: Tensor, sigma: float, normalizer: Tensor | None
) -> Tensor:
    """:func:`heatmap_loss` as it reads, with the target built from its two axes."""
    dtype = checks.accumulator(pred)
    height, width = pred.shape[-2:]
    weight = visible.detach().to(dtype)
    centres = keypoints.detach().to(dtype)
    columns = _profile(centres[..., 0], width, sigma)
    rows = _profile(centres[..., 1], height, sigma)
    target = rows[..., :, None] * columns[..., None, :]
    counted = (weight > 0)[..., None, None]
    difference = torch.where(counted, pred.to(dtype) - target, 0.0)
    total = (difference.square().sum(dim=(-2, -1)) * weight).sum()
    return divide_by_count(total, weight.sum() if normalizer is None else normalizer)


_IMPLEMENTATIONS = {"reference": heatmap_loss_reference}


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
    A centre far outside gives an empty target. An empty prediction costs about πσ².

    Args:
        pred: [B, K, h, w] floating point.
        keypoints: [B, K, 2] floating point, centres (x, y) in heatmap pixels, used as given
            (a pixel's centre is at whole numbers).
        visible: [B, K] bool or floating point ≥ 0, weights v. Joints of weight 0 are not looked
            at: neither their heatmap nor their centre counts, even if it is NaN.
        sigma: σ > 0 in heatmap pixels.
        normalizer: tensor of one element that replaces Σ v; in a distributed run the global sum
            over the number of processes. Takes no gradient.
        backend: ``auto``, ``reference``, ``triton`` or ``cuda``.

    Returns:
        A scalar, float32 (float64 if pred is), summed in that dtype; 0 with zero gradients when
        no joint is visible or the normalizer is 0. Gradients flow to pred only.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or sigma; on the CPU also a negative or NaN weight and
            a visible joint whose centre is NaN. Elsewhere negative and NaN weights count in Σ v
            only, and a NaN centre is an empty target.
        BackendUnavailable: the backend asked for cannot run here.
    """
    sizes: checks.Sizes = {}
    checks.tensor("pred", pred, "B K h w", sizes)
    checks.tensor("keypoints", keypoints, "B K 2", sizes)
    checks.tensor("visible", visible, "B K", sizes, (*checks.BOOL, *checks.FLOATING))
    checks.same_device("pred", pred, keypoints=keypoints, visible=visible)
    if not 0 < sigma < float("inf"):
        raise ValueError(f"sigma must be a positive number of pixels, got {sigma}")
    if normalizer is not None:
        checks.normalizer(normalizer, pred)
    if checks.readable(visible):
        if not bool((visible >= 0).all()):
            raise ValueError("visible must be ≥ 0 everywhere, got a negative or NaN weight")
        if bool((keypoints.isnan().any(dim=-1) & (visible > 0)).any()):
            raise ValueError("keypoints must not be NaN where visible > 0")
    run = _IMPLEMENTATIONS[backends.resolve("heatmap_loss", backend)]
    return run(pred, keypoints, visible, sigma, normalizer)
