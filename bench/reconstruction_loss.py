"""reconstruction_loss: squared error over the corrupted tokens, one task."""

from __future__ import annotations

from torch import Tensor

from bench.harness.peers import eager_and_compiled
from bench.harness.shapes import BACKWARD, BOTH, FORWARD, PERCENT, REFERENCE, Shape, model_grid
from bench.harness.workload import Arguments, Draw, OpBench
from cmpose import ops


def plain(pred: Tensor, target: Tensor, corrupted: Tensor) -> Tensor:
    """Mean over the corrupted tokens and the channels, in float32, without a synchronisation."""
    squares = (pred.float() - target.detach().float()).square().sum(-1)
    return (squares * corrupted).sum() / (corrupted.sum() * pred.shape[-1])


def _corrupted(shape: Shape) -> int:
    """How many tokens of a clip are corrupted."""
    return round(shape["p"] / 100 * shape["T"] * shape["N"])


def _make(shape: Shape, draw: Draw) -> Arguments:
    B, T, N, K, D = *(shape[n] for n in "BTNK"), shape["H"] * shape["d"]
    order = draw.uniform(B, T * N).argsort(1)
    return {
        "pred": draw.normal(B, T, N + K, D)[:, :, :N],  # the model's is a view without keypoints
        "target": draw.normal(B, T, N, D),
        "corrupted": (order < _corrupted(shape)).view(B, T, N),
    }


def _bytes(shape: Shape, element: int, direction: str) -> int:
    """The forward pass writes the gradient too; backward scales it, unless by 1."""
    B, T, N, D = *(shape[n] for n in "BTN"), shape["H"] * shape["d"]
    rows, flags = B * _corrupted(shape), B * T * N
    read = 2 * rows * D * element + flags
    return read if direction == BACKWARD else read + flags * D * element


BENCH = OpBench(
    op="reconstruction_loss",
    directions=(BOTH, FORWARD),
    shapes=model_grid({**REFERENCE, "p": PERCENT}),
    small={"B": 2, "T": 2, "N": 12, "K": 3, "H": 2, "d": 16, "p": 45},
    cpu=[{"B": 4, "T": 3, "N": 192, "K": 15, "H": 12, "d": 64, "p": PERCENT}],
    make=_make,
    call=ops.reconstruction_loss,
    bytes=_bytes,
    peers=eager_and_compiled(plain),
    gradients=("pred",),
)
