"""What the compile check compiles of ``temporal_attention``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cmpose.kernels import temporal_attention
from cmpose.kernels.temporal_attention import ROW_FRAMES

BATCH, TOKENS = 32, 207
HEADS = {16: 12, 32: 12, 64: 12, 80: 16, 112: 8, 128: 8}
"""Heads by head dimension: 12 of 64 are ViTPose-B's, 16 of 80 are ViTPose-H's."""


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def forward(frames: int, width: int, dtype: torch.dtype) -> Any:
    qkv = _empty(BATCH, frames, TOKENS, 3, HEADS[width], width, dtype=dtype)
    return temporal_attention.forward(qkv)


def backward(frames: int, width: int, dtype: torch.dtype) -> Any:
    qkv = _empty(BATCH, frames, TOKENS, 3, HEADS[width], width, dtype=dtype)
    grad = _empty(BATCH, frames, TOKENS, HEADS[width], width, dtype=dtype)
    return temporal_attention.backward(grad, qkv)


def expanded(qkv: Tensor) -> None:
    """Forward and backward, with a gradient that is one number expanded."""
    temporal_attention.forward(qkv)
    grad = _empty(1, dtype=qkv.dtype).expand(qkv[:, :, :, 0].shape)
    temporal_attention.backward(grad, qkv)


def sliced(frames: int, dtype: torch.dtype) -> None:
    """The strides are no multiples of 16, but for the last, which is 1."""
    expanded(_empty(2, frames, 5, 3, 12, 67, dtype=dtype)[..., :64])


def turned(frames: int, dtype: torch.dtype, innermost: int) -> None:
    """Another dimension than d has stride 1, of which Triton makes a constant."""
    sizes = [2, frames, 5, 3, 12, 64]
    sizes[innermost], sizes[-1] = sizes[-1], sizes[innermost]
    expanded(_empty(*sizes, dtype=dtype).transpose(innermost, -1))


def options(frames: int, width: int, dtype: torch.dtype) -> None:
    """Forward and backward with every option: q, k and v separate, each of strides of its own."""
    wide = (_empty(BATCH, frames, TOKENS, 8 + i, width, dtype=dtype) for i in range(3))
    q, k, v = (x[..., :8, :] for x in wide)
    lengths = _empty(BATCH, dtype=torch.int64)
    temporal_attention.forward(q, k, v, lengths, 0.1, True)
    temporal_attention.backward(q, q, k, v, lengths, 0.1, True)


def padded(frames: int, width: int, dtype: torch.dtype) -> None:
    """Forward and backward of clips of different length, which attend both ways."""
    qkv = _empty(BATCH, frames, TOKENS, 3, HEADS[width], width, dtype=dtype)
    lengths = _empty(BATCH, dtype=torch.int64)
    temporal_attention.forward(qkv, lengths=lengths)
    temporal_attention.backward(qkv[:, :, :, 0], qkv, lengths=lengths)


def one_item(frames: int, dtype: torch.dtype) -> None:
    """Sizes of 1, of which Triton makes constants."""
    qkv = _empty(1, frames, 1, 3, 1, 64, dtype=dtype)
    temporal_attention.forward(qkv)
    temporal_attention.backward(_empty(1, frames, 1, 1, 64, dtype=dtype), qkv)


FRAMES = {
    16: (ROW_FRAMES,),
    32: (ROW_FRAMES, 16, 32),
    64: (ROW_FRAMES, 16),
    80: (ROW_FRAMES, 16),
    112: (32,),
    128: (ROW_FRAMES, 16, 32),
}
"""By head dimension; the others' kernels are much like these."""

CASES: dict[str, Callable[[], Any]] = {}
for _width, _each in FRAMES.items():
    for _dtype in (torch.float32, torch.float16, torch.bfloat16):
        for _frames in _each:
            _name = f"T {_frames} d {_width} {str(_dtype).removeprefix('torch.')}"
            # float16 differs from bfloat16 in conversions only.
            if _dtype != torch.float16 or _width == 64:
                CASES[f"forward {_name}"] = partial(forward, _frames, _width, _dtype)
            if _dtype != torch.float16 or _width == 64 or _frames == ROW_FRAMES:
                CASES[f"backward {_name}"] = partial(backward, _frames, _width, _dtype)
for _width in (64, 80):
    CASES[f"forward T 3 d {_width} bfloat16"] = partial(forward, 3, _width, torch.bfloat16)
    CASES[f"backward T 3 d {_width} bfloat16"] = partial(backward, 3, _width, torch.bfloat16)
CASES["sliced T 3"] = partial(sliced, 3, torch.bfloat16)
CASES["sliced T 6"] = partial(sliced, 6, torch.float16)
CASES["turned, frames innermost, T 3"] = partial(turned, 3, torch.bfloat16, 1)
CASES["turned, channels innermost, T 3"] = partial(turned, 3, torch.float16, 3)
CASES["turned, channels innermost, T 6"] = partial(turned, 6, torch.bfloat16, 3)
CASES["lengths T 3"] = partial(padded, 3, 64, torch.bfloat16)
CASES["lengths T 5"] = partial(padded, ROW_FRAMES, 128, torch.bfloat16)
CASES["options T 3"] = partial(options, 3, 64, torch.bfloat16)
CASES["options T 32"] = partial(options, 32, 112, torch.float32)
CASES["one item T 3"] = partial(one_item, 3, torch.float32)
CASES["one item T 6"] = partial(one_item, 6, torch.bfloat16)
