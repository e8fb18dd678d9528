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
    total = weight.new_zeros(batch, num_clusters).scatter_add_(1, assignment, weight)
    share, empty = weight, None
    if normalize:
        divisor = total.gather(1, assignment)
        if not weight.min().item() > 0:  # some are 0, negative or NaN: a sum may be 0
            empty = total == 0
            divisor.masked_fill_(divisor == 0, torch.inf)
        share = weight / divisor
    order, starts = bags.sorted_bags(assignment, num_clusters)
    token = tokens.to(wide).reshape(batch * size, width)
    merged = bags.sums(token, order, starts, share.flatten().index_select(0, order))
    merged = merged.view(batch, num_clusters, width)
    if empty is not None:  # where weights sum to 0 tokens may be NaN
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
    """The gradients, as the reference's, without need of ``exact``; what is not wanted is empty."""
    wide, width = total.dtype, tokens.shape[2]
    d_tokens, d_weights = tokens.new_empty(0), weights.new_empty(0)
    if not tokens.numel():
        return (
            tokens.new_zeros(tokens.shape) if want_tokens else d_tokens,
            weights.new_zeros(weights.shape) if want_weights else d_weights,
        )
    rows = bags.flat(assignment, total.shape[1])
    each = torch.arange(len(rows))
    gradient = d_merged.to(wide).reshape(-1, width).contiguous()
    share = weights.to(wide).flatten()
    divisor = total.flatten().index_select(0, rows) if normalize else torch.ones_like(share)
    nothing = None if divisor.min().item() > 0 else divisor == 0  # most often there is none
    if nothing is not None:
        divisor.masked_fill_(nothing, torch.inf)
    share = share / divisor
    if want_weights:
        token = tokens.to(wide).reshape(-1, width).contiguous()
        dot = bags.dots(gradient, token, each, rows)
        if normalize:  # g_c · F_c, from the same products: F_c is the sum of the shares of f_j
            own = total.new_zeros(total.numel()).scatter_add_(0, rows, share * dot)
            dot = dot - own.index_select(0, rows)
        dot = dot / divisor
        if nothing is not None:
            dot.masked_fill_(nothing, 0.0)
        d_weights = dot.view(weights.shape).to(weights.dtype)
    if want_tokens:
        d_tokens = bags.sums(gradient, rows, each, share).view(tokens.shape).to(tokens.dtype)
    return d_tokens, d_weights
