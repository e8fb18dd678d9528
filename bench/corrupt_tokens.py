"""corrupt_tokens: clean, masked and noised copies of the tokens, with keypoint tokens behind."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.harness.peers import eager_and_compiled
from bench.harness.shapes import BACKWARD, BRANCHES, FORWARD, PERCENT, REFERENCE, Shape, model_grid
from bench.harness.workload import Arguments, Draw, OpBench
from cmpose import ops

RATIO = PERCENT / 100


def plain(tokens: Tensor, keypoint_tokens: Tensor, position: Tensor, seed: Tensor) -> Tensor:
    """As one would write it, with torch's generator; Philox addressed by token costs more."""
    B, T, N, D = tokens.shape
    masked, noised = (
        (torch.rand(B, T * N, device=tokens.device).argsort(1) < round(RATIO * T * N)).view(B, T, N)
        for _ in range(2)
    )
    noise = torch.randn_like(tokens)
    branches = (
        tokens,
        tokens.masked_fill(masked[..., None], 0.0),
        torch.where(noised[..., None], tokens + noise, tokens),
    )
    keypoints = keypoint_tokens.expand(B, T, -1, D)
    return torch.stack([torch.cat((branch, keypoints), dim=2) for branch in branches]) + position


def _make(shape: Shape, draw: Draw) -> Arguments:
    B, T, N, K, D = *(shape[n] for n in "BTNK"), shape["H"] * shape["d"]
    return {
        "tokens": draw.normal(B, T, N, D),
        "keypoint_tokens": draw.normal(K, D),
        "position": draw.normal(T, N + K, D),
        "seed": torch.ones(1, dtype=torch.int64, device=draw.device),
    }


def _bytes(shape: Shape, element: int, direction: str) -> int:
    B, T, N, K, D = *(shape[n] for n in "BTNK"), shape["H"] * shape["d"]
    flags = B * T * N
    patches, slots = flags * D * element, B * T * (N + K) * D * element
    learnt = (K + T * (N + K)) * D * element
    if direction == BACKWARD:
        return BRANCHES * slots + flags + patches + learnt
    return patches + learnt + BRANCHES * slots + 2 * flags


BENCH = OpBench(
    op="corrupt_tokens",
    directions=(FORWARD, BACKWARD),
    shapes=model_grid(REFERENCE),
    small={"B": 2, "T": 2, "N": 12, "K": 3, "H": 2, "d": 16},
    cpu=[{"B": 4, "T": 3, "N": 192, "K": 15, "H": 12, "d": 64}],
    make=_make,
    call=lambda backend, **arguments: ops.corrupt_tokens(
        **arguments, mask_ratio=RATIO, noise_ratio=RATIO, backend=backend
    ),
    bytes=_bytes,
    peers=eager_and_compiled(plain, checked=False),  # it draws other numbers
    gradients=("tokens", "keypoint_tokens", "position"),
)
