"""What the compile check compiles of ``reconstruction_loss``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cmpose.kernels import reconstruction_loss

BATCH, FRAMES, WIDTH, KEYPOINTS = 32, 3, 192, 15
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def forward(
    dim: int,
    pred_dtype: torch.dtype,
    target_dtype: torch.dtype,
    want_pred: bool = True,
    want_target: bool = False,
    normalizer: torch.dtype | None = None,
    batch: int = BATCH,
    per_channel: bool = True,
) -> Any:
    """As the model calls it: the reconstructed tokens are a view without the keypoints."""
    pred = _empty(3, batch, FRAMES, WIDTH + KEYPOINTS, dim, dtype=pred_dtype)[1, :, :, :WIDTH]
    return reconstruction_loss.forward(
        pred,
        _empty(batch, FRAMES, WIDTH, dim, dtype=target_dtype),
        _empty(batch, FRAMES, WIDTH, dtype=torch.bool),
        None if normalizer is None else _empty(1, dtype=normalizer),
        per_channel,
        want_pred,
        want_target,
    )


def scale(dim: int, dtype: torch.dtype) -> None:
    reconstruction_loss.scale_(
        _empty(BATCH, FRAMES, WIDTH, dim, dtype=dtype),
        _empty(BATCH, FRAMES, WIDTH, dtype=torch.bool),
        _empty(1, dtype=torch.float32),
    )


CASES: dict[str, Callable[[], Any]] = {}
for _dtype in DTYPES:
    _name = str(_dtype).removeprefix("torch.")
    for _dim in (192, 384, 768, 80):
        CASES[f"forward {_dim} {_name}"] = partial(forward, _dim, _dtype, _dtype)
    for _dim in (192, 384, 768):
        CASES[f"scale {_dim} {_name}"] = partial(scale, _dim, _dtype)
    CASES[f"forward both gradients {_name}"] = partial(
        forward, 768, _dtype, _dtype, want_target=True
    )
CASES["forward loss only"] = partial(forward, 768, torch.bfloat16, torch.bfloat16, want_pred=False)
CASES["forward mixed"] = partial(
    forward, 768, torch.bfloat16, torch.float32, want_target=True, normalizer=torch.float32
)
CASES["forward many tokens"] = partial(forward, 768, torch.bfloat16, torch.bfloat16, batch=2048)
CASES["forward summed over channels"] = partial(
    forward, 768, torch.bfloat16, torch.bfloat16, per_channel=False
)
