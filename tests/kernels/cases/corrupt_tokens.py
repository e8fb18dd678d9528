"""What the compile check compiles of ``corrupt_tokens``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cmpose.kernels import corrupt_tokens

FRAMES, PATCHES, KEYPOINTS = 3, 192, 15
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def forward(
    batch: int,
    dim: int,
    dtype: torch.dtype,
    keypoint_dtype: torch.dtype | None = None,
    position: torch.dtype | None = torch.float32,
    selection: str = "exact",
    position_after: bool = True,
) -> Any:
    slots = PATCHES + KEYPOINTS
    return corrupt_tokens.forward(
        _empty(batch, FRAMES, PATCHES, dim, dtype=dtype),
        _empty(KEYPOINTS, dim, dtype=keypoint_dtype or dtype),
        None if position is None else _empty(FRAMES, slots, dim, dtype=position),
        _empty(1, dtype=torch.int64),
        0.45,
        0.45,
        1.0,
        selection,
        position_after,
        0,
    )


def backward(
    batch: int,
    dim: int,
    dtype: torch.dtype,
    position: torch.dtype | None = torch.float32,
    position_after: bool = True,
) -> Any:
    return corrupt_tokens.backward(
        _empty(3, batch, FRAMES, PATCHES + KEYPOINTS, dim, dtype=dtype),
        _empty(batch, FRAMES, PATCHES, dtype=torch.bool),
        dtype,
        position,
        position_after,
    )


CASES: dict[str, Callable[[], Any]] = {}
for _dtype in DTYPES:
    _name = str(_dtype).removeprefix("torch.")
    CASES[f"forward {_name}"] = partial(forward, 32, 768, _dtype, position=_dtype)
    CASES[f"forward few rows {_name}"] = partial(forward, 4, 768, _dtype, position=_dtype)
    CASES[f"forward narrow {_name}"] = partial(forward, 32, 80, _dtype, position=_dtype)
    CASES[f"backward {_name}"] = partial(backward, 32, 768, _dtype, position=_dtype)
    CASES[f"backward narrow {_name}"] = partial(backward, 32, 80, _dtype, position=_dtype)
_bf16 = torch.bfloat16
CASES["forward bernoulli"] = partial(forward, 32, 768, _bf16, selection="bernoulli")
CASES["forward without position"] = partial(forward, 32, 768, _bf16, position=None)
CASES["forward position before"] = partial(forward, 32, 768, _bf16, position_after=False)
CASES["forward mixed"] = partial(forward, 32, 768, _bf16, keypoint_dtype=torch.float32)
CASES["forward 192"] = partial(forward, 32, 192, _bf16)
CASES["forward 1280"] = partial(forward, 32, 1280, _bf16)
CASES["backward position before"] = partial(backward, 32, 768, _bf16, position_after=False)
CASES["backward without position"] = partial(backward, 32, 768, _bf16, position=None)
CASES["backward 1280"] = partial(backward, 32, 1280, _bf16)
