"""Attention over the T frames at each position: D_T of Eq. 5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cmpose.ops import attention, backends, checks, library
from cmpose.ops.attention import Projection
from cmpose.ops.cpu import temporal_attention as cpu

MAX_HEAD_DIM = 128
MAX_FRAMES = 32

# -- reference ------------------------------------------------------------------------------------


def _time_inside(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1, 4)  # [B, S, H, T, d]


def _time_outside(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2, 4)  # [B, T, S, H, d]


def _allowed(lengths: Tensor | None, causal: bool, q: Tensor) -> Tensor | None:
    """The frames that a frame attends to: [B or 1, 1, 1, T or 1, T]."""
    T, allowed = q.shape[1], None
    if lengths is not None:
        allowed = attention.keys_within(lengths, T)[:, None, None, None]
    if causal:
        order = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
        allowed = order if allowed is None else allowed & order
    return allowed


# Many parameters: those of the registered op.
def temporal_attention_reference(
    qkv: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    causal: bool,
) -> Tensor:
    """:func:`temporal_attention` in plain PyTorch.

    What padded queries give is without meaning: :func:`temporal_attention` replaces it.
    """
    q, k, v = (_time_inside(x) for x in attention.separate(qkv, k, v))
    allowed = _allowed(lengths, causal, qkv)
    out, _ = attention.attention_reference(q, k, v, scale, allowed)
    return _time_outside(out).contiguous()


def temporal_attention_backward_reference(grad: Tensor, qkv: Tensor) -> Tensor:
    """Its gradient to the packed projection, without options: [B, T, S, 3, H, d]."""
    scale = attention.scale_of(None, qkv)
    return _backward_reference(grad, qkv, None, None, None, scale, False)[0]


# Many parameters: those of the registered op.
def _backward_reference(
    grad: Tensor,
    qkv: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    g, q, key, value = (_time_inside(x) for x in (grad, *attention.separate(qkv, k, v)))
    allowed = _allowed(lengths, causal, qkv)
    grads = attention.attention_backward_reference(g, q, key, value, scale, allowed)
    return attention.joined([_time_outside(g) for g in grads], k)


# -- registered op --------------------------------------------------------------------------------


def _forward_fake(qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(*qkv.shape[:3], *qkv.shape[-2:])


_triton_forward = library.triton_kernel("temporal_attention", "forward")
_triton_backward = library.triton_kernel("temporal_attention", "backward")


# Many parameters: those of the registered op.
def _kernel_gradients(
    grad: Tensor,
    qkv: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _triton_backward(grad, qkv, k, v, lengths, scale, causal)
    return grads if k is not None else (*grads, qkv.new_empty(0), qkv.new_empty(0))


_forward = library.register(
    "temporal_attention(Tensor qkv, Tensor? k, Tensor? v, Tensor? lengths, float scale, "
    "bool causal, str backend) -> Tensor",
    _forward_fake,
    reference=temporal_attention_reference,
    cpu=cpu.forward,
    triton=_triton_forward,
)
_backward = library.register(
    "temporal_attention_backward(Tensor grad, Tensor qkv, Tensor? k, Tensor? v, Tensor? lengths, "
    "float scale, bool causal, str backend) -> (Tensor, Tensor, Tensor)",
    lambda grad, qkv, k, v, *_: attention.empty_gradients(qkv, k, v),
    reference=_backward_reference,
    cpu=cpu.backward,
    triton=_kernel_gradients,
)


class _TemporalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        ctx.save_for_backward(*arguments[:4])
        ctx.options = arguments[4:]
        return _forward(*arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grads = library.first_order("temporal_attention", _backward, grad, *saved, *ctx.options)
        separate = saved[1] is not None
        return grads[0], *(grads[1:] if separate else (None, None)), None, None, None, None


# -- public ---------------------------------------------------------------------------------------


def temporal_attention(
    qkv: Projection,
    *,
    lengths: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Multi-head attention along time at each position: softmax(scale · q kᵀ) v over T.

    Args:
        qkv: [B, T, S, 3, H, d], float32, float64, bfloat16 or float16, of any strides. Or q, k and
            v in a tuple, each [B, T, S, H, d], of any strides, such as views of one projection.
        lengths: int64 [B], how many of a clip's frames count, 0 to T; the others are padding: no
            frame attends to them, and they give 0. None: all count.
        causal: whether a frame attends to itself and earlier ones only.
        scale: a number that is finite in float32 (float64 for float64 tensors); None is 1/√d.
        backend: ``auto``, ``reference``, ``cpu``, ``triton`` or ``cuda``.

    Returns:
        [B, T, S, H, d], contiguous, in qkv's dtype. Products accumulate and the softmax runs in
        at least float32. Gradients flow to q, k and v. A NaN reaches its own position and head
        only, one in padding none.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or scale; on the CPU also a length outside 0 to T, which counts as
            the nearer of the two elsewhere.
        BackendUnavailable: the backend asked for cannot run this call.
    """
    first, k, v = attention.operands(qkv)
    B, T = first.shape[:2]
    if lengths is not None:
        checks.tensor("lengths", lengths, "B", {"B": B}, checks.INDEX)
        checks.same_device("qkv", first, lengths=lengths)
        checks.indices("lengths", lengths, T + 1, "T frames a clip")
    checks.boolean("causal", causal)
    factor = attention.scale_of(scale, first)
    chosen = backends.choose(
        "temporal_attention", backend, first.device, qkv, lengths, causal, scale
    )
    padding = None
    if lengths is not None and chosen != "triton":  # whose kernels see to that
        padding = (torch.arange(T, device=first.device) >= lengths[:, None])[..., None]  # [B, T, 1]
        first, k, v = attention.without_padding(padding, first, k, v)
    tensors, options = (first, k, v, lengths), (factor, causal)
    if chosen == backends.PLAIN:
        out = temporal_attention_reference(*tensors, *options)
    elif library.wants_gradient("temporal_attention", *tensors):
        out = _TemporalAttention.apply(*tensors, *options, chosen)
    else:
        out = _forward(*tensors, *options, chosen)
    return out if padding is None else out.masked_fill(padding[..., None, None], 0.0)


def _triton_limits(
    qkv: Projection, lengths: Tensor | None, causal: bool, scale: float | None
) -> str | None:
    first = qkv if isinstance(qkv, Tensor) else qkv[0]
    if (refusal := attention.kernel_refusal(first)) is not None:
        return refusal
    if first.shape[1] > MAX_FRAMES:
        return f"there are {first.shape[1]} frames; the kernels take up to {MAX_FRAMES}"
    if first.shape[-1] % 16 or first.shape[-1] > MAX_HEAD_DIM:
        head_dims = f"multiples of 16 up to {MAX_HEAD_DIM}"
        return f"the head dimension is {first.shape[-1]}; the kernels take {head_dims}"
    return None


backends.entry(temporal_attention, "qkv", cpu=None, triton=_triton_limits)
