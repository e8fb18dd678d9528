"""Density-peak clustering with k nearest neighbours, batched: Eqs. 9 and 10.

The method is Rodriguez and Laio's (Science 2014) with the density of Du et al. (2016), which
TCFormer applied to tokens. Here it works on log densities, because exp(−mean d²) is 0 in float32
from a few hundred channels on.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmpose import native
from cmpose.ops import backends, checks, cuda, library
from cmpose.ops.merge_clusters import (
    check_merge,
    clusters_shape,
    merge_clusters,
    merge_gradients,
    merge_parts,
    merged_fake,
    save_merge,
)

MAX_NEIGHBORS, MAX_TOKENS = 16, 65_536
"""The most that the CUDA kernels take: ``kMaxNeighbors`` and ``kMaxTokens`` of csrc/ops.h."""

MATRIX_TOKENS = 512
"""Up to so many tokens the kernels keep all distances of a clip, and can merge in their last
launch: ``kMatrixTokens`` of csrc/ops.h."""

# How many differences are held at once: so many that a CPU's cache holds them, more on a GPU.
_CHUNK = {"cpu": 1 << 18, "cuda": 1 << 26}


class ClusterResult(NamedTuple):
    """Result of :func:`dpc_knn`."""

    log_density: Tensor
    """[B, M]: log ρ of Eq. 9."""
    delta: Tensor
    """[B, M]: δ of Eq. 10."""
    centers: Tensor
    """[B, L] int64: the clusters' centre tokens, in descending order of log ρ + log δ."""
    assignment: Tensor
    """[B, M] int64: the cluster, 0 .. L−1, of each token."""


# -- reference ------------------------------------------------------------------------------------


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


@torch.no_grad()
def dpc_knn_reference(
    tokens: Tensor,
    k: int,
    num_clusters: int,
    scale: bool,
    include_self: bool,
    peak_delta: str,
    valid: Tensor | None,
) -> ClusterResult:
    """:func:`dpc_knn` in plain PyTorch."""
    size, width = tokens.shape[1:]
    unit = float(max(width, 1)) if scale else 1.0
    inf = float("inf")
    finite = tokens.isfinite().all(dim=-1)
    valid = finite if valid is None else finite & valid
    # Tokens that are not finite become zeros; nothing below uses the distances to them.
    x = tokens.masked_fill(~finite[..., None], 0.0)
    square = squared_distances(x.to(checks.accumulator(tokens)))

    # Eq. 9. The division comes last, so that equal sums stay equal.
    near = square.masked_fill(~valid[:, None, :], inf)
    if not include_self:
        near = near.masked_fill(torch.eye(size, dtype=torch.bool, device=near.device), inf)
    near = near.topk(k, dim=-1, largest=False).values
    count = (near < inf).sum(dim=-1).clamp(min=1)
    log_density = -near.masked_fill(near == inf, 0.0).sum(dim=-1) / (count * unit)
    log_density = log_density.masked_fill(~valid, -inf)

    # Eq. 10: the distance to the nearest token earlier in (log ρ descending, index ascending).
    order = log_density.argsort(dim=-1, descending=True, stable=True)
    rank = order.argsort(dim=-1)
    later = rank[:, None, :] >= rank[:, :, None]
    delta = square.masked_fill(later, inf).amin(dim=-1)
    peak = square.masked_fill(~(valid[:, :, None] & valid[:, None, :]), 0.0).amax(dim=-1)
    if peak_delta == "global_max":
        peak = peak.amax(dim=-1, keepdim=True)
    delta = torch.where(rank == 0, peak, delta).masked_fill(~valid, 0.0)
    delta = (delta / unit).sqrt()

    score = log_density + delta.log()
    ranking = score.argsort(dim=-1, descending=True, stable=True)
    # Invalid tokens come after all valid ones, of which some can have a score of −inf too.
    ranking = ranking.gather(
        1, valid.gather(1, ranking).to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    )
    centers = ranking[:, :num_clusters].contiguous()

    real = valid.gather(1, centers)
    to_centers = square.gather(2, centers[:, None, :].expand(-1, size, -1))
    nearest = to_centers.masked_fill(~real[:, None, :], inf).argmin(dim=-1).masked_fill(~finite, 0)
    own = torch.arange(num_clusters, device=centers.device).expand_as(centers)
    own = torch.where(real, own, nearest.gather(1, centers))
    return ClusterResult(log_density, delta, centers, nearest.scatter(1, centers, own))


