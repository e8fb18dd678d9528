"""Attention over the S tokens of a frame, from a packed QKV projection: D_S of Eq. 5."""

from __future__ import annotations

import torch
from torch import Tensor

from cmpose.ops import backends, checks


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v over the last two dimensions; the softmax in at least float32.

    Autocast does not reach inside: the dtype of the inputs is the dtype of the products.
    """
    with torch.autocast(q.device.type, enabled=False):
        # Scaling q first keeps float16 products in range.
        logits = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
        weights = torch.softmax(logits, dim=-1, dtype=checks.accumulator(logits)).to(v.dtype)
        return torch.matmul(weights, v)


def spatial_attention_reference(qkv: Tensor) -> Tensor:
    """:func:`spatial_attention` as it reads."""
    q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)  # each [B, T, H, S, d]
    return attention_reference(q, k, v).transpose(2, 3).contiguous()


_IMPLEMENTATIONS = {"reference": spatial_attention_reference}


def spatial_attention(qkv: Tensor, *, backend: str = "auto") -> Tensor:
    """Multi-head attention within each frame: softmax(q kᵀ / √d) v over S.

    Args:
        qkv: [B, T, S, 3, H, d], float32, float64, bfloat16 or float16, of any strides: what one
            linear layer of width 3·H·d gives for the tokens of B clips of T frames.
        backend: ``auto``, ``reference``, ``triton`` or ``cuda``.

    Returns:
        [B, T, S, H, d], contiguous, in qkv's dtype; ``.flatten(-2)`` gives the tokens. Products
        accumulate and the softmax runs in at least float32. Gradients flow to qkv. A NaN reaches
        the tokens of its own frame and head only.

    Raises:
        TypeError: qkv is not a floating-point tensor.
        ValueError: another shape.
        BackendUnavailable: the backend asked for cannot run here.
    """
    checks.tensor("qkv", qkv, "B T S 3 H d", {})
    return _IMPLEMENTATIONS[backends.resolve("spatial_attention", backend)](qkv)
