"""torch's flash attention for CPUs, which the attention ops run on views of their inputs.

It never holds all weights, and lays its result out as [batch, tokens, heads, d]. Dtypes of half the
width are cast to float32 first: its own kernels for them are slower (the backward pass in float16
ten times on a CPU without such units) and give a log-sum-exp that is off by 5·10⁻⁵.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cmpose.ops import checks

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


def view(x: Tensor) -> Tensor:
    """[batch, tokens, H, d] → [batch, H, tokens, d] of float32 or float64.

    Channels are side by side in memory, as the kernel needs them.
    """
    x = x.to(checks.accumulator(x))
    return (x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2)


def mask_of(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """What the kernel adds to the logits: 0 where a key is ``allowed``, else −∞."""
    added = torch.zeros(allowed.shape, dtype=dtype)
    return added.masked_fill_(~allowed, -torch.inf)


def _folded(scale: float, causal: bool, q: Tensor) -> bool:
    """Whether q is multiplied by the scale beforehand: the kernel multiplies the −∞ of later keys
    by its scale too, and a scale of 0 or below would make NaN or +∞ of it."""
    return causal and scale < torch.finfo(q.dtype).tiny


def attend(
    qkv: Sequence[Tensor], scale: float, mask: Tensor | None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """[batch, tokens, H, d], contiguous, and the log-sum-exp as the kernel gives it.

    Args:
        qkv: q, k and v, what :func:`view` gives.
        scale: factor of the logits.
        mask: what :func:`mask_of` gives, [batch, 1, 1, tokens].
        causal: whether a query attends to no later key.
    """
    q, k, v = qkv
    if _folded(scale, causal, q):
        q, scale = q * scale, 1.0
    out, lse = _forward(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return out.transpose(1, 2), lse


def gradients(
    grad: Tensor,
    qkv: Sequence[Tensor],
    out: Tensor,
    lse: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool = False,
) -> list[Tensor]:
    """The gradients to q, k and v, each [batch, tokens, H, d].

    ``grad`` and ``out`` are what :func:`view` gives, ``lse`` is what :func:`attend` gave.
    """
    q, k, v = qkv
    factor = None
    if _folded(scale, causal, q):
        q, scale, factor = q * scale, 1.0, scale
    grads = _backward(grad, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale)
    if factor is not None:
        grads = grads[0] * factor, *grads[1:]
    return [g.transpose(1, 2) for g in grads]
