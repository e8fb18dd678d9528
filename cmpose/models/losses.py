"""The training loss, Eq. 14 and a term for the selection: L = L_H + λ (L_M + L_N) + μ L_S."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cmpose import ops
from cmpose.config import ModelConfig
from cmpose.models.cmpose import CMPoseOutput
from cmpose.models.coarse import Reconstruction
from cmpose.models.fine import gather_tokens, score_heatmaps
from cmpose.models.vit import PATCH


class Losses(NamedTuple):
    """Scalars: the sum that is minimised, and its terms before λ and μ (zero where off).

    ``selection`` is L_S, the pose loss of the scores that select causal tokens, enlarged to
    heatmaps. The selection itself passes no gradient, and nothing else teaches the scores where a
    keypoint is.
    """

    total: Tensor
    pose: Tensor
    mask: Tensor
    noise: Tensor
    selection: Tensor


def cmpose_loss(
    output: CMPoseOutput,
    centers: Tensor,
    weight: Tensor,
    config: ModelConfig,
    *,
    joints: Tensor | None = None,
) -> Losses:
    """L = L_H + λ (L_M + L_N) + μ L_S of a batch: Eq. 14 and the term for the selection.

    Args:
        output: of ``CMPose`` with a seed.
        centers: [B, K, 2], the joints in heatmap pixels.
        weight: [B, K], 0 for joints without a loss.
        config: λ, μ, σ and how the terms are averaged.
        joints: what the pose loss is divided by in place of the sum of ``weight``. With it the
            gradients of several processes or micro-batches add up to those of the whole batch.

    Returns:
        The terms and their sum; a term that is off is zero.
    """

    def pose_loss(heatmaps: Tensor) -> Tensor:
        return ops.heatmap_loss(
            heatmaps, centers, weight, config.sigma, normalizer=joints, backend=config.backend
        )

    def reconstruction_loss(task: Reconstruction | None) -> Tensor:
        if task is None or task.prediction.shape[1] == 0:
            return pose.new_zeros(())
        prediction, target, corrupted = task.prediction, output.coarse.features, task.corrupted
        if task.tokens is not None:
            # The op takes frames of tokens: a clip's corrupted tokens are one.
            prediction = prediction[:, None]
            target = gather_tokens(target.flatten(1, 2), task.tokens)[:, None]
            corrupted = torch.ones_like(task.tokens, dtype=torch.bool)[:, None]
        return ops.reconstruction_loss(
            prediction,
            target,
            corrupted,
            per_channel=config.per_channel,
            detach_target=config.detach_target,
            backend=config.backend,
        )

    pose = pose_loss(output.heatmaps)
    mask = reconstruction_loss(output.coarse.mask)
    noise = reconstruction_loss(output.coarse.noise)
    selection = pose.new_zeros(())
    if output.fine is not None and config.selection_weight > 0:
        grid = (config.image_size[0] // PATCH, config.image_size[1] // PATCH)
        height, width = output.heatmaps.shape[-2:]
        scores = output.fine.selection.scores
        selection = pose_loss(score_heatmaps(scores, grid, (height, width)))
    total = (
        pose + config.reconstruction_weight * (mask + noise) + config.selection_weight * selection
    )
    return Losses(total, pose, mask, noise, selection)
