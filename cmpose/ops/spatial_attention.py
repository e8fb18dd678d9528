"""Attention over the S tokens of a frame: D_S of Eq. 5."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor

from cmpose.ops import attention, backends, checks, cuda, library
from cmpose.ops.attention import Projection
from cmpose.ops.cpu import spatial_attention as cpu

MAX_HEAD_DIM = 128

# -- reference ------------------------------------------------------------------------------------


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(2, 3)  # [B, T, H, S, d]


def _allowed(lengths: Tensor | None, S: int) -> Tensor | None:
    """The keys of each frame: [B, T, 1, 1, S]."""
    return None if lengths is None else attention.keys_within(lengths, S)[:, :, None, None]


def spatial_attention_reference(
    qkv: Tensor, k: Tensor | None, v: Tensor | None, lengths: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """:func:`spatial_attention` in plain PyTorch: [B, T, S, H, d], and lse [B, T, H, S].

    What padded queries give is without meaning: :func:`spatial_attention` replaces it.
    """
    q, k, v = (_heads_first(x) for x in attention.separate(qkv, k, v))
    allowed = _allowed(lengths, qkv.shape[2])
    out, lse = attention.attention_reference(q, k, v, scale, allowed)
    return _heads_first(out).contiguous(), lse


def spatial_attention_backward_reference(grad: Tensor, qkv: Tensor) -> Tensor:
    """Its gradient to the packed projection, without options: [B, T, S, 3, H, d]."""
    unread, scale = qkv.new_empty(0), attention.scale_of(None, qkv)
    return _backward_reference(grad, None, qkv, None, None, None, unread, unread, scale)[0]


# Many parameters: those of the registered op.
def _backward_reference(
    grad: Tensor,
    grad_lse: Tensor | None,
    qkv: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    g, q, key, value = (_heads_first(x) for x in (grad, *attention.separate(qkv, k, v)))
    allowed = _allowed(lengths, qkv.shape[2])
    grads = attention.attention_backward_reference(g, q, key, value, scale, allowed, grad_lse)
    return attention.joined([_heads_first(g) for g in grads], k)


# -- CUDA C++ -------------------------------------------------------------------------------------

CUDA_HEAD_DIMS = (64, 80)
CUDA_TOKENS = 208
"""``kMaxAttentionTokens`` of csrc/ops.h; torch.compile traces what reads it."""


def cuda_refusal(qkv: Tensor) -> str | None:
    """Why the CUDA C++ kernels do not take a projection, or one of q, k and v; or None."""
    if qkv.dtype not in (torch.bfloat16, torch.float16):
        return f"qkv is {str(qkv.dtype)[6:]}; the CUDA kernels take bfloat16 and float16"
    if qkv.shape[-1] not in CUDA_HEAD_DIMS:
        head_dims = " and ".join(map(str, CUDA_HEAD_DIMS))
        return f"the head dimension is {qkv.shape[-1]}; the CUDA kernels take {head_dims}"
    if qkv.shape[2] > CUDA_TOKENS:
        return f"a frame has {qkv.shape[2]} tokens; the CUDA kernels take up to {CUDA_TOKENS}"
    return None


def _in_rows(x: Tensor) -> bool:
    """Whether kernels can read [B, T, S, H, d] as it lies: in aligned pieces of 16 bytes."""
    return (
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:4])
        # Of rows behind the last, too, addresses are computed, though nothing is read there.
        and CUDA_TOKENS * x.stride(2) < 2**31
    )


def _copied(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


# Many parameters: those of the registered op.
def _cuda_forward(
    qkv: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """The attention, and its log-sum-exp if it is asked for, in one launch."""
    out, lse = _forward_fake(qkv, k, v, lengths, scale, with_lse)
    operands = [x if _in_rows(x) else _copied(x) for x in attention.separate(qkv, k, v)]
    cuda.call(
        "spatial_attention",
        qkv,
        cuda.DTYPES[qkv.dtype],
        *out.shape,
        scale,
        *(x.stride()[:4] for x in operands),
        cuda.multiprocessors(qkv),
        cuda.shared_bytes(qkv),
        *(*operands, None if lengths is None else lengths.contiguous(), out),
        lse if with_lse else None,
    )
    return out, lse


# Many parameters: those of the registered op.
def _cuda_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    qkv: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients to the operands, in one launch that reads neither ``out`` nor ``lse``."""
    results = attention.empty_gradients(qkv, k, v)
    if qkv.numel() == 0:
        return results
    operands = [x if _in_rows(x) else _copied(x) for x in (*attention.separate(qkv, k, v), grad)]
    grads = results[0].unbind(3) if k is None else results
    cuda.call(
        "spatial_attention_backward",
        qkv,
        cuda.DTYPES[qkv.dtype],
        *grad.shape,
        scale,
        *(x.stride()[:4] for x in operands),
        grads[0].stride(2),
        cuda.multiprocessors(qkv),
        *operands,
        *(None if x is None else x.contiguous() for x in (lengths, grad_lse)),
        *grads,
    )
    return results


