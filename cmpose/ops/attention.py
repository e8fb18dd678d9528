"""What the two attention ops share: their arguments, padding, and the reference's equations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmpose.ops import backends, checks

Projection = Tensor | Sequence[Tensor]
"""qkv [B, T, S, 3, H, d], or q, k and v, each [B, T, S, H, d]."""

# -- arguments ------------------------------------------------------------------------------------


def operands(qkv: Projection) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What a registered op takes: q, k and v, or the packed projection and None twice.

    Raises:
        TypeError: they are no floating-point tensors, or of different dtypes.
        ValueError: they have another shape, or are on different devices.
    """
    if not isinstance(qkv, Tensor) and isinstance(qkv, (tuple, list)):
        if len(qkv) != 3:
            raise ValueError(f"qkv must be one tensor or three (q, k and v), got {len(qkv)}")
        sizes: checks.Sizes = {}
        for name, value in zip("qkv", qkv, strict=True):
            checks.tensor(name, value, "B T S H d", sizes)
        q, k, v = qkv
        checks.same_dtype("q", q, k=k, v=v)
        checks.same_device("q", q, k=k, v=v)
        return q, k, v
    checks.tensor("qkv", qkv, "B T S 3 H d", {})
    assert isinstance(qkv, Tensor)
    return qkv, None, None


def separate(qkv: Tensor, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, each [B, T, S, H, d], of a registered op's operands."""
    if k is None or v is None:
        q, k, v = qkv.unbind(3)
        return q, k, v
    return qkv, k, v


def joined(grads: Sequence[Tensor], k: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients [B, T, S, H, d] as a registered op returns them: packed where its operand was."""
    if k is None:
        packed = torch.stack(list(grads), dim=3)
        return packed, packed.new_empty(0), packed.new_empty(0)
    q, k, v = (g.contiguous() for g in grads)
    return q, k, v


def empty_gradients(
    qkv: Tensor, k: Tensor | None, v: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty gradients, as :func:`joined` gives them."""
    if k is None or v is None:
        return qkv.new_empty(qkv.shape), qkv.new_empty(0), qkv.new_empty(0)
    return qkv.new_empty(qkv.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def scale_of(scale: float | None, qkv: Tensor) -> float:
    """The factor of the logits: ``scale``, or d^-1/2.

    Raises:
        TypeError, ValueError: scale is no number that is finite in the dtype of sums.
    """
    if scale is None:
        return qkv.shape[-1] ** -0.5
    checks.number("scale", scale, checks.accumulator(qkv))
    return float(scale)


def kernel_refusal(first: Tensor) -> str | None:
    """Why no Triton kernel takes a projection, or one of q, k and v; or None."""
    return backends.dtype_refusal(qkv=first) or backends.interpreter_refusal(qkv=first)


# -- padding --------------------------------------------------------------------------------------


def without_padding(
    padding: Tensor, qkv: Tensor, k: Tensor | None, v: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Operands with 0 at padded tokens, so that nothing there, NaN included, reaches a product.

    ``padding`` is bool [B, T, S], or of sizes 1.
    """
    if k is None or v is None:
        return qkv.masked_fill(padding[..., None, None, None], 0.0), None, None
    q, k, v = (t.masked_fill(padding[..., None, None], 0.0) for t in (qkv, k, v))
    return q, k, v


def keys_within(lengths: Tensor, size: int) -> Tensor:
    """Which of ``size`` keys may be attended to: bool [..., size].

    The first always may: a query without a key would give NaN. Where there is no token the first is
    zero, and what its query gives is set to zero.
    """
    return torch.arange(size, device=lengths.device) < lengths.clamp(min=1)[..., None]


# -- reference ------------------------------------------------------------------------------------


def _wide(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype of products. On a CPU that is at least float32: products of 16 bits
    are no faster there, and round logits of 4,000 to whole numbers. On a GPU, where tensor cores
    sum in float32, products round to the tensors' dtype, as those of a model in plain PyTorch."""
    if tensors[0].device.type != "cpu":
        return list(tensors)
    return [t.to(checks.accumulator(t)) for t in tensors]


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, scale: float, allowed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale · q kᵀ) v over the last two dimensions, and the log-sum-exp of its logits.

    Autocast is off inside, but not in autograd's backward pass of it, whose products have the
    dtype of an autocast that the pass runs in. The softmax is in at least float32.

    Args:
        q, k, v: [..., L, d].
        scale: factor of the logits.
        allowed: bool [..., L or 1, L], which keys a query attends to, at least one; None is all.

    Returns:
        [..., L, d] in q's dtype, [..., L] in at least float32.
    """
    dtype = q.dtype
    with checks.without_autocast(q):
        q, k, v = _wide(q, k, v)
        # q is scaled before the product, which keeps float16 products in range.
        logits = torch.matmul(q * scale, k.transpose(-1, -2)).to(checks.accumulator(q))
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        weights = torch.softmax(logits, dim=-1).to(v.dtype)
        return torch.matmul(weights, v).to(dtype), torch.logsumexp(logits, dim=-1)


# Many parameters: those of the equation.
def attention_backward_reference(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    allowed: Tensor | None = None,
    grad_lse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`attention_reference` to q, k and v.

    With P the weights and l the log-sum-exp: dv = Pᵀ g, dP = g vᵀ, dS = P (dP − Σ_j P dP + dl),
    dq = scale · dS k, dk = scale · dSᵀ q.
    """
    dtype = q.dtype
    with checks.without_autocast(q):
        grad, q, k, v = _wide(grad, q, k, v)
        scaled = q * scale
        logits = torch.matmul(scaled, k.transpose(-1, -2)).to(checks.accumulator(q))
        if allowed is not None:
            logits = logits.masked_fill(~allowed, -torch.inf)
        weights = torch.softmax(logits, dim=-1)
        grad_v = torch.matmul(weights.to(v.dtype).transpose(-1, -2), grad)
        grad_weights = torch.matmul(grad, v.transpose(-1, -2)).to(weights.dtype)
        change = grad_weights - (weights * grad_weights).sum(dim=-1, keepdim=True)
        if grad_lse is not None:
            change = change + grad_lse[..., None]
        grad_logits = (weights * change).to(q.dtype)
        grad_q = torch.matmul(grad_logits, k) * scale
        grad_k = torch.matmul(grad_logits.transpose(-1, -2), scaled)
        return grad_q.to(dtype), grad_k.to(dtype), grad_v.to(dtype)
