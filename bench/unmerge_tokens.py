"""unmerge_tokens: causal and merged tokens back into their cells."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bench.harness.peers import eager_and_compiled
from bench.harness.shapes import BATCHES, BOTH, FORWARD, HEADS, Shape, grid
from bench.harness.workload import Arguments, Draw, OpBench
from cmpose import ops


def plain(causal: Tensor, merged: Tensor, assignment: Tensor, **indices: Tensor) -> Tensor:
    """A gather of the merged tokens, then one scatter into the grid."""
    width = causal.shape[-1]
    others = merged.gather(1, assignment[..., None].expand(-1, -1, width))
    values = torch.cat((causal, others), 1)
    index = torch.cat((indices["causal_index"], indices["noncausal_index"]), 1)
    index = index[..., None].expand(-1, -1, width)
    return torch.empty_like(values).scatter(1, index, values)


def _call(causal_index: Tensor, noncausal_index: Tensor, **arguments: Any) -> Tensor:
    """The op, its indices as arguments of their own."""
    selection: Any = SimpleNamespace(causal=causal_index, noncausal=noncausal_index)
    return ops.unmerge_tokens(selection=selection, **arguments)


def _make(shape: Shape, draw: Draw) -> Arguments:
    B, N, C, L, D = *(shape[n] for n in "BNCL"), shape["H"] * shape["d"]
    order = draw.uniform(B, N).argsort(1)
    return {
        "causal": draw.normal(B, C, D),
        "merged": draw.normal(B, L, D),
        "causal_index": order[:, :C].sort(1).values,
        "noncausal_index": order[:, C:].sort(1).values,
        "assignment": draw.integers(L, B, N - C),
    }


def _bytes(shape: Shape, element: int, direction: str) -> int:
    """Tokens, indices → grid; backward the grid's gradient and indices → both gradients."""
    B, N, C, L, D = *(shape[n] for n in "BNCL"), shape["H"] * shape["d"]
    indices, tokens, cells = 8 * (N + N - C), (C + L) * D * element, N * D * element
    one = tokens + indices + cells
    return B * one * (2 if direction == BOTH else 1)


_REFERENCE = {"B": 32, "N": 192, "C": 60, "L": 32, "H": 12, "d": 64}

BENCH = OpBench(
    op="unmerge_tokens",
    directions=(FORWARD, BOTH),
    shapes=grid(_REFERENCE, BATCHES, HEADS, [{}, {"N": 432}]),
    small={"B": 2, "N": 16, "C": 6, "L": 3, "H": 2, "d": 16},
    cpu=[{"B": 8, "N": 192, "C": 60, "L": 32, "H": 12, "d": 64}],
    make=_make,
    call=_call,
    bytes=_bytes,
    peers=eager_and_compiled(plain),
    gradients=("causal", "merged"),
)
