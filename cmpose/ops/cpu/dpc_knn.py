"""Density peaks by matrix products: up to 2,048 tokens all d² are kept, beyond that none are.

Of a longer clip one pass over the blocks of d² keeps the nearest of every token. A token's δ is the
distance to the first of them that is denser, its cluster that of the first that is a centre. Only
tokens that have none among their nearest need their row of d² again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cmpose.ops import distances
from cmpose.ops.cpu import distances as blocks
from cmpose.ops.cpu.distances import (
    Clips,
    clips_at_once,
    full_precision,
    joined,
    keeps_matrix,
    masked_matrix,
    nearest_in_order,
    nearest_of_few,
    nearest_of_many,
    smallest_values,
)
from cmpose.ops.distances import INF

Result = tuple[Tensor, ...]
"""log ρ, δ, centres, clusters; d² and indices of the neighbours, empty unless they are wanted."""

_NEAREST = 8
"""So many neighbours of every token of a long clip are kept at least: mostly one of 8 is denser."""


# Many parameters: those of the registered op.
def forward(
    tokens: Tensor,
    valid: Tensor | None,
    k: int,
    num_clusters: int,
    scale: bool,
    include_self: bool,
    peak_delta: str,
    want_neighbors: bool,
) -> Result | None:
    """The results, d² not divided by D; None where finite tokens are too far apart for d²."""
    unit = float(tokens.shape[2]) if scale else 1.0
    options = k, num_clusters, unit, include_self, peak_delta == "global_max", want_neighbors
    find = _of_few if keeps_matrix(tokens) else _of_many
    results = []
    with full_precision():
        for some in clips_at_once(tokens):
            clips = Clips.of(tokens[some], None if valid is None else valid[some])
            if clips is None:
                return None
            results.append(find(clips, *options))
    return joined(results)


def _of_few(
    clips: Clips,
    k: int,
    num_clusters: int,
    unit: float,
    include_self: bool,
    global_max: bool,
    want_neighbors: bool,
) -> Result:
    """The results from the matrix of d²; what invalid tokens need is left out where none is."""
    square, valid, every = clips.distances.matrix(), clips.usable, clips.every
    others = masked_matrix(clips, square, include_self)
    index = None
    if want_neighbors:
        near, index = nearest_of_few(others, k)
    else:
        near = smallest_values(others, k)
    log_density = distances.log_density_of(near, None if every else valid, unit)

    order, rank = distances.order_of(log_density)
    # These sums make d² to tokens later in the order, and to the token itself, too large to be the
    # least. Comparing positions and choosing by them would take five times as long.
    position = rank.to(square.dtype)
    later = ((position + 1)[:, None] - position[:, :, None]).clamp_(min=0)
    delta = torch.add(square, later, alpha=torch.finfo(square.dtype).max).amin(dim=2)
    clip = torch.arange(len(rank))[:, None]
    farthest = square if global_max else square[clip, order[:, :1]]
    if not every:
        pairs = valid[:, :, None] & valid[:, None] if global_max else valid[:, None]
        farthest = farthest.masked_fill(~pairs, 0.0)
    delta = torch.where(rank == 0, farthest.amax(dim=(1, 2))[:, None], delta)
    delta = (delta.masked_fill(~valid, 0.0) / unit).sqrt()

    centers = distances.centers_of(log_density, delta, None if every else valid, num_clusters)
    to_centers = square[clip, centers]  # as d² is symmetric
    if not every:
        to_centers.masked_fill_(~valid.gather(1, centers)[..., None], INF)
    nearest = _first_of_least(to_centers).masked_fill_(~clips.finite, 0)
    clusters = distances.with_own_clusters(nearest, centers, valid)
    neighbors = _none(near) if index is None else (near, index)
    return log_density, delta, centers, clusters, *neighbors


def _first_of_least(rows: Tensor) -> Tensor:
    """``rows.argmin(dim=1)`` of [B, L, M], whose columns it takes together."""
    farther = (rows != rows.amin(dim=1, keepdim=True)).to(torch.int32)
    index = torch.arange(rows.shape[1], dtype=torch.int32)[:, None]
    return farther.mul_(rows.shape[1]).add_(index).amin(dim=1).to(torch.int64)


def _none(near: Tensor) -> tuple[Tensor, Tensor]:
    return near.new_empty(0), near.new_empty(0, dtype=torch.int64)


def _of_many(
    clips: Clips,
    k: int,
    num_clusters: int,
    unit: float,
    include_self: bool,
    global_max: bool,
    want_neighbors: bool,
) -> Result:
    """From the nearest of every token, of one clip: [1, M, D]."""
    d, valid = clips.distances, clips.usable
    candidates = nearest_of_many(clips, min(max(k + 1, _NEAREST), valid.shape[1]))
    near, index = candidates.square, candidates.indices
    density = near[..., : k - include_self]
    if include_self:
        density = torch.cat(
            (torch.where(valid, 0.0, INF)[..., None].to(near.dtype), density), dim=2
        )
    log_density = distances.log_density_of(density, valid, unit)

    order, rank = distances.order_of(log_density)
    denser = rank[0, index] < rank[..., None]
    delta = near.masked_fill(~denser, INF).amin(dim=2)
    step = blocks.rows_at_once(valid.shape[1])
    for some in ((delta == INF) & valid)[0].nonzero()[:, 0].split(step):
        square = d.block(some, slice(None), some)
        later = rank[0] >= rank[0, some, None]
        delta[0, some] = square.masked_fill_(later, INF).amin(dim=2)[0]
    peak = order[0, :1]
    farthest = candidates.farthest if global_max else d.block(peak, slice(None), peak)
    delta[0, peak] = farthest.masked_fill(~valid, 0.0).amax()
    delta = (delta.masked_fill(~valid, 0.0) / unit).sqrt()

    centers = distances.centers_of(log_density, delta, valid, num_clusters)
    real = centers[valid.gather(1, centers)]
    cluster_of = torch.full_like(rank[0], num_clusters)
    cluster_of[real] = torch.arange(len(real))
    # A centre that is none of the nearest is no nearer than the last of them.
    cluster = cluster_of[index]
    to_center = near.masked_fill(cluster == num_clusters, INF)
    least = to_center.amin(dim=2, keepdim=True)
    nearest = cluster.masked_fill(to_center > least, num_clusters).amin(dim=2)
    open_ = (least >= near[..., -1:])[..., 0] & (cluster_of == num_clusters)
    nearest.masked_fill_(open_, 0)
    if len(real):
        for some in open_[0].nonzero()[:, 0].split(step):
            nearest[0, some] = d.block(some, real, None)[0].argmin(dim=1)
    nearest = nearest.masked_fill(~clips.finite, 0)
    clusters = distances.with_own_clusters(nearest, centers, valid)
    neighbors = (
        nearest_in_order(clips, candidates, k, include_self) if want_neighbors else _none(near)
    )
    return log_density, delta, centers, clusters, *neighbors
