"""What the compile check compiles of ``warp_clips``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cmpose.kernels import warp_clips
from cmpose.ops.warp_clips import IMAGENET_MEAN, IMAGENET_STD

BATCH, FRAMES = 32, 3


def run(
    dtype: torch.dtype,
    matrices: torch.dtype = torch.float64,
    size: tuple[int, int] = (256, 192),
    frames: Tensor | None = None,
) -> Any:
    if frames is None:
        frames = torch.empty(BATCH, FRAMES, 480, 368, 3, dtype=torch.uint8, device="meta")
    return warp_clips.forward(
        frames,
        torch.empty(len(frames), 2, 3, dtype=matrices, device="meta"),
        size,
        IMAGENET_MEAN,
        IMAGENET_STD,
        dtype,
    )


def _frames(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.uint8, device="meta")


CASES: dict[str, Callable[[], Any]] = {}
for _dtype in (torch.float32, torch.float16, torch.bfloat16):
    _name = str(_dtype).removeprefix("torch.")
    for _matrices in (torch.float64, torch.float32):
        _kind = str(_matrices).removeprefix("torch.")
        CASES[f"{_name} by {_kind}"] = partial(run, _dtype, _matrices)
_last = torch.bfloat16
CASES["low precision matrices"] = partial(run, _last, _last)
CASES["odd size"] = partial(run, _last, size=(137, 91), frames=_frames(5, 3, 333, 211, 3))
CASES["one clip, one frame"] = partial(run, _last, frames=_frames(1, 1, 1080, 1920, 3))
CASES["people of one clip"] = partial(
    run, _last, frames=_frames(1, FRAMES, 1080, 1920, 3).expand(20, -1, -1, -1, -1)
)
CASES["channels first"] = partial(
    run, _last, frames=_frames(BATCH, FRAMES, 3, 480, 368).permute(0, 1, 3, 4, 2)
)
CASES["beyond 2^31 bytes a clip"] = partial(run, _last, frames=_frames(4, 128, 2160, 3840, 3))
