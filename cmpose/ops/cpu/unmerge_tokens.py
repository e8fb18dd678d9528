"""Every cell of the grid takes one row of the causal and merged tokens; its gradient is a bag's."""

from __future__ import annotations

import torch
from torch import Tensor

from cmpose.ops.cpu import bags


def forward(
    causal: Tensor,
    merged: Tensor,
    causal_index: Tensor,
    noncausal_index: Tensor,
    assignment: Tensor,
) -> Tensor:
    """The grid [B, C+M, D]."""
    batch, count, width = causal.shape
    source = torch.cat((causal, merged), dim=1)
    row_of = assignment.new_zeros(batch, count + assignment.shape[1])
    row_of.scatter_(1, causal_index, torch.arange(count).expand(batch, count))
    row_of.scatter_(1, noncausal_index, assignment + count)
    rows = source.flatten(0, 1).index_select(0, bags.flat(row_of, source.shape[1]))
    return rows.view(batch, row_of.shape[1], width)


def backward(
    d_tokens: Tensor,
    causal_index: Tensor,
    noncausal_index: Tensor,
    assignment: Tensor,
    num_clusters: int,
    want_causal: bool,
    want_merged: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients to causal and merged; what is not wanted is empty."""
    batch, cells, width = d_tokens.shape
    rows = d_tokens.reshape(batch * cells, width)
    d_causal, d_merged = d_tokens.new_empty(0), d_tokens.new_empty(0)
    if want_causal:
        d_causal = rows.index_select(0, bags.flat(causal_index, cells))
        d_causal = d_causal.view(batch, causal_index.shape[1], width)
    if want_merged:
        order, starts = bags.sorted_bags(assignment, num_clusters)
        cell = bags.flat(noncausal_index, cells).index_select(0, order)
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        d_merged = bags.sums(wide, cell, starts).view(batch, num_clusters, width).to(rows.dtype)
    return d_causal, d_merged