# -- registered op --------------------------------------------------------------------------------


# Many parameters: those of the registered op.
def _forward_fake(
    qkv: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    with_lse: bool,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    B, T, S, H, d = (*qkv.shape[:3], *qkv.shape[-2:])
    shape = (B, T, H, S) if with_lse else (0,)
    return qkv.new_empty(B, T, S, H, d), qkv.new_empty(shape, dtype=checks.accumulator(qkv))


def _where_asked(forward: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Any]:
    """An implementation that always finds the log-sum-exp, returning it where it is asked for."""

    def run(*arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = forward(*arguments[:-1])
        return out, lse if arguments[-1] else lse.new_empty(0)

    return run


_triton_forward = library.triton_kernel("spatial_attention", "forward")
_triton_backward = library.triton_kernel("spatial_attention", "backward")


# Many parameters: those of the registered op.
def _kernel_gradients(
    grad: Tensor,
    grad_lse: Tensor | None,
    qkv: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    lengths: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _triton_backward(grad, qkv, out, lse, k, v, lengths, scale, grad_lse)
    return grads if k is not None else (*grads, qkv.new_empty(0), qkv.new_empty(0))


# Beside the result the log-sum-exp of every row, which backward passes read; else it is empty.
_forward = library.register(
    "spatial_attention(Tensor qkv, Tensor? k, Tensor? v, Tensor? lengths, float scale, "
    "bool with_lse, str backend) -> (Tensor, Tensor)",
    _forward_fake,
    reference=_where_asked(spatial_attention_reference),
    cpu=_where_asked(cpu.forward),
    triton=_where_asked(_triton_forward),
    cuda=_cuda_forward,
)
_backward = library.register(
    "spatial_attention_backward(Tensor grad, Tensor? grad_lse, Tensor qkv, Tensor? k, Tensor? v, "
    "Tensor? lengths, Tensor out, Tensor lse, float scale, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    lambda grad, grad_lse, qkv, k, v, *_: attention.empty_gradients(qkv, k, v),
    reference=_backward_reference,
    cpu=cpu.backward,
    cuda=_cuda_backward,
    triton=_kernel_gradients,
)


class _SpatialAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        out, lse = _forward(*arguments)
        ctx.save_for_backward(*arguments[:4], out, lse)
        ctx.options = arguments[4], arguments[6]
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor | None, grad_lse: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grad = torch.zeros_like(saved[-2]) if grad is None else grad
        grads = library.first_order(
            "spatial_attention", _backward, grad, grad_lse, *saved, *ctx.options
        )
        separate = saved[1] is not None
        return grads[0], *(grads[1:] if separate else (None, None)), None, None, None, None


# -- public ---------------------------------------------------------------------------------------


@overload
def spatial_attention(
    qkv: Projection,
    *,
    lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[False] = False,
    backend: str = "auto",
) -> Tensor: ...


@overload
def spatial_attention(
    qkv: Projection,
    *,
    lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: Literal[True],
    backend: str = "auto",
) -> tuple[Tensor, Tensor]: ...


def spatial_attention(
    qkv: Projection,
    *,
    lengths: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Multi-head attention within each frame: softmax(scale · q kᵀ) v over S.

    Args:
        qkv: [B, T, S, 3, H, d], float32, float64, bfloat16 or float16, of any strides: the output
            of one linear layer of width 3·H·d for the tokens of B clips of T frames. Or q, k and v
            in a tuple, each [B, T, S, H, d], of any strides, such as views of one projection.
        lengths: int64 [B, T] or [B·T], how many of a frame's tokens count, 0 to S; the others are
            padding: no query attends to them, and they give 0. None: all count.
        scale: a number that is finite in float32 (float64 for float64 tensors); None is 1/√d.
        return_lse: returns the log-sum-exp of the logits too.
        backend: ``auto``, ``reference``, ``cpu``, ``triton`` or ``cuda``.

    Returns:
        [B, T, S, H, d], contiguous, in qkv's dtype; ``.flatten(-2)`` gives the tokens. Products
        accumulate and the softmax runs in at least float32. With ``return_lse`` also
        log Σ_j exp(scale · q_i k_j), [B, T, H, S], in at least float32, −inf for padded queries.
        Gradients flow from both to q, k and v. A NaN reaches the tokens of its own frame and head
        only, one in padding none.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: a wrong shape or scale; on the CPU also a length outside 0 to S, which counts as
            the nearer of the two elsewhere.
        BackendUnavailable: the backend asked for cannot run this call.
    """
    first, k, v = attention.operands(qkv)
    if lengths is not None:
        lengths = _frame_lengths(lengths, first)
    checks.boolean("return_lse", return_lse)
    factor = attention.scale_of(scale, first)
    chosen = backends.choose(
        "spatial_attention", backend, first.device, qkv, lengths, scale, return_lse
    )
    differentiable = chosen != backends.PLAIN and library.wants_gradient(
        "spatial_attention", first, k, v
    )
    padding = None
    if lengths is not None and chosen not in ("triton", "cuda"):  # whose kernels see to that
        padding = _padding(lengths, first)
        first, k, v = attention.without_padding(padding, first, k, v)
    tensors = (first, k, v, lengths)
    if chosen == backends.PLAIN:
        out, lse = spatial_attention_reference(*tensors, factor)
    elif differentiable:
        with_lse = return_lse or chosen != "cuda"  # whose backward pass reads none
        out, lse = _SpatialAttention.apply(*tensors, factor, with_lse, chosen)
    else:
        out, lse = _forward(*tensors, factor, return_lse, chosen)
    if padding is not None:
        out = out.masked_fill(padding[..., None, None], 0.0)
        lse = lse.masked_fill(padding[:, :, None], -torch.inf) if return_lse else lse
    return (out, lse) if return_lse else out


def _padding(lengths: Tensor, first: Tensor) -> Tensor:
    """Which tokens are padding: bool [B, T, S]."""
    return torch.arange(first.shape[2], device=first.device) >= lengths[..., None]


def _frame_lengths(lengths: Tensor, first: Tensor) -> Tensor:
    """Checked lengths, as [B, T]."""
    B, T, S = first.shape[:3]
    if isinstance(lengths, Tensor) and lengths.ndim == 1:
        checks.tensor("lengths", lengths, "B·T", {"B·T": B * T}, checks.INDEX)
        lengths = lengths.reshape(B, T)
    checks.tensor("lengths", lengths, "B T", {"B": B, "T": T}, checks.INDEX)
    checks.same_device("qkv", first, lengths=lengths)
    checks.indices("lengths", lengths, S + 1, "S tokens a frame")
    return lengths


def _triton_limits(
    qkv: Projection, lengths: Tensor | None, scale: float | None, return_lse: bool
) -> str | None:
    first = qkv if isinstance(qkv, Tensor) else qkv[0]
    if (refusal := attention.kernel_refusal(first)) is not None:
        return refusal
    if first.shape[-1] % 16 or not 16 <= first.shape[-1] <= MAX_HEAD_DIM:
        head_dims = f"multiples of 16 up to {MAX_HEAD_DIM}"
        return f"the head dimension is {first.shape[-1]}; the kernels take {head_dims}"
    return None


def _cuda_limits(
    qkv: Projection, lengths: Tensor | None, scale: float | None, return_lse: bool
) -> str | None:
    return cuda_refusal(qkv if isinstance(qkv, Tensor) else qkv[0])


backends.entry(spatial_attention, "qkv", cpu=None, triton=_triton_limits, cuda=_cuda_limits)
