"""Puts causal and merged tokens back on the grid of patch tokens."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from cmpose import native
from cmpose.ops import backends, checks, cuda, library
from cmpose.ops.cpu import unmerge_tokens as cpu


class Selection(Protocol):
    """The index tensors of a split into causal and non-causal tokens."""

    @property
    def causal(self) -> Tensor: ...

    @property
    def noncausal(self) -> Tensor: ...


# -- reference ------------------------------------------------------------------------------------


def unmerge_tokens_reference(
    causal: Tensor,
    merged: Tensor,
    causal_index: Tensor,
    noncausal_index: Tensor,
    assignment: Tensor,
) -> Tensor:
    """:func:`unmerge_tokens` in plain PyTorch."""
    batch, _, width = causal.shape
    clip = torch.arange(batch, device=causal.device)[:, None].expand_as(assignment)
    # Indexing, unlike gather, has a gradient that adds up in a fixed order on every device.
    values = torch.cat((causal, merged[clip, assignment]), dim=1)
    index = torch.cat((causal_index, noncausal_index), dim=1)
    return torch.zeros_like(values).scatter(1, index[..., None].expand(-1, -1, width), values)


def unmerge_tokens_backward_reference(
    d_tokens: Tensor,
    causal_index: Tensor,
    noncausal_index: Tensor,
    assignment: Tensor,
    num_clusters: int,
    want_causal: bool,
    want_merged: bool,
) -> tuple[Tensor, Tensor]:
    """Its gradients: a causal token's is its cell's, a merged token's the sum over its cells."""
    clip = torch.arange(len(d_tokens), device=d_tokens.device)[:, None]
    d_causal, d_merged = d_tokens.new_empty(0), d_tokens.new_empty(0)
    if want_causal:
        d_causal = d_tokens[clip, causal_index].contiguous()
    if want_merged:
        dtype = checks.accumulator(d_tokens)
        sums = d_tokens.new_zeros(len(d_tokens), num_clusters, d_tokens.shape[-1], dtype=dtype)
        cells = d_tokens.to(dtype)[clip, noncausal_index]
        # Unlike index_add, index_put accumulates in a fixed order on every device.
        sums = sums.index_put((clip.expand_as(assignment), assignment), cells, accumulate=True)
        d_merged = sums.to(d_tokens.dtype).contiguous()
    return d_causal, d_merged


# -- CUDA C++ -------------------------------------------------------------------------------------


def _shape(d_tokens: Tensor, assignment: Tensor, num_clusters: int) -> tuple[int, ...]:
    """The fields of ``Clusters`` in csrc/ops.h, and the number of causal tokens."""
    B, cells, D = d_tokens.shape
    M = assignment.shape[1]
    return cuda.DTYPES[d_tokens.dtype], B, M, D, num_clusters, cells - M


def _cuda_forward(
    causal: Tensor,
    merged: Tensor,
    causal_index: Tensor,
    noncausal_index: Tensor,
    assignment: Tensor,
) -> Tensor:
    tokens = _forward_fake(causal, merged, causal_index, noncausal_index, assignment, "cuda")
    operands = (causal, merged, causal_index, noncausal_index, assignment)
    shape = _shape(tokens, assignment, merged.shape[1])
    cuda.call("unmerge_tokens", tokens, *shape, *(t.contiguous() for t in operands), tokens)
    return tokens


def _cuda_backward(
    d_tokens: Tensor,
    causal_index: Tensor,
    noncausal_index: Tensor,
    assignment: Tensor,
    num_clusters: int,
    want_causal: bool,
    want_merged: bool,
) -> tuple[Tensor, Tensor]:
    operands = (d_tokens, causal_index, noncausal_index, assignment)
    d_tokens, causal_index, noncausal_index, assignment = (t.contiguous() for t in operands)
    shape = _shape(d_tokens, assignment, num_clusters)
    space = cuda.workspace(native.module().clusters_workspace(*shape[:5]), d_tokens)
    d_causal, d_merged = _backward_fake(
        d_tokens, causal_index, noncausal_index, assignment, num_clusters, want_causal,
        want_merged, "cuda",
    )  # fmt: skip
    cuda.call(
        "unmerge_tokens_backward", d_tokens, *shape, d_tokens, causal_index, noncausal_index,
        assignment, d_causal if want_causal else None, d_merged if want_merged else None, space,
    )  # fmt: skip
    return d_causal, d_merged


# -- registered op --------------------------------------------------------------------------------


def _forward_fake(
    causal: Tensor,
    merged: Tensor,
    causal_index: Tensor,
    noncausal_index: Tensor,
    assignment: Tensor,
    backend: str,
) -> Tensor:
    B, C, D = causal.shape
    return causal.new_empty(B, C + assignment.shape[1], D)


