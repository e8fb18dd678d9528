"""One token for each cluster: the weighted sum of Eq. 11."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cmpose import native
from cmpose.ops import backends, checks, cuda, library
from cmpose.ops.cpu import merge_clusters as cpu

# -- reference ------------------------------------------------------------------------------------


def _sums(values: Tensor, assignment: Tensor, num_clusters: int) -> Tensor:
    """Sums of each cluster's tokens, in index order: [B, M, D] → [B, L, D]."""
    batch, _, width = values.shape
    clip = torch.arange(batch, device=values.device)[:, None].expand_as(assignment)
    # Unlike index_add, index_put accumulates in a fixed order on every device.
    empty = values.new_zeros(batch, num_clusters, width)
    return empty.index_put((clip, assignment), values, accumulate=True)


def _merge(
    tokens: Tensor, weights: Tensor, assignment: Tensor, num_clusters: int, normalize: bool
) -> tuple[Tensor, Tensor]:
    """The merged tokens before they are rounded, and the sum of each cluster's weights."""
    dtype = checks.accumulator(tokens, weights)
    weight = weights.to(dtype)[..., None]
    merged = _sums(tokens.to(dtype) * weight, assignment, num_clusters)
    total = _sums(weight, assignment, num_clusters)
    if normalize:
        empty = total == 0
        # Both sides of the division are replaced, so that no gradient is NaN either.
        merged = merged.masked_fill(empty, 0.0) / total.masked_fill(empty, 1.0)
    return merged, total[..., 0]


def merge_clusters_reference(
    tokens: Tensor, weights: Tensor, assignment: Tensor, num_clusters: int, normalize: bool
) -> Tensor:
    """:func:`merge_clusters` in plain PyTorch."""
    return _merge(tokens, weights, assignment, num_clusters, normalize)[0].to(tokens.dtype)


