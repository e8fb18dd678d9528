"""select_tokens: softmax of the keypoints' logits, and the split into causal tokens and others."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.harness.peers import eager_and_compiled
from bench.harness.shapes import BATCHES, BOTH, FORWARD, Shape, grid
from bench.harness.workload import Arguments, Draw, OpBench
from cmpose import ops


def plain(logits: Tensor, n: int) -> tuple[Tensor, ...]:
    """The op's rule in torch's sorts; its sort key (best rank, −best score) in one pass."""
    scores = logits.softmax(-1, dtype=torch.float32)
    importance = scores.mean(1)
    with torch.no_grad():
        order = logits.argsort(dim=-1, descending=True, stable=True)
        rank = order.argsort(-1).amin(1)
        by_score = scores.amax(1).argsort(dim=-1, descending=True, stable=True)
        by_rank = rank.gather(1, by_score).argsort(dim=-1, stable=True)
        chosen = by_score.gather(1, by_rank)
        split = n * logits.shape[1]
        causal, noncausal = chosen[:, :split].sort(-1)[0], chosen[:, split:].sort(-1)[0]
    return scores.to(logits.dtype), importance.to(logits.dtype), causal, noncausal


def _make(shape: Shape, draw: Draw) -> Arguments:
    return {"logits": draw.normal(*(shape[n] for n in "BKN")), "n": shape["n"]}


def _bytes(shape: Shape, element: int, direction: str) -> int:
    """Logits → scores, importance, indices; backward scores and two gradients → one."""
    B, K, N = (shape[n] for n in "BKN")
    forward = B * (2 * K * N * element + N * element + 8 * N)
    backward = B * (3 * K * N * element + N * element)
    return forward + (backward if direction == BOTH else 0)


_REFERENCE = {"B": 32, "K": 15, "N": 192, "n": 4}

BENCH = OpBench(
    op="select_tokens",
    directions=(FORWARD, BOTH),
    shapes=grid(_REFERENCE, BATCHES, [{}, {"N": 432}, {"N": 1024}]),
    small={"B": 2, "K": 3, "N": 16, "n": 2},
    cpu=[{"B": 8, "K": 15, "N": 192, "n": 4}],
    make=_make,
    call=ops.select_tokens,
    bytes=_bytes,
    peers=eager_and_compiled(plain),
    gradients=("logits",),
)
