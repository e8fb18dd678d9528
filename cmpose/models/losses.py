"""The training loss, Eq. 14 and a term for the selection: L = L_H + λ (L_M + L_N) + μ L_S."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cmpose import ops
from cmpose.config import ModelConfig
from cmpose.models.cmpose import CMPoseOutput
from cmpose.models.coarse import Reconstruction
from cmpose.models.fine import score_heatmaps
from cmpose.models.vit import PATCH


class Losses(NamedTuple):
    """Scalars: the sum that is minimised, and its terms before λ and μ (zero where off).

    ``selection`` is the pose loss L_S of the scores that select causal tokens, enlarged to
    heatmaps: the selection itself passes no gradient, and nothing else teaches the scores where a
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
    """Eq. 14, and μ L_S, on a training batch.

    Args:
        output: of ``CMPose`` with a seed.
        centers: [B, K, 2], the joints in heatmap pixels.
        weight: [B, K], 0 for joints without a loss.
        config: λ, μ, σ and the reductions.
        joints: what the pose loss divides by instead of the sum of ``weight``; with it the
            gradients of several processes or micro-batches add up to those of the whole batch.
    """

    def pose_loss(heatmaps: Tensor) -> Tensor:
        return ops.heatmap_loss(
            heatmaps, centers, weight, config.sigma, normalizer=joints, backend=config.backend
        )

    def reconstruction(task: Reconstruction | None) -> Tensor:
        if task is None:
            return pose.new_zeros(())
        return ops.reconstruction_loss(
            task.prediction,
            output.coarse.features,
            task.corrupted,
            per_channel=config.per_channel,
            detach_target=config.detach_target,
            backend=config.backend,
        )

    pose = pose_loss(output.heatmaps)
    mask = reconstruction(output.coarse.mask)
    noise = reconstruction(output.coarse.noise)
    total = pose + config.reconstruction_weight * (mask + noise)
    selection = pose.new_zeros(())
    if output.fine is not None and config.selection_weight > 0:
        grid = (config.image_size[0] // PATCH, config.image_size[1] // PATCH)
        scores = output.fine.selection.scores
        height, width = output.heatmaps.shape[-2:]
        selection = pose_loss(score_heatmaps(scores, grid, (height, width)))
        total = total + config.selection_weight * selection
    return Losses(total, pose, mask, noise, selection)