def _backward_fake(
    d_tokens: Tensor,
    causal_index: Tensor,
    noncausal_index: Tensor,
    assignment: Tensor,
    num_clusters: int,
    want_causal: bool,
    want_merged: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    B, _, D = d_tokens.shape
    return (
        d_tokens.new_empty((B, causal_index.shape[1], D) if want_causal else (0,)),
        d_tokens.new_empty((B, num_clusters, D) if want_merged else (0,)),
    )


_forward = library.register(
    "unmerge_tokens(Tensor causal, Tensor merged, Tensor causal_index, Tensor noncausal_index, "
    "Tensor assignment, str backend) -> Tensor",
    _forward_fake,
    reference=unmerge_tokens_reference,
    cpu=cpu.forward,
    cuda=_cuda_forward,
)
_backward = library.register(
    "unmerge_tokens_backward(Tensor d_tokens, Tensor causal_index, Tensor noncausal_index, "
    "Tensor assignment, int num_clusters, bool want_causal, bool want_merged, str backend) "
    "-> (Tensor, Tensor)",
    _backward_fake,
    reference=unmerge_tokens_backward_reference,
    cpu=cpu.backward,
    cuda=_cuda_backward,
)


class _UnmergeTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        causal: Tensor,
        merged: Tensor,
        causal_index: Tensor,
        noncausal_index: Tensor,
        assignment: Tensor,
        backend: str,
    ) -> Tensor:
        ctx.save_for_backward(causal_index, noncausal_index, assignment)
        ctx.options = merged.shape[1], *ctx.needs_input_grad[:2], backend
        return _forward(causal, merged, causal_index, noncausal_index, assignment, backend)

    @staticmethod
    def backward(ctx: Any, d_tokens: Tensor) -> tuple[Tensor | None, ...]:
        d_causal, d_merged = library.first_order(
            "unmerge_tokens", _backward, d_tokens, *ctx.saved_tensors, *ctx.options
        )
        _, want_causal, want_merged, _ = ctx.options
        causal, merged = d_causal if want_causal else None, d_merged if want_merged else None
        return causal, merged, None, None, None, None


# -- public ---------------------------------------------------------------------------------------


def unmerge_tokens(
    causal: Tensor,
    merged: Tensor,
    selection: Selection,
    assignment: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """Puts a causal token into its own cell, a merged one into the cells of its whole cluster.

    Args:
        causal: [B, C, D] floating point, the causal tokens in the order of selection.causal.
        merged: [B, L, D] of causal's dtype, one token a cluster.
        selection: the result of select_tokens, or anything with index tensors ``causal`` [B, C]
            and ``noncausal`` [B, M], int64, that together hold each of 0 .. C+M−1 once.
        assignment: [B, M] int64, the cluster 0 .. L−1 of each non-causal token.
        backend: ``auto``, ``reference``, ``cpu``, ``triton`` or ``cuda``.

    Returns:
        [B, C+M, D] in causal's dtype. Gradients flow to causal and merged; a merged token's is
        summed over its cluster's cells in a fixed order. A NaN reaches its token's cells only.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device; on the CPU also an assignment out of range and a
            selection that misses a cell, with which the result is undefined elsewhere.
        BackendUnavailable: the backend asked for cannot run here.
    """
    sizes: checks.Sizes = {}
    checks.tensor("causal", causal, "B C D", sizes)
    if not (hasattr(selection, "causal") and hasattr(selection, "noncausal")):
        raise TypeError(
            "selection must have index tensors causal and noncausal, as the result of "
            f"select_tokens has, got {type(selection).__name__}"
        )
    checks.tensor("merged", merged, "B L D", sizes)
    checks.tensor("selection.causal", selection.causal, "B C", sizes, checks.INDEX)
    checks.tensor("selection.noncausal", selection.noncausal, "B M", sizes, checks.INDEX)
    checks.tensor("assignment", assignment, "B M", sizes, checks.INDEX)
    checks.same_dtype("causal", causal, merged=merged)
    checks.same_device(
        "causal",
        causal,
        merged=merged,
        assignment=assignment,
        **{"selection.causal": selection.causal, "selection.noncausal": selection.noncausal},
    )
    checks.indices("assignment", assignment, sizes["L"], "merged tokens")
    if checks.readable(causal):
        cells = torch.cat((selection.causal, selection.noncausal), dim=1).sort(dim=1).values
        if not bool((cells == torch.arange(cells.shape[1])).all()):
            raise ValueError(
                f"selection must hold each of 0..{cells.shape[1] - 1} once in every clip, over "
                "causal and noncausal together"
            )
    chosen = backends.choose("unmerge_tokens", backend, causal.device, causal)
    arguments = causal, merged, selection.causal, selection.noncausal, assignment
    if chosen == backends.PLAIN:
        return unmerge_tokens_reference(*arguments)
    if library.wants_gradient("unmerge_tokens", causal, merged):
        return _UnmergeTokens.apply(*arguments, chosen)
    return _forward(*arguments, chosen)


def _cuda_limits(causal: Tensor) -> str | None:
    return backends.dtype_refusal(causal=causal)


backends.entry(unmerge_tokens, "causal", cpu=None, cuda=_cuda_limits)
