"""The k nearest neighbours of each token among the tokens of its clip, batched."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cmpose.ops import backends, checks, distances, library
from cmpose.ops.cpu import knn as cpu
from cmpose.ops.distances import INF


class Neighbors(NamedTuple):
    """Result of :func:`knn`."""

    distances: Tensor
    """[B, M, k]: ascending; infinite where a token has fewer than k neighbours."""
    indices: Tensor
    """[B, M, k] int64: whose distances they are; the token itself where there is none."""
    counts: Tensor | None
    """[B, M] int64: neighbours within ``radius``; None without one."""


# -- reference ------------------------------------------------------------------------------------


def nearest_reference(
    tokens: Tensor, valid: Tensor | None, k: int, include_self: bool, within: float
) -> tuple[Tensor, Tensor, Tensor]:
    """d² and indices [B, M, k], and how many d² are at most ``within`` [B, M], in plain PyTorch."""
    x, finite, usable = distances.usable_tokens(tokens, valid)
    masked = distances.masked(distances.squared_distances(x), finite, usable, include_self)
    return *distances.in_order(masked, k), (masked <= within).sum(dim=-1)


@torch.no_grad()
def _knn(
    tokens: Tensor,
    valid: Tensor | None,
    k: int,
    include_self: bool,
    metric: str,
    radius: float | None,
    backend: str = "reference",
) -> tuple[Tensor, Tensor, Tensor]:
    """The op on a backend: distances, indices, and counts, which are empty without a radius."""
    cosine = metric == "cosine"
    tokens = distances.unit_tokens(tokens) if cosine else tokens
    within = -1.0 if radius is None else 2.0 * radius if cosine else float(radius) * radius
    within = min(within, torch.finfo(checks.accumulator(tokens)).max)  # beyond are no neighbours
    results = cpu.forward(tokens, valid, k, include_self, within) if backend == "cpu" else None
    if results is None:
        results = nearest_reference(tokens, valid, k, include_self, within)
    square, indices, counts = results
    near = square / 2 if cosine else square.sqrt()
    return near, indices, counts.new_empty(0) if radius is None else counts


# -- registered op --------------------------------------------------------------------------------


def _fake(
    tokens: Tensor,
    valid: Tensor | None,
    k: int,
    include_self: bool,
    metric: str,
    radius: float | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    B, M, _ = tokens.shape
    indices = tokens.new_empty(B, M, k, dtype=torch.int64)
    counts = tokens.new_empty((0,) if radius is None else (B, M), dtype=torch.int64)
    return tokens.new_empty(B, M, k, dtype=checks.accumulator(tokens)), indices, counts


_forward = library.register(
    "knn(Tensor tokens, Tensor? valid, int k, bool include_self, str metric, float? radius, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    _fake,
    reference=_knn,
    cpu=lambda *arguments: _knn(*(*arguments, "cpu")),
)


# -- public ---------------------------------------------------------------------------------------


def knn(
    tokens: Tensor,
    k: int,
    *,
    include_self: bool = True,
    metric: str = "euclidean",
    valid: Tensor | None = None,
    radius: float | None = None,
    backend: str = "auto",
) -> Neighbors:
    """The k nearest neighbours of each token among the tokens of its clip.

    They are in the order (distance, index), duplicates included, so that the same tokens give the
    same neighbours on every backend, but for near-ties within rounding.

    Args:
        tokens: [B, M, D] floating point.
        k: neighbours, 1 ≤ k ≤ M (≤ M−1 without ``include_self``).
        include_self: a token is one of its own neighbours, at distance 0.
        metric: ``euclidean``, ‖f_i − f_j‖; or ``cosine``, 1 − cos(f_i, f_j), which is computed as
            ½‖u_i − u_j‖² with u = f / ‖f‖. A token of zeros has no direction; its u is 0, and it is
            at ½ from all others.
        valid: [B, M] bool; None takes every token. Invalid tokens are nobody's neighbours; their
            own rows hold the valid tokens nearest to them. A token that holds a NaN or an infinity
            counts as invalid, and has no neighbours.
        radius: ≥ 0; also counts the neighbours within this distance, more than k of them too.
        backend: ``auto``, ``reference``, ``cpu``, ``triton`` or ``cuda``.

    Returns:
        :class:`Neighbors`; distances float32 (float64 for float64 tokens). No gradients: those of
        distances are had from ``tokens`` at ``indices``.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or radius, k > M, an unknown metric; on the CPU also NaN
            or infinite tokens, ``valid`` or not. Elsewhere, and within
            ``ops.without_value_checks()``, these are invalid tokens.
        BackendUnavailable: the backend asked for cannot run here.
    """
    check_tokens(tokens, k, include_self, metric, valid)
    if radius is not None:
        checks.between("radius", radius, 0.0, INF)
        radius = float(radius) if radius <= torch.finfo(torch.float64).max else INF
    arguments = tokens.detach(), valid, k, include_self, metric, radius
    chosen = backends.choose("knn", backend, tokens.device)
    results = _knn(*arguments) if chosen == backends.PLAIN else _forward(*arguments, chosen)
    return Neighbors(results[0], results[1], None if radius is None else results[2])


def check_tokens(
    tokens: Tensor, k: int, include_self: bool, metric: str, valid: Tensor | None
) -> checks.Sizes:
    """Checks what :func:`knn` and ``dpc_knn`` share.

    Raises:
        TypeError, ValueError: see :func:`knn`.
    """
    checks.boolean("include_self", include_self)
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
    checks.choice("metric", metric, distances.METRICS)
    checks.finite("tokens", tokens)
    return sizes


backends.entry(knn, "tokens", cpu=None)