# -- CUDA C++ -------------------------------------------------------------------------------------


def _cuda_arguments(
    tokens: Tensor,
    valid: Tensor | None,
    k: int,
    num_clusters: int,
    scale: bool,
    include_self: bool,
    peak_delta: str,
) -> tuple[tuple[Any, ...], tuple[Tensor, ...], Tensor]:
    """What both calls of csrc/dpc_knn.cu take; the results, which are among it; the workspace."""
    *sizes, clusters = clusters_shape(tokens, num_clusters)
    shape = (*sizes, k, clusters)
    space = cuda.workspace(native.module().dpc_knn_workspace(*shape), tokens)
    results = _cluster_fake(tokens, num_clusters)
    valid = None if valid is None else valid.contiguous()
    # Read at every call: outside the op torch.compile would take it for a constant.
    tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"
    options = scale, include_self, peak_delta == "global_max", tf32
    return (*shape, *options, tokens, valid, *results), results, space


def _cuda_forward(tokens: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    tokens = tokens.contiguous()
    given, results, space = _cuda_arguments(tokens, *arguments)
    cuda.call("dpc_knn", tokens, *given, space)
    return results


def _in_two_calls(
    forward: Any, backend: str, tokens: Tensor, weights: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """dpc_knn_merge's results: clusters by ``forward``, merged tokens by ``backend``."""
    *options, normalize, want_gradient = arguments
    clusters = ClusterResult(*forward(tokens, *options))
    num_clusters = clusters.centers.shape[1]
    merge = weights, clusters.assignment, num_clusters, normalize, want_gradient
    return *clusters, *merge_parts(tokens, *merge, backend)


def _cuda_forward_merge(tokens: Tensor, weights: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    if tokens.shape[1] > MATRIX_TOKENS:
        return _in_two_calls(_cuda_forward, "cuda", tokens, weights, *arguments)
    *options, normalize, want_gradient = arguments
    tokens, weights = tokens.contiguous(), weights.contiguous()
    given, results, space = _cuda_arguments(tokens, *options)
    num_clusters = ClusterResult(*results).centers.shape[1]
    merged, total, exact = merged_fake(tokens, weights, num_clusters, want_gradient)
    cuda.call(
        "dpc_knn_merge", tokens, *given, cuda.DTYPES[weights.dtype], normalize, weights, merged,
        total, exact if exact.numel() else None, space,
    )  # fmt: skip
    return *results, merged, total, exact


# -- registered ops -------------------------------------------------------------------------------


def _cluster_fake(tokens: Tensor, num_clusters: int) -> tuple[Tensor, ...]:
    """Empty results of a clustering."""
    B, M = tokens.shape[:2]
    dtype = checks.accumulator(tokens)
    return (
        tokens.new_empty(B, M, dtype=dtype),
        tokens.new_empty(B, M, dtype=dtype),
        tokens.new_empty(B, num_clusters, dtype=torch.int64),
        tokens.new_empty(B, M, dtype=torch.int64),
    )


def _reference_forward(
    tokens: Tensor,
    valid: Tensor | None,
    k: int,
    num_clusters: int,
    scale: bool,
    include_self: bool,
    peak_delta: str,
) -> tuple[Tensor, ...]:
    return tuple(dpc_knn_reference(tokens, k, num_clusters, scale, include_self, peak_delta, valid))


_forward = library.register(
    "dpc_knn(Tensor tokens, Tensor? valid, int k, int num_clusters, bool scale, "
    "bool include_self, str peak_delta, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda tokens, valid, k, num_clusters, *options: _cluster_fake(tokens, num_clusters),
    reference=_reference_forward,
    cuda=_cuda_forward,
)
_forward_merge = library.register(
    "dpc_knn_merge(Tensor tokens, Tensor weights, Tensor? valid, int k, int num_clusters, "
    "bool scale, bool include_self, str peak_delta, bool normalize, "
    "bool want_gradient, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda tokens, weights, valid, k, num_clusters, *options: (
        *_cluster_fake(tokens, num_clusters),
        *merged_fake(tokens, weights, num_clusters, options[-2]),
    ),
    reference=partial(_in_two_calls, _reference_forward, "reference"),
    cuda=_cuda_forward_merge,
)


class _DpcKnnMerge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weights: Tensor, *arguments: Any) -> Any:
        *options, normalize, backend = arguments
        results = _forward_merge(tokens, weights, *options, normalize, True, backend)
        clusters, merge = ClusterResult(*results[:4]), results[4:]
        save_merge(ctx, tokens, weights, clusters.assignment, merge, normalize, backend)
        ctx.mark_non_differentiable(*clusters)
        return *clusters, merge[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        return *merge_gradients(ctx, grads[4]), *[None] * 8


# -- public ---------------------------------------------------------------------------------------


def dpc_knn(
    tokens: Tensor,
    k: int,
    num_clusters: int,
    *,
    scale: bool = True,
    include_self: bool = True,
    peak_delta: str = "row_max",
    valid: Tensor | None = None,
    backend: str = "auto",
) -> ClusterResult:
    """Density peaks of a clip's tokens and the cluster of each token: Eqs. 9 and 10.

    With d_ij = ‖f_i − f_j‖ (divided by √D when ``scale``), log ρ_i is −mean of d_ij² over the k
    tokens nearest to i. δ_i is the smallest d_ij over the tokens j earlier in (log ρ descending,
    index ascending); for the first in that order, the peak, it is the largest distance. The
    ``num_clusters`` tokens with the largest log ρ + log δ are the centres. Among equal ones the
    smaller index comes first, also among duplicates, whose δ is 0 and log δ −inf. A token goes to
    the centre nearest to it, among equally near ones to the earliest in ``centers``; a centre stays
    in its own cluster.

    Args:
        tokens: [B, M, D] floating point.
        k: neighbours, 1 ≤ k ≤ M (≤ M−1 without ``include_self``).
        num_clusters: L, 1 ≤ L ≤ M.
        scale: divides distances by √D, as TCFormer does.
        include_self: a token is one of its own k nearest (at distance 0), as in TCFormer.
        peak_delta: ``row_max``, the peak's largest distance (Eq. 10), or ``global_max``, the
            largest distance in the clip (TCFormer).
        valid: [B, M] bool; None takes every token. Invalid tokens are nobody's neighbours, have
            log ρ −inf and δ 0, come last as centres, and are assigned to the nearest valid centre:
            give them weight 0 in merge_clusters. Means are over the valid neighbours. When a clip
            has fewer than L valid tokens, the remaining centres are invalid tokens, and their
            clusters are empty. A token that holds a NaN or an infinity counts as invalid; as its
            distances are no numbers, it is assigned to cluster 0.
        backend: ``auto``, ``reference``, ``cpu``, ``triton`` or ``cuda``.

    Returns:
        :class:`ClusterResult`; log_density and delta float32 (float64 for float64 tokens), of
        distances as scaled by ``scale``. No gradients: the indices are piecewise constant, and
        log_density and delta only serve to rank.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, k > M, num_clusters > M, an unknown peak_delta; on
            the CPU also NaN or infinite tokens, ``valid`` or not. Elsewhere, and within
            ``ops.without_value_checks()``, these are invalid tokens (see ``valid``).
        BackendUnavailable: the backend asked for cannot run here.
    """
    _check(tokens, k, num_clusters, include_self, peak_delta, valid)
    chosen = backends.choose("dpc_knn", backend, tokens.device, tokens, k)
    if chosen == backends.PLAIN:
        return dpc_knn_reference(tokens, k, num_clusters, scale, include_self, peak_delta, valid)
    options = scale, include_self, peak_delta
    return ClusterResult(*_forward(tokens.detach(), valid, k, num_clusters, *options, chosen))


# Many parameters: those of both ops.
def dpc_knn_merge(
    tokens: Tensor,
    weights: Tensor,
    k: int,
    num_clusters: int,
    *,
    scale: bool = True,
    include_self: bool = True,
    peak_delta: str = "row_max",
    valid: Tensor | None = None,
    normalize: bool = True,
    backend: str = "auto",
) -> tuple[ClusterResult, Tensor]:
    """:func:`dpc_knn`, then :func:`~cmpose.ops.merge_clusters` of the clusters it finds.

    It gives the same bits as the two calls. When both ops run on CUDA kernels and M ≤ 512, the
    merging is part of the launch that finds the clusters.

    Args:
        tokens: [B, M, D] floating point.
        weights: [B, M] floating point.
        k, num_clusters, scale, include_self, peak_delta, valid: as in dpc_knn.
        normalize: as in merge_clusters.
        backend: of both ops: ``auto``, ``reference``, ``triton`` or ``cuda``.

    Returns:
        The clusters, and the merged tokens [B, L, D] in tokens' dtype, whose gradients flow to
        tokens and weights through the merging alone.

    Raises:
        TypeError, ValueError, BackendUnavailable: as the two ops raise them.
    """
    sizes = _check(tokens, k, num_clusters, include_self, peak_delta, valid)
    check_merge(tokens, weights, sizes)
    chosen = backends.choose("dpc_knn", backend, tokens.device, tokens, k)
    merging = backends.choose("merge_clusters", backend, tokens.device, tokens, weights)
    if chosen != merging or chosen == backends.PLAIN:
        clusters = dpc_knn(
            tokens, k, num_clusters, scale=scale, include_self=include_self,
            peak_delta=peak_delta, valid=valid, backend=backend,
        )  # fmt: skip
        merged = merge_clusters(
            tokens, weights, clusters.assignment, num_clusters, normalize=normalize, backend=backend
        )
        return clusters, merged
    arguments = valid, k, num_clusters, scale, include_self, peak_delta, normalize
    if torch.is_grad_enabled() and (tokens.requires_grad or weights.requires_grad):
        results = _DpcKnnMerge.apply(tokens, weights, *arguments, chosen)
    else:
        results = _forward_merge(tokens, weights, *arguments, False, chosen)
    return ClusterResult(*results[:4]), results[4]


def _check(
    tokens: Tensor,
    k: int,
    num_clusters: int,
    include_self: bool,
    peak_delta: str,
    valid: Tensor | None,
) -> checks.Sizes:
    sizes: checks.Sizes = {}
    checks.tensor("tokens", tokens, "B M D", sizes)
    if valid is not None:
        checks.tensor("valid", valid, "B M", sizes, checks.BOOL)
    checks.same_device("tokens", tokens, valid=valid)
    size = sizes["M"]
    if include_self:
        checks.between("k", k, 1, size, "M tokens")
    else:
        checks.between("k", k, 1, size - 1, "M tokens without the token itself")
    checks.between("num_clusters", num_clusters, 1, size, "M tokens")
    checks.choice("peak_delta", peak_delta, ("row_max", "global_max"))
    checks.finite("tokens", tokens)
    return sizes


def _cuda_limits(tokens: Tensor, k: int) -> str | None:
    if tokens.shape[1] > MAX_TOKENS:
        return f"there are {tokens.shape[1]} tokens; the kernels take up to {MAX_TOKENS}"
    if k > MAX_NEIGHBORS:
        return f"k is {k}; the kernels take up to {MAX_NEIGHBORS}"
    return backends.dtype_refusal(tokens=tokens)


backends.entry(dpc_knn, "tokens", cuda=_cuda_limits)
