"""What the two attention ops share: formulations, peers, bytes and operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.harness.peers import Arrange, Restore, compiled, eager, flex_peer, sdpa_peers
from bench.harness.shapes import BACKWARD, BRANCHES, Shape
from bench.harness.workload import Arguments, Draw, Peer, counted_flops


def packed(shape: Shape, tokens: int, draw: Draw) -> Arguments:
    """The packed projection of all branches, three unless told: [3B, T, tokens, 3, H, d]."""
    clips = shape.get("branches", BRANCHES) * shape["B"]
    sizes = (clips, shape["T"], tokens, 3, shape["H"], shape["d"])
    return {"qkv": draw.normal(*sizes)}


def moved(shape: Shape, tokens: int, element: int, direction: str, lse: bool) -> int:
    """Bytes: q, k, v → out; backward q, k, v, d out → d q, d k, d v.

    ``lse`` says whether the log-sum-exp is kept between them, in float32.
    """
    rows = shape.get("branches", BRANCHES) * shape["B"] * shape["T"] * tokens * shape["H"]
    kept = rows * torch.float32.itemsize if lse else 0
    return (7 if direction == BACKWARD else 4) * rows * shape["d"] * element + kept


def operations(
    shape: Shape,
    tokens: int,
    direction: str,
    forward: Callable[..., Any],
    backward: Callable[[Tensor, Tensor], Any],
) -> int:
    """Those of an op's reference: two products forward; five backward, as scores are not kept."""
    qkv = packed(shape, tokens, Draw(torch.float32, "meta"))["qkv"]
    if direction == BACKWARD:
        return counted_flops(lambda: backward(torch.empty_like(qkv[:, :, :, 0]), qkv))
    return counted_flops(lambda: forward(qkv, backend="reference"))


def peers(arrange: Arrange, restore: Restore) -> dict[str, Peer]:
    """Eager, compiled, every backend of SDPA, FlexAttention.

    ``arrange`` gives q, k, v of the four dimensions that fused kernels need, [.., H, tokens, d];
    ``restore`` makes [B, T, S, H, d] of the result, contiguous as the next linear layer needs it.
    """

    def plain(qkv: Tensor) -> Tensor:
        """softmax(q kᵀ / √d) v as two batched products around torch's softmax."""
        q, k, v = arrange(qkv)
        weights = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1)
        return restore(weights @ v, qkv)

    return {
        "eager": eager(plain),
        "compile": compiled(plain),
        **sdpa_peers(arrange, restore),
        "flex": flex_peer(arrange, restore),
    }
