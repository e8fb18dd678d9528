"""Distances between the tokens of a clip, and what density peaks are found from them.

The reference of ``dpc_knn`` and ``knn`` is written with these, and so are their paths for a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

INF = float("inf")

METRICS = ("euclidean", "cosine")

# How many differences are held at once: so many that a CPU's cache holds them, more on a GPU.
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}


def squared_distances(x: Tensor) -> Tensor:
    """‖x_i − x_j‖² from the differences themselves: [B, M, D] → [B, M, M].

    Unlike |x|² + |y|² − 2xy this subtracts no large numbers from each other: duplicates and the
    diagonal are exactly 0, the matrix is symmetric, and small whole numbers give whole numbers.
    """

    def rows(part: Tensor) -> Tensor:
        return (part[:, :, None] - x[:, None]).square().sum(dim=-1)

    if torch.compiler.is_compiling():
        return rows(x)  # Inductor fuses this; it would unroll a loop
    chunk = _CHUNK.get(x.device.type, _CHUNK["cuda"])
    step = max(1, chunk // max(1, x.numel()))
    # Written into one tensor: small results between the chunks' large ones would fragment the heap.
    square = x.new_empty(x.shape[0], x.shape[1], x.shape[1])
    for start in range(0, x.shape[1], step):
        square[:, start : start + step] = rows(x[:, start : start + step])
    return square


def unit_tokens(tokens: Tensor) -> Tensor:
    """Tokens of length 1, in float32 or float64: ‖u_i − u_j‖² is twice their cosine distance.

    A token of zeros has no direction and stays as it is. One with a NaN or infinity has a NaN.
    """
    x = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    largest = x.abs().amax(dim=-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    # Divided by the largest channel first, so that no square overflows, and not all underflow.
    x = x / largest.masked_fill(largest == 0, 1.0)
    length = x.square().sum(dim=-1, keepdim=True).sqrt()
    return x / length.masked_fill(length == 0, 1.0)


def usable_tokens(tokens: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens in float32 or float64, zero where they are not finite; which are finite; which of
    those are valid too. Nothing may be made of the distances to the others."""
    finite = tokens.isfinite().all(dim=-1)
    x = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    return (
        x.masked_fill(~finite[..., None], 0.0),
        finite,
        finite if valid is None else finite & valid,
    )


def masked(square: Tensor, finite: Tensor, valid: Tensor, include_self: bool) -> Tensor:
    """d² [B, M, M], infinite to tokens that are nobody's neighbours and from those not finite."""
    square = square.masked_fill(~(valid[:, None, :] & finite[:, :, None]), INF)
    if include_self:
        return square
    itself = torch.eye(square.shape[-1], dtype=torch.bool, device=square.device)
    return square.masked_fill(itself, INF)


def in_order(masked: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Of d² [B, M, M] each row's k smallest and their places [B, M, k], by (d², index)."""
    values, places = masked.sort(dim=-1, stable=True)
    return values[..., :k], own_where_missing(values[..., :k], places[..., :k])


def own_where_missing(values: Tensor, places: Tensor) -> Tensor:
    """``places`` [B, M, k], but the row's own token where the distance is infinite."""
    own = torch.arange(values.shape[1], device=values.device)[:, None]
    return torch.where(values == INF, own, places)


# -- density peaks --------------------------------------------------------------------------------


def log_density_of(near: Tensor, valid: Tensor | None, unit: float) -> Tensor:
    """Eq. 9: −mean of the nearest d² that are finite, over ``unit``: [B, M, k], [B, M] → [B, M].

    Without ``valid`` all tokens are, and all d² are finite.
    """
    if valid is None:
        return -(near.sum(dim=-1) / (near.shape[-1] * unit))
    count = (near < INF).sum(dim=-1).clamp(min=1)
    # The division comes last, so that equal sums stay equal.
    mean = near.masked_fill(near == INF, 0.0).sum(dim=-1) / (count * unit)
    return (-mean).masked_fill(~valid, -INF)


def order_of(log_density: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens in the order (log ρ descending, index ascending), and each token's place in it:
    twice [B, M] int64."""
    order = log_density.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return order, torch.empty_like(order).scatter(1, order, places)


def centers_of(
    log_density: Tensor, delta: Tensor, valid: Tensor | None, num_clusters: int
) -> Tensor:
    """The tokens with the largest log ρ + log δ, valid ones first: [B, L] int64.

    Without ``valid`` all are.
    """
    score = log_density + delta.log()
    ranking = score.argsort(dim=-1, descending=True, stable=True)
    if valid is not None:
        # Invalid tokens come after all valid ones, of which some can have a score of −inf too.
        first = valid.gather(1, ranking).to(torch.int8)
        ranking = ranking.gather(1, first.argsort(dim=-1, descending=True, stable=True))
    return ranking[:, :num_clusters].contiguous()


def with_own_clusters(nearest: Tensor, centers: Tensor, valid: Tensor) -> Tensor:
    """The nearest centres [B, M], but each valid centre in its own cluster."""
    own = torch.arange(centers.shape[1], device=centers.device).expand_as(centers)
    own = torch.where(valid.gather(1, centers), own, nearest.gather(1, centers))
    return nearest.scatter(1, centers, own)
