"""warp_clips: crops of 256 × 192 out of 720p frames, normalised."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.harness.peers import eager_and_compiled
from bench.harness.shapes import BATCHES, FORWARD, FRAMES, Shape, grid
from bench.harness.workload import Arguments, Draw, OpBench
from cmpose import ops


def plain(frames: Tensor, matrices: Tensor, size: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """As one would write it: frames to floats, then grid_sample.

    The matrices are taken as affine_grid's, which spares inverting and rescaling them.
    """
    B, T = frames.shape[:2]
    grid = torch.nn.functional.affine_grid(
        matrices.to(torch.float32).repeat_interleave(T, 0), [B * T, 3, *size], align_corners=False
    )
    images = frames.flatten(0, 1).permute(0, 3, 1, 2).float() / 255
    crops = torch.nn.functional.grid_sample(images, grid, align_corners=False)
    mean, std = (torch.full((3, 1, 1), value, device=frames.device) for value in (0.45, 0.225))
    return ((crops - mean) / std).to(dtype).unflatten(0, (B, T))


def _make(shape: Shape, draw: Draw) -> Arguments:
    B, T, h, w = (shape[n] for n in "BThw")
    # Crops at scale 1, slightly turned, somewhere in the frame.
    matrices = torch.eye(2, 3, dtype=torch.float64, device=draw.device).repeat(B, 1, 1)
    turn = 0.1 * (draw.uniform(B).double() - 0.5)
    matrices[:, 0, 1], matrices[:, 1, 0] = turn, -turn
    room = [max(w - shape["crop_w"], 0), max(h - shape["crop_h"], 0)]
    matrices[:, :, 2] = -draw.uniform(B, 2).double() * torch.tensor(room, device=draw.device)
    return {
        "frames": draw.integers(256, B, T, h, w, 3, dtype=torch.uint8),
        "matrices": matrices,
        "size": (shape["crop_h"], shape["crop_w"]),
        "dtype": draw.dtype,
    }


def _bytes(shape: Shape, element: int, direction: str) -> int:
    """At scale 1 a source pixel is read for each of the crop's, and each is written."""
    values = shape["B"] * shape["T"] * 3 * shape["crop_h"] * shape["crop_w"]
    return values + values * element


_REFERENCE = {"B": 32, "T": 3, "h": 720, "w": 1280, "crop_h": 256, "crop_w": 192}

BENCH = OpBench(
    op="warp_clips",
    directions=(FORWARD,),
    shapes=grid(_REFERENCE, BATCHES, FRAMES, [{}, {"h": 384, "w": 288}]),
    small={"B": 2, "T": 2, "h": 64, "w": 48, "crop_h": 32, "crop_w": 24},
    cpu=[{"B": 2, "T": 3, "h": 720, "w": 1280, "crop_h": 256, "crop_w": 192}],
    make=_make,
    call=ops.warp_clips,
    bytes=_bytes,
    peers=eager_and_compiled(plain, checked=False),  # its matrices mean something else
)
