"""Attention over the T frames at each position, from a packed QKV projection: D_T of Eq. 5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cmpose.ops import backends, checks, library
from cmpose.ops.spatial_attention import attention_backward_reference, attention_reference

HEAD_DIMS = (32, 64, 80, 128)
MAX_FRAMES = 16

# -- reference ------------------------------------------------------------------------------------


def _time_inside(qkv: Tensor) -> tuple[Tensor, ...]:
    return qkv.permute(3, 0, 2, 4, 1, 5).unbind(0)  # each [B, S, H, T, d]


def temporal_attention_reference(qkv: Tensor) -> Tensor:
    """:func:`temporal_attention` in plain PyTorch."""
    return attention_reference(*_time_inside(qkv)).permute(0, 3, 1, 2, 4).contiguous()


def temporal_attention_backward_reference(grad: Tensor, qkv: Tensor) -> Tensor:
    """Its gradient to qkv, [B, T, S, 3, H, d]."""
    grads = attention_backward_reference(grad.permute(0, 2, 3, 1, 4), *_time_inside(qkv))
    return torch.stack(grads).permute(1, 4, 2, 0, 3, 5).contiguous()


# -- registered op --------------------------------------------------------------------------------


def _forward_fake(qkv: Tensor, backend: str) -> Tensor:
    B, T, S, _, H, d = qkv.shape
    return qkv.new_empty(B, T, S, H, d)


_forward = library.register(
    "temporal_attention(Tensor qkv, str backend) -> Tensor",
    _forward_fake,
    reference=temporal_attention_reference,
    triton=library.triton_kernel("temporal_attention", "forward"),
)
_backward = library.register(
    "temporal_attention_backward(Tensor grad, Tensor qkv, str backend) -> Tensor",
    lambda grad, qkv, backend: qkv.new_empty(qkv.shape),
    reference=temporal_attention_backward_reference,
    triton=library.triton_kernel("temporal_attention", "backward"),
)


class _TemporalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(qkv)
        ctx.backend = backend
        return _forward(qkv, backend)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (qkv,) = ctx.saved_tensors
        return library.first_order("temporal_attention", _backward, grad, qkv, ctx.backend), None


# -- public ---------------------------------------------------------------------------------------


def temporal_attention(qkv: Tensor, *, backend: str = "auto") -> Tensor:
    """Multi-head attention along time at each position: softmax(q kᵀ / √d) v over T.

    Args:
        qkv: [B, T, S, 3, H, d], float32, float64, bfloat16 or float16, of any strides;
            T ≥ 1 (the kernels take 2 to 16).
        backend: ``auto``, ``reference``, ``cpu``, ``triton`` or ``cuda``.

    Returns:
        [B, T, S, H, d], contiguous, in qkv's dtype. Products accumulate and the softmax runs in
        at least float32. Gradients flow to qkv. A NaN reaches its own position and head only.

    Raises:
        TypeError: qkv is not a floating-point tensor.
        ValueError: qkv has another shape, or no frame.
        BackendUnavailable: the backend asked for cannot run this call.
    """
    checks.tensor("qkv", qkv, "B T S 3 H d", {})
    if qkv.shape[1] < 1:
        raise ValueError(f"qkv must have at least one frame (dimension 1), got {list(qkv.shape)}")
    chosen = backends.choose("temporal_attention", backend, qkv.device, qkv)
    if chosen == backends.PLAIN:
        return temporal_attention_reference(qkv)
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _TemporalAttention.apply(qkv, chosen)
    return _forward(qkv, chosen)


def _triton_limits(qkv: Tensor) -> str | None:
    if (refusal := backends.dtype_refusal(qkv=qkv)) is not None:
        return refusal
    if not 2 <= qkv.shape[1] <= MAX_FRAMES:
        return f"there are {qkv.shape[1]} frames; the kernels take 2 to {MAX_FRAMES}"
    if qkv.shape[-1] not in HEAD_DIMS:
        taken = ", ".join(map(str, HEAD_DIMS))
        return f"the head dimension is {qkv.shape[-1]}; the kernels take {taken}"
    return None


backends.entry(temporal_attention, "qkv", triton=_triton_limits)
