"""temporal_attention: along the frames, at each position.

Beside the matrix products there is the formulation that a compiler can fuse, products and sums over
broadcast dimensions; compiled it is the strongest stock peer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench import attention
from bench.cases import (
    BACKWARD,
    FORWARD,
    REFERENCE,
    Arguments,
    OpBench,
    Peer,
    Shape,
    grid,
    model_axes,
)
from bench.peers import compiled
from cmpose import ops


def _make(shape: Shape, dtype: torch.dtype, device: str, generator: torch.Generator) -> Arguments:
    return attention.make(shape, shape["N"])(dtype, device, generator)


def _bytes(shape: Shape, element: int, direction: str) -> int:
    return attention.moved(shape, shape["N"], element, direction, lse=False)


def _flops(shape: Shape, direction: str) -> int:
    return attention.operations(shape, 3 * shape["B"] * shape["N"], shape["T"], direction)


def broadcast_formulation(qkv: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v with broadcast products instead of matrix products."""
    q, k, v = qkv.unbind(3)  # [B, T, S, H, d]
    logits = (q[:, :, None] * k[:, None]).sum(-1, dtype=torch.float32) * q.shape[-1] ** -0.5
    weights = torch.softmax(logits, dim=2).to(v.dtype)
    return (weights[..., None] * v[:, None]).sum(2)


def _peers(shape: Shape) -> dict[str, Peer]:
    positions = shape["N"]

    def arrange(qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.permute(3, 0, 2, 4, 1, 5).flatten(1, 2).unbind(0)  # [B·S, H, T, d]

    def restore(out: Tensor) -> Tensor:
        return out.unflatten(0, (-1, positions)).permute(0, 3, 1, 2, 4).contiguous()

    return {
        **attention.peers(arrange, restore),
        "compile_broadcast": compiled(broadcast_formulation),
    }


BENCH = OpBench(
    op="temporal_attention",
    directions=(FORWARD, BACKWARD),
    shapes=lambda: grid(REFERENCE, model_axes()),
    small={"B": 1, "T": 3, "N": 12, "K": 3, "H": 2, "d": 32},
    make=_make,
    call=ops.temporal_attention,
    bytes=_bytes,
    flops=_flops,
    peers=_peers,
    gradients=("qkv",),
)
