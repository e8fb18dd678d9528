"""What the model read a pose from, as the drawings take it."""

from __future__ import annotations

from dataclasses import replace

from cmpose.models.cmpose import CMPose, CMPoseOutput
from cmpose.viz.explain import Tokens


def clip_tokens(model: CMPose, output: CMPoseOutput, row: int) -> Tokens | None:
    """The tokens of clip ``row`` of a batch; None without Fine Token Enhancement."""
    fine = output.fine
    if fine is None:
        return None
    scores = fine.selection.scores[row].float().cpu()
    tokens = Tokens(
        grid=model.backbone.grid,
        scores=scores.numpy(),
        top=scores.topk(model.config.tokens_per_keypoint, dim=-1).indices.numpy(),
        causal=fine.selection.causal[row].cpu().numpy(),
        noncausal=fine.selection.noncausal[row].cpu().numpy(),
    )
    if fine.clusters is None:
        return tokens
    return replace(
        tokens,
        assignment=fine.clusters.assignment[row].cpu().numpy(),
        centers=fine.clusters.centers[row].cpu().numpy(),
    )
