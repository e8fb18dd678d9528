"""How the two attention ops are measured: formulations, peers, bytes and operations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.harness.peers import Arrange, Restore, compiled, eager, flex_peer, sdpa_peers
from bench.harness.shapes import BACKWARD, BRANCHES, FORWARD, REFERENCE, Shape, model_grid
from bench.harness.workload import Arguments, Draw, Peer, counted_flops


def attention(
    op: Callable[..., Tensor],
    backward: Callable[[Tensor, Tensor], Any],
    tokens: Callable[[Shape], int],
    lse: bool,
) -> dict[str, Any]:
    """What the ops' ``OpBench`` have in common.

    Args:
        op: its function.
        backward: the reference's, of the result's gradient and the packed projection.
        tokens: of a frame that attend.
        lse: whether the log-sum-exp is kept for the backward pass, in float32.
    """

    def make(shape: Shape, draw: Draw) -> Arguments:
        """The packed projection of all branches, three unless told: [3B, T, tokens, 3, H, d]."""
        clips = shape.get("branches", BRANCHES) * shape["B"]
        sizes = (clips, shape["T"], tokens(shape), 3, shape["H"], shape["d"])
        return {"qkv": draw.normal(*sizes)}

    def qkv_of(shape: Shape) -> Tensor:
        return make(shape, Draw(torch.float32, "meta"))["qkv"]

    def moved(shape: Shape, element: int, direction: str) -> int:
        """q, k, v → out; backward q, k, v, d out → d q, d k, d v."""
        one = qkv_of(shape).numel() // 3
        lse_bytes = one // shape["d"] * torch.float32.itemsize if lse else 0
        return (7 if direction == BACKWARD else 4) * one * element + lse_bytes

    def operations(shape: Shape, direction: str) -> int:
        """The reference's: two products forward; five backward, as scores are not kept."""
        qkv = qkv_of(shape)
        if direction == BACKWARD:
            return counted_flops(lambda: backward(torch.empty_like(qkv[:, :, :, 0]), qkv))
        return counted_flops(lambda: op(qkv, backend="reference"))

    return {
        "op": op.__name__, "directions": (FORWARD, BACKWARD), "shapes": model_grid(REFERENCE),
        "make": make, "call": op, "bytes": moved, "flops": operations, "gradients": ("qkv",),
    }  # fmt: skip


def attention_options(counted: int) -> dict[str, Callable[[Arguments], Arguments]]:
    """Options of both ops: lengths of whole sequences, another scale, and q, k and v separate, each
    of the same strides or of its own.

    Args:
        counted: of qkv, the dimension whose length is given for all dimensions before it.
    """

    def lengths(arguments: Arguments) -> Arguments:
        shape = arguments["qkv"].shape
        return {"lengths": torch.full(shape[:counted], shape[counted])}

    def separate(arguments: Arguments, own: bool = False) -> Arguments:
        B, T, S, _, H, d = arguments["qkv"].shape
        wide = (arguments["qkv"].new_zeros(B, T, S, H + own * i, d) for i in range(3))
        return {"qkv": tuple(x[..., :H, :] for x in wide)}

    return {
        "lengths": lengths,
        "scale": lambda _: {"scale": 0.1},
        "separate": separate,
        "strides": partial(separate, own=True),
    }


def attention_peers(arrange: Arrange, restore: Restore) -> dict[str, Peer]:
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
