"""knn: the nearest tokens of each token, as torch.cdist and topk find them."""

from __future__ import annotations

import torch
from torch import Tensor

from bench import dpc_knn
from bench.harness.peers import eager_and_compiled
from bench.harness.shapes import FORWARD, Shape
from bench.harness.workload import Arguments, Draw, OpBench
from cmpose import ops


@torch.no_grad()
def plain(tokens: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As one would write it, in float32; ties fall as topk has them."""
    distances, indices = torch.cdist(tokens.float(), tokens.float()).topk(k, largest=False)
    return distances, indices


def _make(shape: Shape, draw: Draw) -> Arguments:
    return {"tokens": draw.normal(*(shape[n] for n in "BMD")), "k": shape["k"]}


def _bytes(shape: Shape, element: int, direction: str) -> int:
    """Tokens read once; distances in float32 and indices in int64 written."""
    B, M, D, k = (shape[n] for n in "BMDk")
    return B * M * (D * element + k * 12)


def _flops(shape: Shape, direction: str) -> int:
    """The product of all pairs, as in dpc_knn."""
    return 2 * shape["B"] * shape["M"] ** 2 * shape["D"]


BENCH = OpBench(
    op="knn",
    directions=(FORWARD,),
    shapes=[{name: shape[name] for name in "BMDk"} for shape in dpc_knn.BENCH.shapes],
    small={"B": 2, "M": 24, "D": 16, "k": 3},
    cpu=[{name: shape[name] for name in "BMDk"} for shape in dpc_knn.BENCH.cpu],
    make=_make,
    call=ops.knn,
    bytes=_bytes,
    peers=eager_and_compiled(plain),
    flops=_flops,
    exact_shape=lambda s: {**s, "B": 1, "M": min(s["M"], 1024)},
)
