"""Clusters as the bags of an embedding, whose weighted sums need no weighted copy of the tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from cmpose.ops.cpu import bags


def forward(
    tokens: Tensor, weights: Tensor, assignment: Tensor, num_clusters: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    """The merged tokens [B, L, D] before they are rounded, and the sums of weights [B, L]."""
    wide = torch.promote_types(torch.promote_types(tokens.dtype, weights.dtype), torch.float32)
    batch, size, width = tokens.shape
    if not tokens.numel():
        merged = tokens.new_zeros(batch, num_clusters, width, dtype=wide)
        return merged, tokens.new_zeros(batch, num_clusters, dtype=wide)
    weight = weights.to(wide)
    order, starts = bags.sorted_bags(assignment, num_clusters)
    merged = bags.sums(
        tokens.to(wide).reshape(batch * size, width),
        order,
        starts,
        weight.flatten().index_select(0, order),
    ).view(batch, num_clusters, width)
    total = weight.new_zeros(batch, num_clusters).scatter_add_(1, assignment, weight)
    if normalize:
        empty = total == 0
        merged.div_(total.masked_fill(empty, torch.inf)[..., None])
        if not weight.min().item() > 0:  # where weights sum to 0 tokens may be NaN
            merged.masked_fill_(empty[..., None], 0.0)
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
    wide, width = total.dtype, tokens.shape[2]
    d_tokens, d_weights = tokens.new_empty(0), weights.new_empty(0)
    if not tokens.numel():
        return (
            tokens.new_zeros(tokens.shape) if want_tokens else d_tokens,
            weights.new_zeros(weights.shape) if want_weights else d_weights,
        )
    rows = bags.flat(assignment, total.shape[1])
    gradient = d_merged.to(wide).reshape(-1, width).contiguous()
    divisor = total.gather(1, assignment) if normalize else torch.ones_like(weights, dtype=wide)
    nothing = divisor == 0
    divisor.masked_fill_(nothing, torch.inf)
    if want_weights:
        token = tokens.to(wide).reshape(-1, width).contiguous()
        dot = bags.dots(gradient, token, rows).view(assignment.shape)
        if normalize:
            merged = exact.to(wide).reshape(-1, width).contiguous()
            dot -= bags.dots(gradient, merged).view(total.shape).gather(1, assignment)
        d_weights = (dot / divisor).masked_fill_(nothing, 0.0).to(weights.dtype).contiguous()
    if want_tokens:
        scale = (weights.to(wide) / divisor).flatten()
        d_tokens = bags.sums(gradient, rows, torch.arange(len(rows)), scale)
        d_tokens = d_tokens.view(tokens.shape).to(tokens.dtype)
    return d_tokens, d_weights
