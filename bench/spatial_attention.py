"""spatial_attention: within each frame, over patch and keypoint tokens."""

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
from cmpose import ops


def _tokens(shape: Shape) -> int:
    return shape["N"] + shape["K"]


def _make(shape: Shape, dtype: torch.dtype, device: str, generator: torch.Generator) -> Arguments:
    return attention.make(shape, _tokens(shape))(dtype, device, generator)


def _bytes(shape: Shape, element: int, direction: str) -> int:
    return attention.moved(shape, _tokens(shape), element, direction, lse=True)


def _flops(shape: Shape, direction: str) -> int:
    sequences = 3 * shape["B"] * shape["T"]
    return attention.operations(shape, sequences, _tokens(shape), direction)


def _peers(shape: Shape) -> dict[str, Peer]:
    frames = shape["T"]

    def arrange(qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.flatten(0, 1).permute(2, 0, 3, 1, 4).unbind(0)  # [B·T, H, S, d]

    def restore(out: Tensor) -> Tensor:
        return out.transpose(1, 2).unflatten(0, (-1, frames)).contiguous()

    return attention.peers(arrange, restore)


BENCH = OpBench(
    op="spatial_attention",
    directions=(FORWARD, BACKWARD),
    shapes=lambda: grid(REFERENCE, model_axes()),
    small={"B": 1, "T": 2, "N": 12, "K": 3, "H": 2, "d": 16},
    make=_make,
    call=ops.spatial_attention,
    bytes=_bytes,
    flops=_flops,
    peers=_peers,
    gradients=("qkv",),
)