# Many parameters: those of the registered op.
def merge_clusters_backward_reference(
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
    """d f_j = (s_j / Σ s) g_c and d s_j = g_c · (f_j − F_c) / Σ s, for j in cluster c.

    Without ``normalize`` they are s_j g_c and g_c · f_j. A cluster whose weights sum to 0 passes no
    gradient.
    """
    clip = torch.arange(len(tokens), device=tokens.device)[:, None].expand_as(assignment)
    gradient = d_merged.to(total.dtype)[clip, assignment]
    divisor = torch.ones_like(assignment, dtype=total.dtype)
    token = tokens.to(total.dtype)
    if normalize:
        divisor = total[clip, assignment]
        token = token - exact.to(total.dtype)[clip, assignment]
    nothing = divisor == 0
    divisor = divisor.masked_fill(nothing, 1.0)
    d_tokens, d_weights = tokens.new_empty(0), weights.new_empty(0)
    # Divided, not multiplied by the reciprocal: the reciprocal of a subnormal sum is infinite.
    if want_tokens:
        scale = (weights.to(total.dtype) / divisor).masked_fill(nothing, 0.0)
        d_tokens = (gradient * scale[..., None]).to(tokens.dtype).contiguous()
    if want_weights:
        dot = (gradient * token).sum(dim=-1)
        d_weights = (dot / divisor).masked_fill(nothing, 0.0).to(weights.dtype).contiguous()
    return d_tokens, d_weights


# -- CUDA C++ -------------------------------------------------------------------------------------


def clusters_shape(tokens: Tensor, num_clusters: int) -> tuple[int, int, int, int, int]:
    """``Clusters`` of csrc/ops.h."""
    return cuda.DTYPES[tokens.dtype], *tokens.shape, num_clusters


def _cuda_forward(
    tokens: Tensor,
    weights: Tensor,
    assignment: Tensor,
    num_clusters: int,
    normalize: bool,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, weights, assignment = (t.contiguous() for t in (tokens, weights, assignment))
    merged, total, exact = merged_fake(tokens, weights, num_clusters, want_gradient)
    shape = clusters_shape(tokens, num_clusters)
    space = cuda.workspace(native.module().clusters_workspace(*shape), tokens)
    cuda.call(
        "merge_clusters", tokens, *shape, cuda.DTYPES[weights.dtype], normalize, tokens, weights,
        assignment, merged, total, exact if exact.numel() else None, space,
    )  # fmt: skip
    return merged, total, exact


# Many parameters: those of the registered op.
def _cuda_backward(
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
    operands = (tokens, weights, assignment, total, exact, d_merged)
    tokens, weights, assignment, total, exact, d_merged = (t.contiguous() for t in operands)
    d_tokens = torch.empty_like(tokens) if want_tokens else tokens.new_empty(0)
    d_weights = torch.empty_like(weights) if want_weights else weights.new_empty(0)
    shape = clusters_shape(tokens, total.shape[1])
    cuda.call(
        "merge_clusters_backward", tokens, *shape, cuda.DTYPES[weights.dtype], normalize, tokens,
        weights, assignment, total, exact, d_merged, d_tokens if want_tokens else None,
        d_weights if want_weights else None,
    )  # fmt: skip
    return d_tokens, d_weights


# -- registered op --------------------------------------------------------------------------------


def _forward_parts(
    merge: Callable[..., tuple[Tensor, Tensor]],
    tokens: Tensor,
    weights: Tensor,
    assignment: Tensor,
    num_clusters: int,
    normalize: bool,
    want_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the registered op gives, from a function that gives merged tokens and sums."""
    exact, total = merge(tokens, weights, assignment, num_clusters, normalize)
    merged = exact.to(tokens.dtype)
    keep = want_gradient and exact.dtype != tokens.dtype
    return merged, total.contiguous(), exact if keep else exact.new_empty(0)


def merged_fake(
    tokens: Tensor, weights: Tensor, num_clusters: int, want_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty results of a merge: merged, total, and merged before its rounding, where it rounds."""
    dtype = checks.accumulator(tokens, weights)
    B, _, D = tokens.shape
    keep = want_gradient and dtype != tokens.dtype
    return (
        tokens.new_empty(B, num_clusters, D),
        tokens.new_empty(B, num_clusters, dtype=dtype),
        tokens.new_empty((B, num_clusters, D) if keep else (0,), dtype=dtype),
    )


merge_parts = library.register(
    "merge_clusters(Tensor tokens, Tensor weights, Tensor assignment, int num_clusters, "
    "bool normalize, bool want_gradient, str backend) -> (Tensor, Tensor, Tensor)",
    lambda tokens, weights, assignment, num_clusters, normalize, want_gradient, backend: (
        merged_fake(tokens, weights, num_clusters, want_gradient)
    ),
    reference=partial(_forward_parts, _merge),
    cpu=partial(_forward_parts, cpu.forward),
    cuda=_cuda_forward,
)
_backward = library.register(
    "merge_clusters_backward(Tensor d_merged, Tensor tokens, Tensor weights, Tensor assignment, "
    "Tensor total, Tensor exact, bool normalize, bool want_tokens, bool want_weights, "
    "str backend) -> (Tensor, Tensor)",
    lambda d_merged, tokens, weights, assignment, total, exact, normalize, f, s, backend: (
        tokens.new_empty(tokens.shape if f else (0,)),
        weights.new_empty(weights.shape if s else (0,)),
    ),
    reference=merge_clusters_backward_reference,
    cpu=cpu.backward,
    cuda=_cuda_backward,
)


def save_merge(
    ctx: Any,
    tokens: Tensor,
    weights: Tensor,
    assignment: Tensor,
    results: tuple[Tensor, Tensor, Tensor],
    normalize: bool,
    backend: str,
) -> None:
    """Keeps what :func:`merge_gradients` needs in an autograd function's context.

    ``results`` are those of the registered merge.
    """
    merged, total, exact = results
    # Where merging does not round, the result itself is exact.
    exact = exact if exact.dtype != merged.dtype else merged
    ctx.save_for_backward(tokens, weights, assignment, total, exact)
    ctx.options = normalize, *ctx.needs_input_grad[:2], backend


def merge_gradients(ctx: Any, d_merged: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """The gradients to tokens and weights."""
    d_tokens, d_weights = library.first_order(
        "merge_clusters", _backward, d_merged, *ctx.saved_tensors, *ctx.options
    )
    _, want_tokens, want_weights, _ = ctx.options
    return d_tokens if want_tokens else None, d_weights if want_weights else None


class _MergeClusters(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weights: Tensor,
        assignment: Tensor,
        num_clusters: int,
        normalize: bool,
        backend: str,
    ) -> Tensor:
        results = merge_parts(tokens, weights, assignment, num_clusters, normalize, True, backend)
        save_merge(ctx, tokens, weights, assignment, results, normalize, backend)
        return results[0]

    @staticmethod
    def backward(ctx: Any, d_merged: Tensor) -> tuple[Tensor | None, ...]:
        return *merge_gradients(ctx, d_merged), None, None, None, None


# -- public ---------------------------------------------------------------------------------------


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
        weights: [B, M] floating point, s; their dtype may differ from the tokens'.
        assignment: [B, M] int64, the cluster 0 .. num_clusters−1 of each token.
        num_clusters: L ≥ 1.
        normalize: False leaves the division out; then F_c is the plain sum of Eq. 11.
        backend: ``auto``, ``reference``, ``cpu``, ``triton`` or ``cuda``.

    Returns:
        [B, L, D] in tokens' dtype, summed in at least float32, in index order (bitwise repeatable).
        Gradients flow to tokens and weights. An empty cluster is zero and passes no gradient; when
        normalising, so is one whose weights sum to 0. A NaN token reaches its own cluster only.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape, device or num_clusters; on the CPU also an assignment out of
            range, with which the result is undefined elsewhere.
        BackendUnavailable: the backend asked for cannot run here.
    """
    sizes: checks.Sizes = {}
    checks.tensor("tokens", tokens, "B M D", sizes)
    check_merge(tokens, weights, sizes)
    checks.tensor("assignment", assignment, "B M", sizes, checks.INDEX)
    checks.same_device("tokens", tokens, assignment=assignment)
    checks.between("num_clusters", num_clusters, 1, 2**31 - 1)
    checks.boolean("normalize", normalize)
    checks.indices("assignment", assignment, num_clusters, "num_clusters")
    chosen = backends.choose("merge_clusters", backend, tokens.device, tokens, weights)
    if chosen == backends.PLAIN:
        return merge_clusters_reference(tokens, weights, assignment, num_clusters, normalize)
    arguments = tokens, weights, assignment, num_clusters, normalize
    if library.wants_gradient("merge_clusters", tokens, weights):
        return _MergeClusters.apply(*arguments, chosen)
    return merge_parts(*arguments, False, chosen)[0]


def check_merge(tokens: Tensor, weights: Tensor, sizes: checks.Sizes) -> None:
    """Checks the weights of a merge.

    Raises:
        TypeError, ValueError: see :func:`merge_clusters`.
    """
    checks.tensor("weights", weights, "B M", sizes)
    checks.same_device("tokens", tokens, weights=weights)


def _cuda_limits(tokens: Tensor, weights: Tensor) -> str | None:
    return backends.dtype_refusal(tokens=tokens, weights=weights)


backends.entry(merge_clusters, "tokens", cpu=None, cuda=_cuda_limits)
