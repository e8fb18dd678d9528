"""spatial_attention: within each frame, over patch and keypoint tokens."""

from __future__ import annotations

from torch import Tensor

from bench.harness import attention
from bench.harness.shapes import BACKWARD, FORWARD, REFERENCE, Shape, model_grid
from bench.harness.workload import OpBench
from cmpose import ops
from cmpose.ops.spatial_attention import spatial_attention_backward_reference


def _tokens(shape: Shape) -> int:
    return shape["N"] + shape["K"]


def _flops(shape: Shape, direction: str) -> int:
    both = ops.spatial_attention, spatial_attention_backward_reference
    return attention.operations(shape, _tokens(shape), direction, *both)


def arrange(qkv: Tensor) -> tuple[Tensor, ...]:
    return qkv.flatten(0, 1).permute(2, 0, 3, 1, 4).unbind(0)  # [B·T, H, S, d]


def restore(out: Tensor, qkv: Tensor) -> Tensor:
    return out.transpose(1, 2).unflatten(0, qkv.shape[:2]).contiguous()


BENCH = OpBench(
    op="spatial_attention",
    directions=(FORWARD, BACKWARD),
    shapes=model_grid(REFERENCE),
    cpu=({"B": 8, "branches": 1, "T": 3, "N": 192, "K": 15, "H": 12, "d": 64},),
    small={"B": 1, "T": 2, "N": 12, "K": 3, "H": 2, "d": 16},
    make=lambda shape, draw: attention.packed(shape, _tokens(shape), draw),
    call=ops.spatial_attention,
    bytes=lambda shape, element, direction: attention.moved(
        shape, _tokens(shape), element, direction, lse=True
    ),
    peers=attention.peers(arrange, restore),
    flops=_flops,
    gradients=("qkv",),
)
