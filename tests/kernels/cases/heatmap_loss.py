"""What the compile check compiles of ``heatmap_loss``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cmpose.kernels import heatmap_loss

BATCH, JOINTS = 32, 15
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def forward(
    height: int,
    width: int,
    dtype: torch.dtype,
    weights: torch.dtype = torch.float32,
    want_pred: bool = True,
    normalizer: torch.dtype | None = None,
    batch: int = BATCH,
) -> Any:
    return heatmap_loss.forward(
        _empty(batch, JOINTS, height, width, dtype=dtype),
        _empty(batch, JOINTS, 2, dtype=torch.float32),
        _empty(batch, JOINTS, dtype=weights),
        2.0,
        None if normalizer is None else _empty(1, dtype=normalizer),
        want_pred,
    )


def scale(dtype: torch.dtype) -> None:
    heatmap_loss.scale_(
        _empty(BATCH, JOINTS, 64, 48, dtype=dtype),
        _empty(BATCH, JOINTS, dtype=torch.float32),
        _empty(1, dtype=torch.float32),
    )


CASES: dict[str, Callable[[], Any]] = {}
for _dtype in DTYPES:
    _name = str(_dtype).removeprefix("torch.")
    for _size in ((32, 24), (64, 48), (96, 72), (33, 25)):
        CASES[f"forward {_size[0]}x{_size[1]} {_name}"] = partial(forward, *_size, _dtype)
    CASES[f"scale {_name}"] = partial(scale, _dtype)
CASES["forward loss only"] = partial(forward, 64, 48, torch.bfloat16, want_pred=False)
CASES["forward normalizer"] = partial(
    forward, 64, 48, torch.bfloat16, torch.bool, normalizer=torch.float32
)
CASES["forward many joints"] = partial(forward, 64, 48, torch.bfloat16, batch=1024)
CASES["forward one clip"] = partial(forward, 64, 48, torch.bfloat16, batch=1)
