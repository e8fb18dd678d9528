"""Spatial attention by torch's flash attention for CPUs, on views of the packed projection.

That kernel computes logits and sums in float32 for every dtype of half the width, never holds a
row of weights, and writes [B, S, H, d] in memory, which is what the op returns.
"""

from __future__ import annotations

import torch
from torch import Tensor

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def _frames(x: Tensor) -> Tensor:
    """[B, T, S, H, d] → [B·T, H, S, d]; a view where B and T can be one dimension."""
    return (x if x.stride(-1) == 1 else x.contiguous()).flatten(0, 1).transpose(1, 2)


def forward(qkv: Tensor) -> tuple[Tensor, Tensor]:
    """The attention, and the log-sum-exp of every row: [B, T, H, S], float32 or wider."""
    B, T, S, _, H, d = qkv.shape
    if qkv.numel() == 0:  # the kernel divides by the number of frames and heads
        dtype = torch.promote_types(qkv.dtype, torch.float32)
        return qkv.new_empty(B, T, S, H, d), qkv.new_empty(B, T, H, S, dtype=dtype)
    out, lse = _attend(*[_frames(x) for x in qkv.unbind(3)])
    return out.transpose(1, 2).reshape(B, T, S, H, d), lse.reshape(B, T, H, S).contiguous()


def backward(grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor) -> Tensor:
    """The gradient to qkv."""
    if qkv.numel() == 0:
        return qkv.new_empty(qkv.shape)
    q, k, v = (_frames(x) for x in qkv.unbind(3))
    grads = _attend_backward(_frames(grad), q, k, v, _frames(out), lse.flatten(0, 1), 0.0, False)
    return torch.stack([g.transpose(1, 2) for g in grads], dim=2).reshape(qkv.shape)
