"""temporal_attention: along the frames, at each position.

Beside matrix products there is a formulation that a compiler can fuse: products and sums over
broadcast dimensions. Compiled, it is the strongest stock peer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bench.harness.attention import attention, attention_options, attention_peers
from bench.harness.peers import compiled, eager
from bench.harness.workload import OpBench
from cmpose import ops
from cmpose.ops.temporal_attention import temporal_attention_backward_reference


def broadcast_formulation(qkv: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v with broadcast products instead of matrix products."""
    q, k, v = qkv.unbind(3)  # [B, T, S, H, d]
    logits = (q[:, :, None] * k[:, None]).sum(-1, dtype=torch.float32) * q.shape[-1] ** -0.5
    weights = torch.softmax(logits, dim=2).to(v.dtype)
    return (weights[..., None] * v[:, None]).sum(2)


def einsum_formulation(qkv: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v, its products left to torch.einsum."""
    q, k, v = qkv.unbind(3)
    logits = torch.einsum("btshd,bushd->bshtu", q * q.shape[-1] ** -0.5, k)
    weights = torch.softmax(logits, dim=-1, dtype=torch.float32).to(v.dtype)
    return torch.einsum("bshtu,bushd->btshd", weights, v).contiguous()


def arrange(qkv: Tensor) -> tuple[Tensor, ...]:
    return qkv.permute(3, 0, 2, 4, 1, 5).flatten(1, 2).unbind(0)  # [B·S, H, T, d]


def restore(out: Tensor, qkv: Tensor) -> Tensor:
    return out.unflatten(0, (-1, qkv.shape[2])).permute(0, 3, 1, 2, 4).contiguous()


BENCH = OpBench(
    **attention(
        ops.temporal_attention,
        temporal_attention_backward_reference,
        tokens=lambda shape: shape["N"],
        lse=False,
    ),
    small={"B": 1, "T": 3, "N": 12, "K": 3, "H": 2, "d": 32},
    cpu=[{"B": 8, "branches": 1, "T": 3, "N": 207, "K": 0, "H": 12, "d": 64}],
    peers={
        **attention_peers(arrange, restore),
        "broadcast": eager(broadcast_formulation),
        "einsum": eager(einsum_formulation),
        "compile_broadcast": compiled(broadcast_formulation),
    },
    options={**attention_options(1), "causal": lambda _: {"causal": True}},
)
