"""Floating-point operations of a training step, counted as it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode


def _product_added(_: Any, a: Any, b: Any, **__: Any) -> int:
    """A product that is added to a tensor in place, which torch does not count by itself."""
    return 2 * a[0] * a[1] * b[1]


def _attention(qkv: Any, axis: int) -> int:
    """Q Kᵀ and P V of qkv [B, T, S, 3, H, d] over an axis."""
    B, T, S, _, H, d = qkv
    return 4 * B * T * S * qkv[axis] * H * d


def counter() -> FlopCounterMode:
    """Counts the operations of what runs within it, on the meta device too.

    A multiplication and an addition are two operations. Only matrix products, convolutions and
    attention count; the clustering's distances do not. Of attention's backward pass the four
    products count that its gradients are made of, not what a kernel computes again.
    """
    ops = torch.ops.cmpose
    mapping = {
        torch.ops.aten.addmm_: _product_added,
        ops.spatial_attention: lambda qkv, *_, **__: _attention(qkv, 2),
        ops.spatial_attention_backward: lambda _, __, qkv, *___, **____: 2 * _attention(qkv, 2),
        ops.temporal_attention: lambda qkv, *_, **__: _attention(qkv, 1),
        ops.temporal_attention_backward: lambda _, qkv, *__, **___: 2 * _attention(qkv, 1),
    }
    return FlopCounterMode(display=False, custom_mapping=mapping)
