"""What the two attention ops' benches share: formulations, SDPA, bytes and operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases import BACKWARD, BRANCHES, FP32, Arguments, Peer, Shape, element_size, normal
from bench.peers import compiled, eager, flex_peer, sdpa_peers

Arrange = Callable[[Tensor], tuple[Tensor, ...]]


def make(shape: Shape, tokens: int) -> Callable[..., Arguments]:
    """The packed projection of all branches: [3B, T, tokens, 3, H, d]."""

    def made(dtype: torch.dtype, device: str, generator: torch.Generator) -> Arguments:
        sizes = (BRANCHES * shape["B"], shape["T"], tokens, 3, shape["H"], shape["d"])
        return {"qkv": normal(*sizes, dtype=dtype, device=device, generator=generator)}

    return made


def moved(shape: Shape, tokens: int, element: int, direction: str, lse: bool) -> int:
    """q, k, v → out; backward q, k, v, d out → d q, d k, d v; and the log-sum-exp where kept."""
    rows = BRANCHES * shape["B"] * shape["T"] * tokens * shape["H"]
    kept = rows * element_size(FP32) if lse else 0
    return (7 if direction == BACKWARD else 4) * rows * shape["d"] * element + kept


def operations(shape: Shape, sequences: int, length: int, direction: str) -> int:
    """Two products of length² · d forward; five backward, the scores being computed again."""
    one = 2 * sequences * shape["H"] * length * length * shape["d"]
    return (5 if direction == BACKWARD else 2) * one


def matmul_formulation(arrange: Arrange, restore: Callable[[Tensor], Tensor]) -> Any:
    """softmax(q kᵀ / √d) v as two batched products around torch's softmax."""

    def attention(qkv: Tensor) -> Tensor:
        q, k, v = arrange(qkv)
        weights = torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2), dim=-1)
        return restore(weights @ v)

    return attention


def peers(arrange: Arrange, restore: Callable[[Tensor], Tensor]) -> dict[str, Peer]:
    """Eager, compiled, every backend of SDPA, FlexAttention.

    Args:
        arrange: qkv → q, k, v, of the four dimensions that fused kernels need: [.., H, tokens, d].
        restore: back to [B, T, S, H, d], contiguous.
    """
    plain = matmul_formulation(arrange, restore)
    return {
        "eager": eager(plain),
        "compile": compiled(plain),
        **sdpa_peers(arrange, restore),
        "flex": flex_peer(arrange, restore),
    }
