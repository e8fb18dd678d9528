"""Sums of clusters by index_add, which on a CPU adds in the order of the index."""

from __future__ import annotations

import torch
from torch import Tensor


def _rows(assignment: Tensor, num_clusters: int) -> Tensor:
    """The clusters of all clips in one list: [B, M] → [B·M]."""
    first = torch.arange(len(assignment))[:, None] * num_clusters
    return (assignment + first).flatten()


def forward(
    tokens: Tensor, weights: Tensor, assignment: Tensor, num_clusters: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    """The merged tokens [B, L, D] before they are rounded, and the sums of weights [B, L]."""
    wide = torch.promote_types(torch.promote_types(tokens.dtype, weights.dtype), torch.float32)
    batch, _, width = tokens.shape
    weight = weights.to(wide)
    values = (tokens.to(wide) * weight[..., None]).flatten(0, 1)
    rows = _rows(assignment, num_clusters)
    merged = values.new_zeros(batch * num_clusters, width).index_add_(0, rows, values)
    merged = merged.view(batch, num_clusters, width)
    total = weight.new_zeros(batch, num_clusters).scatter_add_(1, assignment, weight)
    if normalize:
        empty = total == 0
        if bool(empty.any()):
            merged[empty] = 0.0
        merged.div_(total.masked_fill(empty, 1.0)[..., None])
    return merged, total


# Many parameters: those of the registered op.
def backward(
    d_merged: Tensor,
    tokens: Tensor,
    weights: Tensor,
    assignment: Tensor,
    total: Tensor,
    exact: Tensor,
    normalize: bool,
    want_tokens: bool,
    want_weights: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients, as the reference's; what is not wanted is empty."""
    wide, num_clusters = total.dtype, total.shape[1]
    rows = _rows(assignment, num_clusters)
    gradient = d_merged.to(wide).flatten(0, 1).index_select(0, rows)
    gradient = gradient.view(tokens.shape)
    divisor = total.gather(1, assignment) if normalize else torch.ones_like(weights, dtype=wide)
    nothing = divisor == 0
    divisor = divisor.masked_fill(nothing, 1.0)
    d_tokens, d_weights = tokens.new_empty(0), weights.new_empty(0)
    if want_weights:
        dot = (gradient * tokens).sum(dim=2)
        if normalize:
            dot -= (d_merged * exact.to(wide)).sum(dim=2).gather(1, assignment)
        d_weights = (dot / divisor).masked_fill_(nothing, 0.0).to(weights.dtype)
    if want_tokens:
        scale = (weights.to(wide) / divisor).masked_fill_(nothing, 0.0)
        d_tokens = gradient.mul_(scale[..., None]).to(tokens.dtype)
    return d_tokens, d_weights
