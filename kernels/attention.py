"""What the kernels of the two attention ops share: their options."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def count_of(lengths, item, size):
    """The item's length; one outside 0 to ``size`` is the nearer of the two."""
    length = tl.load(lengths + item)
    return tl.where(length < 0, 0, tl.minimum(length, size).to(tl.int32))


def operands(
    qkv: Tensor, key: Tensor | None, value: Tensor | None
) -> tuple[tuple[int | None, ...], tuple[Any, ...]]:
    """The strides of ``qkv``; ``key`` and ``value``, each with its own. None is not compiled in."""
    if key is None or value is None:
        return qkv.stride(), (None,) * 12
    strides = qkv.stride()
    return (*strides[:3], None, *strides[3:]), (key, *key.stride(), value, *value.stride())


def given_scale(scale: float | None, qkv: Tensor) -> float | None:
    """None for the default, which is compiled in."""
    return None if scale is None or scale == qkv.shape[-1] ** -0.5 else scale
