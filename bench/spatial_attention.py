"""spatial_attention: within each frame, over patch and keypoint tokens."""

from __future__ import annotations

from torch import Tensor

from bench.harness.attention import attention, attention_options, attention_peers
from bench.harness.workload import OpBench
from cmpose import ops
from cmpose.ops.spatial_attention import spatial_attention_backward_reference


def arrange(qkv: Tensor) -> tuple[Tensor, ...]:
    return qkv.flatten(0, 1).permute(2, 0, 3, 1, 4).unbind(0)  # [B·T, H, S, d]


def restore(out: Tensor, qkv: Tensor) -> Tensor:
    return out.transpose(1, 2).unflatten(0, qkv.shape[:2]).contiguous()


BENCH = OpBench(
    **attention(
        ops.spatial_attention,
        spatial_attention_backward_reference,
        tokens=lambda shape: shape["N"] + shape["K"],
        lse=True,
    ),
    small={"B": 1, "T": 2, "N": 12, "K": 3, "H": 2, "d": 16},
    cpu=[{"B": 8, "branches": 1, "T": 3, "N": 192, "K": 15, "H": 12, "d": 64}],
    peers=attention_peers(arrange, restore),
    options={**attention_options(2), "lse": lambda _: {"return_lse": True}},
)
