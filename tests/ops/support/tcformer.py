"""TCFormer's clustering and merging step by step, as published, to compare with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def cluster(tokens: Tensor, k: int, num_clusters: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """TCFormer's formulation without its tie-breaking noise, on densities instead of their logs."""
    distance = torch.cdist(tokens, tokens, compute_mode="donot_use_mm_for_euclid_dist") / math.sqrt(
        tokens.shape[-1]
    )
    nearest = distance.sort(dim=-1).values[..., :k]
    density = torch.exp(-(nearest**2).mean(dim=-1))
    denser = density[:, None, :] > density[:, :, None]
    highest = distance.flatten(1).max(dim=1).values[:, None, None]
    delta = torch.where(denser, distance, highest).min(dim=-1).values
    centers = (density * delta).topk(num_clusters, dim=-1).indices
    assignment = torch.stack(
        [d[:, c].argmin(dim=-1) for d, c in zip(distance, centers, strict=True)]
    )
    for b, center in enumerate(centers):
        assignment[b, center] = torch.arange(num_clusters)
    return density, delta, centers, assignment


def merge(
    x: Tensor,
    weight: Tensor,
    cluster_index: Tensor,
    num_clusters: int,
    token_index: Tensor,
    aggregated: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Merged tokens [B, L, C], each initial token's cluster [B, N0] and its share in it [B, N0, 1].

    Args:
        x: [B, N, C].
        weight: [B, N, 1].
        cluster_index: [B, N].
        num_clusters: L.
        token_index: [B, N0], which of the N tokens each initial token went to.
        aggregated: [B, N0, 1], its share in that.
    """
    batch, _, width = x.shape
    merged, index, share = [], [], []
    for b in range(batch):
        total = torch.zeros(num_clusters, 1, dtype=x.dtype)
        total.index_add_(0, cluster_index[b], weight[b])
        part = weight[b] / (total + 1e-6)[cluster_index[b]]
        tokens = torch.zeros(num_clusters, width, dtype=x.dtype)
        merged.append(tokens.index_add(0, cluster_index[b], x[b] * part))
        index.append(cluster_index[b][token_index[b]])
        share.append(aggregated[b] * part[token_index[b]])
    return torch.stack(merged), torch.stack(index), torch.stack(share)
