"""Attention over the T frames at each position, from a packed QKV projection: D_T of Eq. 5."""

from __future__ import annotations

from torch import Tensor

from cmpose.ops import backends, checks
from cmpose.ops.spatial_attention import attention_reference


def temporal_attention_reference(qkv: Tensor) -> Tensor:
    """:func:`temporal_attention` as it reads."""
    q, k, v = qkv.permute(3, 0, 2, 4, 1, 5).unbind(0)  # each [B, S, H, T, d]
    return attention_reference(q, k, v).permute(0, 3, 1, 2, 4).contiguous()


_IMPLEMENTATIONS = {"reference": temporal_attention_reference}


def temporal_attention(qkv: Tensor, *, backend: str = "auto") -> Tensor:
    """Multi-head attention along time at each position: softmax(q kᵀ / √d) v over T.

    Args:
        qkv: [B, T, S, 3, H, d], float32, float64, bfloat16 or float16, of any strides;
            T ≥ 1 (kernels are for 2 to 16).
        backend: ``auto``, ``reference``, ``triton`` or ``cuda``.

    Returns:
        [B, T, S, H, d], contiguous, in qkv's dtype. Products accumulate and the softmax runs in
        at least float32. Gradients flow to qkv. A NaN reaches its own position and head only.

    Raises:
        TypeError: qkv is not a floating-point tensor.
        ValueError: another shape, or no frame.
        BackendUnavailable: the backend asked for cannot run here.
    """
    checks.tensor("qkv", qkv, "B T S 3 H d", {})
    if qkv.shape[1] < 1:
        raise ValueError(f"qkv must have at least one frame (dimension 1), got {list(qkv.shape)}")
    return _IMPLEMENTATIONS[backends.resolve("temporal_attention", backend)](qkv)
