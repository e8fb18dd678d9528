"""Density-peak clustering with k nearest neighbours, batched: Eqs. 9 and 10.

The method is Rodriguez and Laio's (Science 2014) with the density of Du et al. (2016), which
TCFormer applied to tokens. Here it works on log densities, because exp(−mean d²) is 0 in float32
from a few hundred channels on.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from cmpose import native
from cmpose.ops import backends, checks, cuda, distances, library
from cmpose.ops.cpu import dpc_knn as cpu
from cmpose.ops.distances import INF
from cmpose.ops.knn import Neighbors, check_tokens
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


# Many parameters: those of the registered op.
@torch.no_grad()
def dpc_knn_reference(
    tokens: Tensor,
    valid: Tensor | None,
    k: int,
    num_clusters: int,
    scale: bool,
    include_self: bool,
    peak_delta: str,
    want_neighbors: bool,
) -> tuple[Tensor, ...]:
    """:func:`dpc_knn` in plain PyTorch; its neighbours too, or two empty tensors."""
    size, width = tokens.shape[1:]
    unit = float(width) if scale else 1.0
    x, finite, valid = distances.usable_tokens(tokens, valid)
    square = distances.squared_distances(x)

    # Eq. 9.
    others = distances.masked(square, finite, valid, include_self)
    if want_neighbors:
        near, index = distances.in_order(others, k)
    else:
        near = others.topk(k, dim=-1, largest=False).values
        index = torch.empty(0, dtype=torch.int64, device=near.device)
    log_density = distances.log_density_of(near, valid, unit)

    # Eq. 10: the distance to the nearest token earlier in (log ρ descending, index ascending).
    _, rank = distances.order_of(log_density)
    later = rank[:, None, :] >= rank[:, :, None]
    delta = square.masked_fill(later, INF).amin(dim=-1)
    peak = square.masked_fill(~(valid[:, :, None] & valid[:, None, :]), 0.0).amax(dim=-1)
    if peak_delta == "global_max":
        peak = peak.amax(dim=-1, keepdim=True)
    delta = torch.where(rank == 0, peak, delta).masked_fill(~valid, 0.0)
    delta = (delta / unit).sqrt()

    centers = distances.centers_of(log_density, delta, valid, num_clusters)
    to_centers = square.gather(2, centers[:, None, :].expand(-1, size, -1))
    real = valid.gather(1, centers)
    nearest = to_centers.masked_fill(~real[:, None, :], INF).argmin(dim=-1).masked_fill(~finite, 0)
    clusters = distances.with_own_clusters(nearest, centers, valid)
    return (
        log_density,
        delta,
        centers,
        clusters,
        near if want_neighbors else near.new_empty(0),
        index,
    )


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
    cuda_arguments, results, space = _cuda_arguments(tokens, *arguments)
    cuda.call("dpc_knn", tokens, *cuda_arguments, space)
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
    cuda_arguments, results, space = _cuda_arguments(tokens, *options)
    num_clusters = ClusterResult(*results).centers.shape[1]
    merged, total, exact = merged_fake(tokens, weights, num_clusters, want_gradient)
    cuda.call(
        "dpc_knn_merge", tokens, *cuda_arguments, cuda.DTYPES[weights.dtype], normalize, weights,
        merged, total, exact if exact.numel() else None, space,
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


def _cpu_or_reference(*arguments: Any) -> tuple[Tensor, ...]:
    results = cpu.forward(*arguments)
    return dpc_knn_reference(*arguments) if results is None else results


def _reference_forward(*arguments: Any) -> tuple[Tensor, ...]:
    return dpc_knn_reference(*(*arguments, False))[:4]


def _cpu_forward(*arguments: Any) -> tuple[Tensor, ...]:
    return _cpu_or_reference(*arguments, False)[:4]


_forward = library.register(
    "dpc_knn(Tensor tokens, Tensor? valid, int k, int num_clusters, bool scale, "
    "bool include_self, str peak_delta, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    lambda tokens, valid, k, num_clusters, *options: _cluster_fake(tokens, num_clusters),
    reference=_reference_forward,
    cpu=_cpu_forward,
    cuda=_cuda_forward,
)
_forward_neighbors = library.register(
    "dpc_knn_neighbors(Tensor tokens, Tensor? valid, int k, int num_clusters, bool scale, "
    "bool include_self, str peak_delta, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    lambda tokens, valid, k, num_clusters, *options: (
        *_cluster_fake(tokens, num_clusters),
        tokens.new_empty(*tokens.shape[:2], k, dtype=checks.accumulator(tokens)),
        tokens.new_empty(*tokens.shape[:2], k, dtype=torch.int64),
    ),
    reference=lambda *arguments: dpc_knn_reference(*(*arguments, True)),
    cpu=lambda *arguments: _cpu_or_reference(*arguments, True),
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
    cpu=partial(_in_two_calls, _cpu_forward, "cpu"),
    cuda=_cuda_forward_merge,
)


class _DpcKnnMerge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weights: Tensor, *arguments: Any) -> Any:
        *options, normalize, backend = arguments
        results = _forward_merge(tokens, weights, *options, normalize, True, backend)
        clusters, merge = ClusterResult(*results[:4]), results[4:]
        save_merge(ctx, tokens, weights, clusters.assignment, merge, normalize, backend)
        ctx.set_materialize_grads(False)  # else zeros are written for those without a gradient
        ctx.mark_non_differentiable(*clusters)
        return *clusters, merge[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        if grads[4] is None:
            return (None,) * 10
        return *merge_gradients(ctx, grads[4]), *[None] * 8


# -- public ---------------------------------------------------------------------------------------


# Many parameters: those of the function below.
@overload
def dpc_knn(
    tokens: Tensor,
    k: int,
    num_clusters: int,
    *,
    scale: bool = True,
    include_self: bool = True,
    peak_delta: str = "row_max",
    metric: str = "euclidean",
    valid: Tensor | None = None,
    return_neighbors: Literal[False] = False,
    backend: str = "auto",
) -> ClusterResult: ...
# Many parameters: those of the function below.
@overload
def dpc_knn(
    tokens: Tensor,
    k: int,
    num_clusters: int,
    *,
    scale: bool = True,
    include_self: bool = True,
    peak_delta: str = "row_max",
    metric: str = "euclidean",
    valid: Tensor | None = None,
    return_neighbors: Literal[True],
    backend: str = "auto",
) -> tuple[ClusterResult, Neighbors]: ...
# Many parameters: those of Eqs. 9 and 10 that others set otherwise, and they are public.
def dpc_knn(
    tokens: Tensor,
    k: int,
    num_clusters: int,
    *,
    scale: bool = True,
    include_self: bool = True,
    peak_delta: str = "row_max",
    metric: str = "euclidean",
    valid: Tensor | None = None,
    return_neighbors: bool = False,
    backend: str = "auto",
) -> ClusterResult | tuple[ClusterResult, Neighbors]:
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
        metric: ``euclidean``; or ``cosine``, where d_ij is the distance between the directions
            f / ‖f‖ of the tokens, so that d_ij² = 2 (1 − cos); ``scale`` then does nothing.
        valid: [B, M] bool; None takes every token. Invalid tokens are nobody's neighbours, have
            log ρ −inf and δ 0, come last as centres, and are assigned to the nearest valid centre:
            give them weight 0 in merge_clusters. Means are over the valid neighbours. When a clip
            has fewer than L valid tokens, the remaining centres are invalid tokens, and their
            clusters are empty. A token that holds a NaN or an infinity counts as invalid; as its
            distances are no numbers, it is assigned to cluster 0.
        return_neighbors: also gives the k tokens nearest to each. No CUDA kernel does.
        backend: ``auto``, ``reference``, ``cpu``, ``triton`` or ``cuda``.

    Returns:
        :class:`ClusterResult`, and with ``return_neighbors`` what :func:`~cmpose.ops.knn` returns
        (distances d_ij as here). log_density and delta float32 (float64 for float64 tokens), of
        distances as scaled by ``scale``. No gradients: the indices are piecewise constant, and
        log_density and delta only serve to rank.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device, k > M, num_clusters > M, an unknown peak_delta; on
            the CPU also NaN or infinite tokens, ``valid`` or not. Elsewhere, and within
            ``ops.without_value_checks()``, these are invalid tokens (see ``valid``).
        BackendUnavailable: the backend asked for cannot run here.
    """
    _check(tokens, k, num_clusters, include_self, peak_delta, metric, valid)
    checks.boolean("scale", scale)
    checks.boolean("return_neighbors", return_neighbors)
    chosen = backends.choose("dpc_knn", backend, tokens.device, tokens, k, return_neighbors)
    tokens, scaled = _measured(tokens.detach(), metric, scale)
    arguments = tokens, valid, k, num_clusters, scaled, include_self, peak_delta
    if chosen == backends.PLAIN:
        results = dpc_knn_reference(*arguments, return_neighbors)
    else:
        forward = _forward_neighbors if return_neighbors else _forward
        results = forward(*arguments, chosen)
    clusters = ClusterResult(*results[:4])
    if not return_neighbors:
        return clusters
    unit = float(tokens.shape[2]) if scale else 1.0
    near = results[4] / 2 if metric == "cosine" else (results[4] / unit).sqrt()
    return clusters, Neighbors(near, results[5], None)


