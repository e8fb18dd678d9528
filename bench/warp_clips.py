"""warp_clips: crops of 256 × 192 out of 720p frames, normalised."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.cases import BATCHES, FORWARD, FRAMES, Arguments, OpBench, Peer, Shape, grid, uniform
from bench.peers import eager_and_compiled
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


def _make(shape: Shape, dtype: torch.dtype, device: str, generator: torch.Generator) -> Arguments:
    B, T, h, w = (shape[n] for n in "BThw")
    frames = torch.randint(
        0, 256, (B, T, h, w, 3), dtype=torch.uint8, device=device, generator=generator
    )
    # Crops at scale 1, slightly turned, somewhere in the frame.
    matrices = torch.eye(2, 3, dtype=torch.float64, device=device).repeat(B, 1, 1)
    turn = 0.1 * (uniform(B, device=device, generator=generator).double() - 0.5)
    matrices[:, 0, 1], matrices[:, 1, 0] = turn, -turn
    room = torch.tensor([max(w - shape["crop_w"], 0), max(h - shape["crop_h"], 0)], device=device)
    matrices[:, :, 2] = -uniform(B, 2, device=device, generator=generator).double() * room
    return {
        "frames": frames,
        "matrices": matrices,
        "size": (shape["crop_h"], shape["crop_w"]),
        "dtype": dtype,
    }


def moved(shape: Shape, element: int) -> int:
    """At scale 1 a source pixel is read for each of the crop's, and each is written."""
    values = shape["B"] * shape["T"] * 3 * shape["crop_h"] * shape["crop_w"]
    return values + values * element


def _peers(shape: Shape) -> dict[str, Peer]:
    return eager_and_compiled(plain, checked=False)  # its matrices are others


_REFERENCE = {"B": 32, "T": 3, "h": 720, "w": 1280, "crop_h": 256, "crop_w": 192}

BENCH = OpBench(
    op="warp_clips",
    directions=(FORWARD,),
    shapes=lambda: grid(
        _REFERENCE,
        [[{"B": b} for b in BATCHES], [{"T": t} for t in FRAMES], [{}, {"h": 384, "w": 288}]],
    ),
    small={"B": 2, "T": 2, "h": 64, "w": 48, "crop_h": 32, "crop_w": 24},
    make=_make,
    call=ops.warp_clips,
    bytes=lambda shape, element, direction: moved(shape, element),
    flops=lambda shape, direction: 0,
    peers=_peers,
)
