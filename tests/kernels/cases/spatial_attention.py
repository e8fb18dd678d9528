"""What the compile check compiles of ``spatial_attention``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cmpose.kernels import spatial_attention

HEADS = {32: 12, 64: 12, 80: 16, 96: 8, 128: 8}
"""Head dimension → heads: half of ViTPose-S's, ViTPose-B's, ViTPose-H's, and two wider ones."""


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def both(tokens: int, d: int, dtype: torch.dtype) -> None:
    qkv = _empty(32, 3, tokens, 3, HEADS[d], d, dtype=dtype)
    out, lse = spatial_attention.forward(qkv)
    spatial_attention.backward(torch.empty_like(out), qkv, out, lse)


def expanded(tokens: int, d: int, dtype: torch.dtype) -> None:
    """The gradient of a sum."""
    qkv = _empty(32, 3, tokens, 3, HEADS[d], d, dtype=dtype)
    out, lse = spatial_attention.forward(qkv)
    spatial_attention.backward(_empty(1, dtype=dtype).expand(out.shape), qkv, out, lse)


def sliced(tokens: int, d: int, dtype: torch.dtype) -> None:
    """The strides are no multiples of 16, but for the last, which is 1."""
    qkv = _empty(2, 3, tokens, 3, 12, d + 3, dtype=dtype)[..., :d]
    out, lse = spatial_attention.forward(qkv)
    spatial_attention.backward(_empty(2, 3, tokens, 12, d + 3, dtype=dtype)[..., :d], qkv, out, lse)


def options(tokens: int, d: int, dtype: torch.dtype) -> None:
    """Forward and backward with every option: q, k and v separate, each of strides of its own."""
    wide = (_empty(32, 3, tokens, HEADS[d] + i, d, dtype=dtype) for i in range(3))
    q, k, v = (x[:, :, :, : HEADS[d]] for x in wide)
    lengths = _empty(32, 3, dtype=torch.int64)
    out, lse = spatial_attention.forward(q, k, v, lengths, -0.1)
    spatial_attention.backward(q, q, out, lse, k, v, lengths, -0.1, lse)


def separate(tokens: int, d: int, dtype: torch.dtype) -> None:
    """Forward of q, k and v of strides of their own, without another option."""
    q, *others = (_empty(32, 3, tokens, HEADS[d] + i, d, dtype=dtype) for i in range(3))
    spatial_attention.forward(q, *(x[:, :, :, : HEADS[d]] for x in others))


def padded(tokens: int, d: int, dtype: torch.dtype) -> None:
    """Forward and backward of frames of different length."""
    qkv = _empty(32, 3, tokens, 3, HEADS[d], d, dtype=dtype)
    lengths = _empty(32, 3, dtype=torch.int64)
    out, lse = spatial_attention.forward(qkv, lengths=lengths)
    spatial_attention.backward(out, qkv, out, lse, lengths=lengths)


CASES: dict[str, Callable[[], Any]] = {
    f"S {tokens} d {d} {str(dtype).removeprefix('torch.')}": partial(both, tokens, d, dtype)
    for tokens, d, dtype in (
        (207, 64, torch.bfloat16),
        (207, 64, torch.float16),
        (207, 64, torch.float32),
        (207, 80, torch.bfloat16),
        (207, 128, torch.bfloat16),
        (4096, 64, torch.bfloat16),
        (4096, 80, torch.float16),
        (4096, 96, torch.bfloat16),
        (4096, 128, torch.float32),
        (49, 32, torch.bfloat16),
        (128, 64, torch.bfloat16),
        (128, 128, torch.float16),
    )
}
CASES["expanded S 207 d 64 bfloat16"] = partial(expanded, 207, 64, torch.bfloat16)
CASES["sliced S 207 d 64 bfloat16"] = partial(sliced, 207, 64, torch.bfloat16)
CASES["lengths S 207 d 64 bfloat16"] = partial(padded, 207, 64, torch.bfloat16)
CASES["lengths S 207 d 80 bfloat16"] = partial(padded, 207, 80, torch.bfloat16)
CASES["options S 207 d 64 bfloat16"] = partial(options, 207, 64, torch.bfloat16)
CASES["options S 207 d 80 float16"] = partial(options, 207, 80, torch.float16)
CASES["separate S 207 d 64 bfloat16"] = partial(separate, 207, 64, torch.bfloat16)
CASES["sliced S 207 d 64 float32"] = partial(sliced, 207, 64, torch.float32)
