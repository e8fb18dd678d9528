"""One token a cluster: the weighted sum of Eq. 11."""

from __future__ import annotations

import torch
from torch import Tensor

from cmpose.ops import backends, checks


def _sums(values: Tensor, assignment: Tensor, num_clusters: int) -> Tensor:
    """Sums over each cluster's tokens in index order: [B, M, D] → [B, L, D]."""
    batch, _, width = values.shape
    clip = torch.arange(batch, device=values.device)[:, None].expand_as(assignment)
    # Unlike index_add, index_put accumulates in a fixed order on every device.
    empty = values.new_zeros(batch, num_clusters, width)
    return empty.index_put((clip, assignment), values, accumulate=True)


def merge_clusters_reference(
    tokens: Tensor, weights: Tensor, assignment: Tensor, num_clusters: int, normalize: bool
) -> Tensor:
    """:func:`merge_clusters` as it reads."""
    dtype = checks.accumulator(tokens, weights)
    weight = weights.to(dtype)[..., None]
    merged = _sums(tokens.to(dtype) * weight, assignment, num_clusters)
    if normalize:
        total = _sums(weight, assignment, num_clusters)
        empty = total == 0
        # Both sides of the division are made harmless, so that no gradient is NaN either.
        merged = merged.masked_fill(empty, 0.0) / total.masked_fill(empty, 1.0)
    return merged.to(tokens.dtype)


def merge_clusters(
    tokens: Tensor,
    weights: Tensor,
    assignment: Tensor,
    num_clusters: int,
    *,
    normalize: bool = True,
    backend: str = "auto",
) -> Tensor:
    """F_c = Σ_{j in cluster c} s_j f_j / Σ_{j in cluster c} s_j: Eq. 11.

    Args:
        tokens: [B, M, D] floating point, f.
        weights: [B, M] floating point, s; of any dtype.
        assignment: [B, M] int64, the cluster 0 .. num_clusters−1 of each token.
        num_clusters: L ≥ 1.
        normalize: False leaves the division out (the plain sum of Eq. 11).
        backend: ``auto``, ``reference``, ``triton`` or ``cuda``.

    Returns:
        [B, L, D] in tokens' dtype, summed in at least float32, in index order (bitwise repeatable).
        Gradients flow to tokens and weights. An empty cluster is zero and passes no gradient; so
        does, when normalising, one whose weights sum to 0. A NaN token reaches its own cluster
        only.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or num_clusters; on the CPU also an assignment out of
            range, which is undefined elsewhere.
        BackendUnavailable: the backend asked for cannot run here.
    """
    sizes: checks.Sizes = {}
    checks.tensor("tokens", tokens, "B M D", sizes)
    checks.tensor("weights", weights, "B M", sizes)
    checks.tensor("assignment", assignment, "B M", sizes, checks.INDEX)
    checks.same_device("tokens", tokens, weights=weights, assignment=assignment)
    if num_clusters < 1:
        raise ValueError(f"num_clusters must be at least 1, got {num_clusters}")
    checks.indices("assignment", assignment, num_clusters, "num_clusters")
    backends.choose("merge_clusters", backend, tokens.device)  # only the reference is there: check
    return merge_clusters_reference(tokens, weights, assignment, num_clusters, normalize)


backends.entry(merge_clusters, "tokens")
