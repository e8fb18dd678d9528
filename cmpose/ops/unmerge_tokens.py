"""Causal and merged tokens back on the grid of patch tokens."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from cmpose.ops import backends, checks


class Selection(Protocol):
    """The index tensors of a split into causal and non-causal tokens."""

    @property
    def causal(self) -> Tensor: ...

    @property
    def noncausal(self) -> Tensor: ...


def unmerge_tokens_reference(
    causal: Tensor,
    merged: Tensor,
    causal_index: Tensor,
    noncausal_index: Tensor,
    assignment: Tensor,
) -> Tensor:
    """:func:`unmerge_tokens` as it reads."""
    batch, _, width = causal.shape
    clip = torch.arange(batch, device=causal.device)[:, None].expand_as(assignment)
    # Indexing, not gather: its gradient accumulates in a fixed order on every device.
    values = torch.cat((causal, merged[clip, assignment]), dim=1)
    index = torch.cat((causal_index, noncausal_index), dim=1)
    return torch.zeros_like(values).scatter(1, index[..., None].expand(-1, -1, width), values)


def unmerge_tokens(
    causal: Tensor,
    merged: Tensor,
    selection: Selection,
    assignment: Tensor,
    *,
    backend: str = "auto",
) -> Tensor:
    """A causal token goes to its own cell, a merged one to the cells of all its members.

    Args:
        causal: [B, C, D] floating point, the causal tokens in the order of selection.causal.
        merged: [B, L, D] of causal's dtype, one token a cluster.
        selection: what select_tokens gave, or anything with index tensors ``causal`` [B, C] and
            ``noncausal`` [B, M], int64, that together hold each of 0 .. C+M−1 once.
        assignment: [B, M] int64, the cluster 0 .. L−1 of each non-causal token.
        backend: ``auto``, ``reference``, ``triton`` or ``cuda``.

    Returns:
        [B, C+M, D] in causal's dtype. Gradients flow to causal and merged, a merged token's
        summed over its members in a fixed order. NaN stays in the cells it goes to.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or device; on the CPU also an assignment out of range and a
            selection that misses a cell, which are undefined elsewhere.
        BackendUnavailable: the backend asked for cannot run here.
    """
    sizes: checks.Sizes = {}
    checks.tensor("causal", causal, "B C D", sizes)
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
    backends.choose("unmerge_tokens", backend, causal.device)  # only the reference is there: check
    return unmerge_tokens_reference(
        causal, merged, selection.causal, selection.noncausal, assignment
    )


backends.entry(unmerge_tokens, "causal")