def _measured(tokens: Tensor, metric: str, scale: bool) -> tuple[Tensor, bool]:
    """Tokens whose Euclidean distances are meant, and whether those are divided by √D."""
    return (distances.unit_tokens(tokens), False) if metric == "cosine" else (tokens, scale)


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
    metric: str = "euclidean",
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
        k, num_clusters, scale, include_self, peak_delta, metric, valid: as in dpc_knn.
        normalize: as in merge_clusters.
        backend: of both ops: ``auto``, ``reference``, ``triton`` or ``cuda``.

    Returns:
        The clusters, and the merged tokens [B, L, D] in tokens' dtype, whose gradients flow to
        tokens and weights through the merging alone.

    Raises:
        TypeError, ValueError, BackendUnavailable: as the two ops raise them.
    """
    sizes = _check(tokens, k, num_clusters, include_self, peak_delta, metric, valid)
    check_merge(tokens, weights, sizes)
    checks.boolean("scale", scale)
    checks.boolean("normalize", normalize)
    chosen = backends.choose("dpc_knn", backend, tokens.device, tokens, k, False)
    merging = backends.choose("merge_clusters", backend, tokens.device, tokens, weights)
    if chosen != merging or chosen == backends.PLAIN or metric == "cosine":
        clusters = dpc_knn(
            tokens, k, num_clusters, scale=scale, include_self=include_self,
            peak_delta=peak_delta, metric=metric, valid=valid, backend=backend,
        )  # fmt: skip
        merged = merge_clusters(
            tokens, weights, clusters.assignment, num_clusters, normalize=normalize, backend=backend
        )
        return clusters, merged
    arguments = valid, k, num_clusters, scale, include_self, peak_delta, normalize
    if library.wants_gradient("dpc_knn_merge", tokens, weights):
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
    metric: str,
    valid: Tensor | None,
) -> checks.Sizes:
    sizes = check_tokens(tokens, k, include_self, metric, valid)
    checks.between("num_clusters", num_clusters, 1, sizes["M"], "M tokens")
    checks.choice("peak_delta", peak_delta, ("row_max", "global_max"))
    return sizes


def _cuda_limits(tokens: Tensor, k: int, return_neighbors: bool) -> str | None:
    if return_neighbors:
        return "the kernels do not return neighbours"
    if tokens.shape[1] > MAX_TOKENS:
        return f"there are {tokens.shape[1]} tokens; the kernels take up to {MAX_TOKENS}"
    if k > MAX_NEIGHBORS:
        return f"k is {k}; the kernels take up to {MAX_NEIGHBORS}"
    return backends.dtype_refusal(tokens=tokens)


backends.entry(dpc_knn, "tokens", cpu=None, cuda=_cuda_limits)
