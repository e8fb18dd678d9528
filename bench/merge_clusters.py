"""merge_clusters: the weighted mean of each cluster's tokens."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from bench import dpc_knn
from bench.harness.peers import compiled, eager
from bench.harness.shapes import BACKWARD, BOTH, FORWARD, Shape
from bench.harness.workload import Arguments, Draw, OpBench
from cmpose import ops


def index_add(tokens: Tensor, weights: Tensor, assignment: Tensor, num_clusters: int) -> Tensor:
    """TCFormer's: two index_add, whose sums are atomic on a card, so in no fixed order."""
    batch, size, width = tokens.shape
    index = assignment + torch.arange(batch, device=tokens.device)[:, None] * num_clusters
    index, weight = index.flatten(), weights.float().reshape(-1, 1)
    total = weight.new_zeros(batch * num_clusters, 1).index_add(0, index, weight)
    share = weight / (total[index] + 1e-6)
    values = tokens.float().reshape(batch * size, width) * share
    merged = values.new_zeros(batch * num_clusters, width).index_add(0, index, values)
    return merged.to(tokens.dtype).view(batch, num_clusters, width)


def one_hot(tokens: Tensor, weights: Tensor, assignment: Tensor, num_clusters: int) -> Tensor:
    """As a matrix product with the normalised memberships, in the tokens' dtype."""
    slots = torch.arange(num_clusters, device=tokens.device)[:, None]
    members = (assignment[:, None] == slots) * weights.float()[:, None]  # [B, L, M]
    share = members / members.sum(-1, keepdim=True).clamp(min=1e-6)
    return share.to(tokens.dtype) @ tokens


def _make(shape: Shape, draw: Draw) -> Arguments:
    B, M, D, L = (shape[n] for n in "BMDL")
    return {
        "tokens": draw.normal(B, M, D),
        "weights": (draw.uniform(B, M) + 0.1).to(draw.dtype),
        "assignment": draw.integers(L, B, M),
        "num_clusters": L,
    }


def _bytes(shape: Shape, element: int, direction: str) -> int:
    """Tokens, weights, labels → merged; backward also d merged → d tokens, d weights."""
    B, M, D, L = (shape[n] for n in "BMDL")
    read = M * D * element + M * element + 8 * M
    forward, gradients = read + L * D * element, M * D * element + M * element
    backward = read + L * D * element + gradients
    parts = {FORWARD: forward, BACKWARD: backward, BOTH: forward + backward}
    return B * parts[direction]


BENCH = OpBench(
    op="merge_clusters",
    directions=(BOTH, FORWARD, BACKWARD),
    shapes=[{name: shape[name] for name in "BMDL"} for shape in dpc_knn.BENCH.shapes],
    small={"B": 2, "M": 24, "D": 16, "L": 6},
    cpu=[{name: shape[name] for name in "BMDL"} for shape in dpc_knn.BENCH.cpu],
    make=_make,
    call=ops.merge_clusters,
    bytes=_bytes,
    peers={
        "eager": eager(partial(ops.merge_clusters, backend="reference")),
        "index_add": eager(index_add),
        "one_hot": eager(one_hot),
        "compile": compiled(index_add),
    },
    gradients=("tokens", "weights"),
)
