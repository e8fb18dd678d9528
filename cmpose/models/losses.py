"""The training loss, Eq. 14: L = L_H + λ (L_M + L_N)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from cmpose import ops
from cmpose.config import ModelConfig
from cmpose.models.cmpose import CMPoseOutput


class Losses(NamedTuple):
    """Scalars: the sum that is minimised, and its terms before λ (zero for a task that is off)."""

    total: Tensor
    pose: Tensor
    mask: Tensor
    noise: Tensor


def cmpose_loss(
    output: CMPoseOutput,
    centers: Tensor,
    weight: Tensor,
    config: ModelConfig,
    *,
    joints: Tensor | None = None,
) -> Losses:
    """Eq. 14 on a training batch.

    Args:
        output: of ``CMPose`` with a seed.
        centers: [B, K, 2], the joints in heatmap pixels.
        weight: [B, K], 0 for joints without a loss.
        config: λ, σ and the reductions.
        joints: what the pose loss divides by instead of the sum of ``weight``; with it the
            gradients of several processes or micro-batches add up to those of the whole batch.
    """
    pose = ops.heatmap_loss(
        output.heatmaps,
        centers,
        weight,
        config.sigma,
        normalizer=joints,
        backend=config.backend,
    )
    terms = []
    for task in (output.coarse.mask, output.coarse.noise):
        if task is None:
            terms.append(pose.new_zeros(()))
            continue
        terms.append(
            ops.reconstruction_loss(
                task.prediction,
                output.coarse.features,
                task.corrupted,
                per_channel=config.per_channel,
                detach_target=config.detach_target,
                backend=config.backend,
            )
        )
    total = pose + config.reconstruction_weight * (terms[0] + terms[1])
    return Losses(total, pose, *terms)
