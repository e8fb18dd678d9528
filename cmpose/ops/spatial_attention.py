"""Attention over the S tokens of a frame, from a packed QKV projection: D_S of Eq. 5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cmpose.ops import backends, checks, library
from cmpose.ops.cpu import spatial_attention as cpu

MAX_HEAD_DIM = 128

# -- reference ------------------------------------------------------------------------------------


def attention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / √d) v over the last two dimensions; the softmax in at least float32.

    Autocast is off inside: products have the dtype of the inputs.
    """
    with checks.without_autocast(q):
        # q is scaled before the product, which keeps float16 products in range.
        logits = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
        weights = torch.softmax(logits, dim=-1, dtype=checks.accumulator(logits)).to(v.dtype)
        return torch.matmul(weights, v)


def attention_backward_reference(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`attention_reference` to q, k and v.

    With P = softmax(q kᵀ / √d): dv = Pᵀ g, dP = g vᵀ, dS = P (dP − Σ_j P dP),
    dq = dS k / √d, dk = dSᵀ q / √d.
    """
    with checks.without_autocast(q):
        scaled = q * q.shape[-1] ** -0.5
        logits = torch.matmul(scaled, k.transpose(-1, -2))
        weights = torch.softmax(logits, dim=-1, dtype=checks.accumulator(logits))
        grad_v = torch.matmul(weights.to(v.dtype).transpose(-1, -2), grad)
        grad_weights = torch.matmul(grad, v.transpose(-1, -2)).to(weights.dtype)
        delta = (weights * grad_weights).sum(dim=-1, keepdim=True)
        grad_logits = (weights * (grad_weights - delta)).to(q.dtype)
        grad_q = torch.matmul(grad_logits, k) * q.shape[-1] ** -0.5
        return grad_q, torch.matmul(grad_logits.transpose(-1, -2), scaled), grad_v


def _heads_first(qkv: Tensor) -> tuple[Tensor, ...]:
    return qkv.permute(3, 0, 1, 4, 2, 5).unbind(0)  # each [B, T, H, S, d]


def spatial_attention_reference(qkv: Tensor) -> Tensor:
    """:func:`spatial_attention` in plain PyTorch."""
    return attention_reference(*_heads_first(qkv)).transpose(2, 3).contiguous()


def spatial_attention_backward_reference(grad: Tensor, qkv: Tensor) -> Tensor:
    """Its gradient to qkv, [B, T, S, 3, H, d]."""
    grads = attention_backward_reference(grad.transpose(2, 3), *_heads_first(qkv))
    return torch.stack(grads).permute(1, 2, 4, 0, 3, 5).contiguous()


# -- registered op --------------------------------------------------------------------------------


def _forward_fake(qkv: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    B, T, S, _, H, d = qkv.shape
    if backend == "reference":
        return qkv.new_empty(B, T, S, H, d), qkv.new_empty(0, dtype=torch.float32)
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    return qkv.new_empty(B, T, S, H, d), qkv.new_empty(B, T, H, S, dtype=dtype)


# The second result is the log-sum-exp of every row, [B, T, H, S] in at least float32, which the
# other backends' backward pass reads. The reference's computes it again, so its forward gives none.
_forward = library.register(
    "spatial_attention(Tensor qkv, str backend) -> (Tensor, Tensor)",
    _forward_fake,
    reference=lambda qkv: (
        spatial_attention_reference(qkv),
        qkv.new_empty(0, dtype=torch.float32),
    ),
    cpu=cpu.forward,
    triton=library.triton_kernel("spatial_attention", "forward"),
)
_backward = library.register(
    "spatial_attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, str backend) "
    "-> Tensor",
    lambda grad, qkv, out, lse, backend: qkv.new_empty(qkv.shape),
    reference=lambda grad, qkv, out, lse: spatial_attention_backward_reference(grad, qkv),
    cpu=cpu.backward,
    triton=library.triton_kernel("spatial_attention", "backward"),
)


class _SpatialAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv: Tensor, backend: str) -> Tensor:
        out, lse = _forward(qkv, backend)
        ctx.save_for_backward(qkv, out, lse)
        ctx.backend = backend
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        saved = ctx.saved_tensors
        return library.first_order("spatial_attention", _backward, grad, *saved, ctx.backend), None


# -- public ---------------------------------------------------------------------------------------


def spatial_attention(qkv: Tensor, *, backend: str = "auto") -> Tensor:
    """Multi-head attention within each frame: softmax(q kᵀ / √d) v over S.

    Args:
        qkv: [B, T, S, 3, H, d], float32, float64, bfloat16 or float16, of any strides: the output
            of one linear layer of width 3·H·d for the tokens of B clips of T frames.
        backend: ``auto``, ``reference``, ``cpu``, ``triton`` or ``cuda``.

    Returns:
        [B, T, S, H, d], contiguous, in qkv's dtype; ``.flatten(-2)`` gives the tokens. Products
        accumulate and the softmax runs in at least float32. Gradients flow to qkv. A NaN reaches
        the tokens of its own frame and head only.

    Raises:
        TypeError: qkv is not a floating-point tensor.
        ValueError: qkv has another shape.
        BackendUnavailable: the backend asked for cannot run this call.
    """
    checks.tensor("qkv", qkv, "B T S 3 H d", {})
    chosen = backends.choose("spatial_attention", backend, qkv.device, qkv)
    if chosen == backends.PLAIN:
        return spatial_attention_reference(qkv)
    if torch.is_grad_enabled() and qkv.requires_grad:
        return _SpatialAttention.apply(qkv, chosen)
    return _forward(qkv, chosen)[0]


def _triton_limits(qkv: Tensor) -> str | None:
    if (refusal := backends.dtype_refusal(qkv=qkv)) is not None:
        return refusal
    if qkv.shape[-1] % 16 or not 16 <= qkv.shape[-1] <= MAX_HEAD_DIM:
        taken = f"multiples of 16 up to {MAX_HEAD_DIM}"
        return f"the head dimension is {qkv.shape[-1]}; the kernels take {taken}"
    return None


backends.entry(spatial_attention, "qkv", cpu=None, triton=_triton_limits)
