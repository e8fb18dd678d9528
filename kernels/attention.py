"""What the kernels of the two attention ops share: their options."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def count_of(lengths, item, size):
    """The item's length; one outside 0 to ``size`` is the nearer of the two.

    Halves are compared, as a comparison of 64 bits is several instructions.
    """
    length, most = tl.load(lengths + item), tl.full((), 0, tl.int32) + size
    high, low = (length >> 32).to(tl.int32), length.to(tl.uint32)
    count = tl.minimum(low, most.to(tl.uint32)).to(tl.int32)
    return tl.where(high == 0, count, tl.where(high < 0, 0, most))


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
