"""Fine Token Enhancement: pick the causal tokens, cluster and merge the others."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmpose import ops
from cmpose.config import ModelConfig
from cmpose.models.layers import LayerNorm, Linear
from cmpose.ops import ClusterResult, SelectedTokens

LEAST_IMPORTANCE = 1e-30
"""s_j of a token that no keypoint attends. The softmax underflows: a cluster of such tokens would
vanish instead of being their mean, and its gradient's 1 / Σ s_j would pass float32's range."""


class FineOutput(NamedTuple):
    """What the second stage hands to the head.

    grid [B, N, D]: tokens back in their cells; fine [B, nK + L, D]: causal tokens, then merged
    ones; selection and clusters say who is what (clusters is None without merging).
    """

    grid: Tensor
    fine: Tensor
    selection: SelectedTokens
    clusters: ClusterResult | None


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens [B, N, D], index [B, M] → [B, M, D]."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def score_heatmaps(scores: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Scores [B, K, N] over the token grid, enlarged to heatmaps [B, K, h, w].

    All of a row's weight on one token makes a blob of height 1 there.
    """
    return nn.functional.interpolate(scores.unflatten(-1, grid), size=size, mode="bilinear")


class FineTokenEnhancement(nn.Module):
    """Token Causal Importance Selection and Non-Causal Token Clustering (Eqs. 7–11).

    The keypoint tokens attend the fused patch tokens, S = softmax(Q Kᵀ / √D) [B, K, N]. Every
    keypoint's top-n tokens are causal, n·K in all; DPC-kNN groups the rest into L clusters, each
    merged into one token weighted by the importance s_j.
    """

    def __init__(self, width: int, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.norm_keypoints = LayerNorm(width, eps=1e-6)
        self.norm_tokens = LayerNorm(width, eps=1e-6)
        self.query = Linear(width, width)
        self.key = Linear(width, width)

    def forward(self, tokens: Tensor, keypoint_tokens: Tensor) -> FineOutput:
        """tokens [B, N, D], keypoint_tokens [B, K, D]."""
        c = self.config
        query = self.query(self.norm_keypoints(keypoint_tokens))
        key = self.key(self.norm_tokens(tokens))
        logits = query @ key.transpose(1, 2) * tokens.shape[-1] ** -0.5
        selection = ops.select_tokens(
            logits, c.tokens_per_keypoint, importance=c.importance, backend=c.backend
        )
        causal = gather_tokens(tokens, selection.causal)
        if c.fine == "causal_only":
            index = selection.causal.unsqueeze(-1).expand_as(causal)
            grid = torch.zeros_like(tokens).scatter(1, index, causal)
            return FineOutput(grid, causal, selection, None)

        rest = gather_tokens(tokens, selection.noncausal)
        weights = selection.importance.gather(1, selection.noncausal).clamp_min(LEAST_IMPORTANCE)
        clusters, merged = ops.dpc_knn_merge(
            rest,
            weights.to(rest.dtype),
            c.neighbors,
            c.num_clusters,
            scale=c.scale_distance,
            include_self=c.include_self,
            peak_delta=c.peak_delta,
            normalize=c.normalize_merge,
            backend=c.backend,
        )
        grid = ops.unmerge_tokens(causal, merged, selection, clusters.assignment, backend=c.backend)
        return FineOutput(grid, torch.cat([causal, merged], dim=1), selection, clusters)
