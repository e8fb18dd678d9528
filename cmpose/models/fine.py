"""Fine Token Enhancement: the causal tokens are selected, the others clustered and merged."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from cmpose import ops
from cmpose.config import ModelConfig
from cmpose.models.layers import LayerNorm, Linear
from cmpose.models.vit import NORM_EPS
from cmpose.ops import ClusterResult, SelectedTokens

LEAST_IMPORTANCE = 1e-30
"""The least s_j that a token has. Where no keypoint attends a token, the softmax underflows: a
cluster of such tokens would vanish instead of being their mean, and 1 / Σ s_j in its gradient would
exceed float32's range."""


class FineOutput(NamedTuple):
    """Results of the second stage.

    ``grid`` [B, N, D] has the tokens back in their cells, with ``identity_start`` blended with what
    came in; ``fine`` [B, nK + L, D] has the causal
    tokens, then the merged ones. ``selection`` tells causal tokens from the others, ``clusters``
    which cluster each of the others is in (None without merging).
    """

    grid: Tensor
    fine: Tensor
    selection: SelectedTokens
    clusters: ClusterResult | None


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """The tokens at ``index``: tokens [B, N, D], index [B, M] → [B, M, D]."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def score_heatmaps(scores: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Scores [B, K, N] over the token grid, enlarged to heatmaps [B, K, h, w].

    A keypoint whose whole weight is on one token has a peak there, of height 1 at most. The result
    is that of ``interpolate(mode="bilinear")``, as two matrix products, whose gradient is matrix
    products too. Of interpolate's gradient Inductor would make an accumulating index_put, which is
    atomic on a card.
    """
    rows, columns = (_enlarging(few, many, scores) for few, many in zip(grid, size, strict=True))
    return rows @ scores.unflatten(-1, grid) @ columns.mT


def _enlarging(few: int, many: int, like: Tensor) -> Tensor:
    """The weights [many, few] by which ``few`` pixels are enlarged to ``many``, linearly between
    pixels' centres and constant beyond the outer ones."""
    pixel = torch.arange(many, device=like.device, dtype=torch.float32)
    position = ((pixel + 0.5) * (few / many) - 0.5).clamp(0, few - 1)
    distance = position[:, None] - torch.arange(few, device=like.device)
    return (1 - distance.abs()).clamp(min=0).to(like.dtype)


class FineTokenEnhancement(nn.Module):
    """Token Causal Importance Selection and Non-Causal Token Clustering (Eqs. 7–11).

    The keypoint tokens attend the fused patch tokens, S = softmax(Q Kᵀ / √D) [B, K, N]. Every
    keypoint's top-n tokens are causal, n·K in all. DPC-kNN groups the others into L clusters; each
    cluster becomes one token, the mean of its tokens f_j weighted by their importance s_j.

    With ``identity_start`` the grid is f + g · (fine − f): the gate g, a learned number, starts at
    0, where the tokens f pass through.
    """

    def __init__(self, width: int, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.norm_keypoints = LayerNorm(width, eps=NORM_EPS)
        self.norm_tokens = LayerNorm(width, eps=NORM_EPS)
        self.query = Linear(width, width)
        self.key = Linear(width, width)
        # [1], since FSDP2 takes no scalars.
        self.gate = nn.Parameter(torch.zeros(1)) if config.identity_start else None

    def forward(self, tokens: Tensor, keypoint_tokens: Tensor) -> FineOutput:
        """tokens [B, N, D], keypoint_tokens [B, K, D]."""
        selection = self._select(tokens, keypoint_tokens)
        causal = gather_tokens(tokens, selection.causal)
        if self.config.fine == "causal_only":
            cells = selection.causal.unsqueeze(-1).expand_as(causal)
            grid = torch.zeros_like(tokens).scatter(1, cells, causal)
            return FineOutput(self._blend(tokens, grid), causal, selection, None)
        clusters, merged = self._cluster(tokens, selection)
        grid = ops.unmerge_tokens(
            causal, merged, selection, clusters.assignment, backend=self.config.backend
        )
        fine = torch.cat([causal, merged], dim=1)
        return FineOutput(self._blend(tokens, grid), fine, selection, clusters)

    def _blend(self, tokens: Tensor, grid: Tensor) -> Tensor:
        """The grid as far as the gate is open, [B, N, D]."""
        if self.gate is None:
            return grid
        return tokens + self.gate.to(tokens.dtype) * (grid - tokens)

    def _select(self, tokens: Tensor, keypoint_tokens: Tensor) -> SelectedTokens:
        """S = softmax(Q Kᵀ / √D), and each keypoint's top-n tokens (Eqs. 7 and 8)."""
        query = self.query(self.norm_keypoints(keypoint_tokens))
        key = self.key(self.norm_tokens(tokens))
        logits = query @ key.transpose(1, 2) * tokens.shape[-1] ** -0.5
        c = self.config
        return ops.select_tokens(
            logits, c.tokens_per_keypoint, importance=c.importance, backend=c.backend
        )

    def _cluster(self, tokens: Tensor, selection: SelectedTokens) -> tuple[ClusterResult, Tensor]:
        """Clusters of the non-causal tokens (Eqs. 9 and 10), and each merged into one (Eq. 11)."""
        c = self.config
        noncausal = gather_tokens(tokens, selection.noncausal)
        weights = selection.importance.gather(1, selection.noncausal).clamp_min(LEAST_IMPORTANCE)
        return ops.dpc_knn_merge(
            noncausal,
            weights.to(noncausal.dtype),
            c.neighbors,
            c.num_clusters,
            scale=c.scale_distance,
            include_self=c.include_self,
            peak_delta=c.peak_delta,
            normalize=c.normalize_merge,
            backend=c.backend,
        )
