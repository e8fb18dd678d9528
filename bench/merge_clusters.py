"""merge_clusters: the weighted mean of each cluster's tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import (
    BACKWARD,
    BOTH,
    FORWARD,
    Arguments,
    OpBench,
    Peer,
    Shape,
    normal,
    uniform,
)
from bench.dpc_knn import shapes
from bench.peers import compiled, eager
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


def _make(shape: Shape, dtype: torch.dtype, device: str, generator: torch.Generator) -> Arguments:
    B, M, D, L = (shape[n] for n in "BMDL")
    drawn = uniform(B, M, device=device, generator=generator) * L
    return {
        "tokens": normal(B, M, D, dtype=dtype, device=device, generator=generator),
        "weights": (uniform(B, M, device=device, generator=generator) + 0.1).to(dtype),
        "assignment": drawn.long().clamp(max=L - 1),
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


def _peers(shape: Shape) -> dict[str, Peer]:
    def reference(**arguments: Tensor) -> Tensor:
        return ops.merge_clusters(**arguments, backend="reference")  # type: ignore[arg-type]

    return {
        "eager": eager(reference),
        "index_add": eager(index_add),
        "one_hot": eager(one_hot),
        "compile": compiled(index_add),
    }


BENCH = OpBench(
    op="merge_clusters",
    directions=(BOTH, FORWARD, BACKWARD),
    shapes=lambda: [{name: shape[name] for name in "BMDL"} for shape in shapes()],
    small={"B": 2, "M": 24, "D": 16, "L": 6},
    make=_make,
    call=ops.merge_clusters,
    bytes=_bytes,
    flops=lambda shape, direction: 0,
    peers=_peers,
    gradients=("tokens", "weights"),
)
