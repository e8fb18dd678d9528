"""heatmap_loss: squared error against Gaussian heatmaps that the peers have to build."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.harness.peers import eager_and_compiled
from bench.harness.shapes import BATCHES, BOTH, FORWARD, Shape, grid
from bench.harness.workload import Arguments, Draw, OpBench
from cmpose import ops

SIGMA = 2.0


def plain(pred: Tensor, keypoints: Tensor, visible: Tensor) -> Tensor:
    """Targets from their two axes, then the weighted squared error, in float32."""
    height, width = pred.shape[-2:]

    def profile(centre: Tensor, length: int) -> Tensor:
        offset = torch.arange(length, device=pred.device, dtype=torch.float32) - centre[..., None]
        inside = offset.abs() <= 3 * SIGMA
        return torch.exp(offset.square() * (-0.5 / SIGMA**2)) * inside

    columns, rows = profile(keypoints[..., 0], width), profile(keypoints[..., 1], height)
    target = rows[..., :, None] * columns[..., None, :]
    squares = (pred.float() - target).square().sum(dim=(-2, -1))
    return (squares * visible).sum() / visible.sum()


def _make(shape: Shape, draw: Draw) -> Arguments:
    B, K, h, w = (shape[n] for n in "BKhw")
    extent = torch.tensor([w, h], dtype=torch.float32, device=draw.device)
    return {
        "pred": draw.normal(B, K, h, w),
        "keypoints": draw.uniform(B, K, 2) * extent,
        "visible": (draw.uniform(B, K) < 0.8).float(),
    }


def _bytes(shape: Shape, element: int, direction: str) -> int:
    """Heatmaps read, their gradient written; joints are a few kilobytes beside them."""
    B, K, h, w = (shape[n] for n in "BKhw")
    return 2 * B * K * h * w * element


_REFERENCE = {"B": 32, "K": 15, "h": 64, "w": 48}

BENCH = OpBench(
    op="heatmap_loss",
    directions=(BOTH, FORWARD),
    shapes=grid(_REFERENCE, BATCHES, [{}, {"h": 96, "w": 72}]),
    small={"B": 2, "K": 3, "h": 16, "w": 12},
    cpu=[{"B": 8, "K": 15, "h": 64, "w": 48}],
    make=_make,
    call=lambda backend, **arguments: ops.heatmap_loss(**arguments, sigma=SIGMA, backend=backend),
    bytes=_bytes,
    peers=eager_and_compiled(plain),
    gradients=("pred",),
)
