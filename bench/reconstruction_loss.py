"""reconstruction_loss: squared error over the corrupted tokens, one task."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import (
    BOTH,
    FORWARD,
    PERCENT,
    REFERENCE,
    Arguments,
    OpBench,
    Peer,
    Shape,
    grid,
    model_axes,
    normal,
    uniform,
)
from bench.peers import eager_and_compiled
from cmpose import ops


def plain(pred: Tensor, target: Tensor, corrupted: Tensor) -> Tensor:
    """Mean over the corrupted tokens and the channels, in float32, without a synchronisation."""
    squares = (pred.float() - target.detach().float()).square().sum(-1)
    return (squares * corrupted).sum() / (corrupted.sum() * pred.shape[-1])


def _make(shape: Shape, dtype: torch.dtype, device: str, generator: torch.Generator) -> Arguments:
    B, T, N, K, D = *(shape[n] for n in "BTNK"), shape["H"] * shape["d"]

    def made(slots: int) -> Tensor:
        return normal(B, T, slots, D, dtype=dtype, device=device, generator=generator)

    order = uniform(B, T * N, device=device, generator=generator).argsort(1)
    return {
        "pred": made(N + K)[:, :, :N],  # the model's is a view without the keypoints
        "target": made(N),
        "corrupted": (order < corrupted(shape)).view(B, T, N),
    }


def corrupted(shape: Shape) -> int:
    """Tokens of a clip."""
    return round(shape["p"] / 100 * shape["T"] * shape["N"])


def moved(shape: Shape, element: int) -> dict[str, int]:
    """Forward (without gradients), forward with the gradient written, and a scaling of it."""
    B, T, N, D = *(shape[n] for n in "BTN"), shape["H"] * shape["d"]
    rows, flags = corrupted(shape) * B, B * T * N
    read = 2 * rows * D * element + flags
    return {
        "without gradient": read,
        "with gradient": read + flags * D * element,
        "scaled": 2 * rows * D * element + flags,
    }


def _bytes(shape: Shape, element: int, direction: str) -> int:
    # The gradient is written in the forward pass; an upstream gradient of 1 moves nothing more.
    return moved(shape, element)["with gradient"]


def _peers(shape: Shape) -> dict[str, Peer]:
    return eager_and_compiled(plain)


BENCH = OpBench(
    op="reconstruction_loss",
    directions=(BOTH, FORWARD),
    shapes=lambda: grid({**REFERENCE, "p": PERCENT}, model_axes()),
    small={"B": 2, "T": 2, "N": 12, "K": 3, "H": 2, "d": 16, "p": 45},
    make=_make,
    call=ops.reconstruction_loss,
    bytes=_bytes,
    flops=lambda shape, direction: 0,
    peers=_peers,
    gradients=("pred",),
)
