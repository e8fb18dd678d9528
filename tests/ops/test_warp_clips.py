"""Against cv2.warpAffine, which the op reproduces but for the rounding to whole grey levels."""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from cmpose import ops
from cmpose.ops.warp_clips import IMAGENET_MEAN, IMAGENET_STD

PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def noise_frames(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (*shape, 3), generator=generator, dtype=torch.uint8)


def grey_levels(crops: Tensor) -> np.ndarray:
    """[B, T, 3, H, W] in 0 to 1 → [B, T, H, W, 3] in 0 to 255."""
    return (crops * 255).permute(0, 1, 3, 4, 2).numpy()


def rotation(angle: float, scale: float, x: float, y: float) -> Tensor:
    matrix = cv2.getRotationMatrix2D((60.0, 45.0), angle, scale)
    matrix[:, 2] -= (x, y)
    return torch.from_numpy(matrix)


MATRICES = torch.stack(
    [
        rotation(0, 1, 0, 0),
        rotation(0, 1, 12.5, -7.25),
        rotation(33.3, 0.71, 20.2, 11.7),
        rotation(-120, 2.3, 90.4, 45.9),
        rotation(5, 0.2, 40, 30),
        rotation(45, 1, -500, 0),
        rotation(10, 1.1, 5, 5) * torch.tensor([[-1.0], [1.0]], dtype=torch.float64),  # mirrored
    ]
)


@pytest.mark.parametrize("size", [(64, 48), (33, 71), (1, 1)])
def test_white_noise_within_half_a_grey_level_of_cv2(size: tuple[int, int]) -> None:
    """On white noise every pixel differs from the next: any other weights would show."""
    frames = noise_frames(len(MATRICES), 2, 90, 120)
    actual = grey_levels(ops.warp_clips(frames, MATRICES, size, **PLAIN))
    for b, matrix in enumerate(MATRICES.numpy()):
        for t in range(2):
            expected = cv2.warpAffine(
                frames[b, t].numpy(), matrix, size[::-1], flags=cv2.INTER_LINEAR
            )
            assert np.abs(actual[b, t] - expected.astype(np.float32)).max() <= 0.5 + 1e-3


def test_identity_is_the_frame_normalised() -> None:
    frames = noise_frames(2, 3, 9, 7)
    identity = torch.eye(2, 3).expand(2, 2, 3)
    actual = ops.warp_clips(frames, identity, (9, 7), dtype=torch.float64)
    mean, std = (torch.tensor(v, dtype=torch.float64) for v in (IMAGENET_MEAN, IMAGENET_STD))
    expected = (frames.double() / 255 - mean) / std
    torch.testing.assert_close(actual, expected.permute(0, 1, 4, 2, 3), rtol=0, atol=1e-12)


def test_by_hand() -> None:
    """Half a pixel to the right: the mean of two pixels, and half of the first at the border."""
    frames = torch.tensor([10, 20, 40], dtype=torch.uint8)[:, None].expand(1, 1, 1, 3, 3)
    matrix = torch.tensor([[[1.0, 0.0, 0.5], [0.0, 1.0, 0.0]]])
    levels = grey_levels(ops.warp_clips(frames, matrix, (1, 5), **PLAIN))
    np.testing.assert_allclose(levels[0, 0, 0, :, 0], [5, 15, 30, 20, 0], atol=1e-4)


def test_border_is_zero_before_normalisation() -> None:
    frames = torch.full((1, 1, 4, 4, 3), 255, dtype=torch.uint8)
    away = torch.tensor([[[1.0, 0.0, 100.0], [0.0, 1.0, 0.0]]])
    actual = ops.warp_clips(frames, away, (3, 3))
    expected = -torch.tensor(IMAGENET_MEAN) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(actual[0, 0, :, 0, 0], expected)
    assert (actual == actual[:, :, :, :1, :1]).all()


def test_frames_expanded_over_people_are_not_copied() -> None:
    """400 people in one clip of 1080p frames would take 7 GB."""
    frames = noise_frames(1, 3, 1080, 1920).expand(400, -1, -1, -1, -1)
    matrices = MATRICES[2:3].expand(400, -1, -1)
    clips = ops.warp_clips(frames, matrices, (4, 3))
    assert torch.equal(clips, clips[:1].expand_as(clips))
    assert torch.equal(clips[:1], ops.warp_clips(frames[:1], matrices[:1], (4, 3)))


def test_channels_first_storage() -> None:
    frames = noise_frames(1, 2, 20, 16)
    stored = frames.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    a, b = (ops.warp_clips(f, MATRICES[2:3], (8, 6)) for f in (frames, stored))
    assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_cpu_path_has_the_reference_s_bits(dtype: torch.dtype) -> None:
    """Of frames as they are decoded, channels first, cut out of larger ones, and expanded."""
    clips, wide = noise_frames(len(MATRICES), 2, 20, 16), noise_frames(len(MATRICES), 2, 23, 21)
    layouts = (
        clips,
        clips.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2),
        wide[:, :, 2:22, 3:19],
        wide[:1, :, ::2].expand(len(MATRICES), -1, -1, -1, -1),
    )
    for frames in layouts:
        a, b = (
            ops.warp_clips(frames, MATRICES, (31, 17), dtype=dtype, backend=backend)
            for backend in ("reference", "cpu")
        )
        assert torch.equal(a, b)


def test_the_cpu_path_takes_a_large_crop_in_parts() -> None:
    frames, sizes = noise_frames(1, 1, 20, 16), ((2, 40_000), (131, 257))
    for size in sizes:
        a, b = (
            ops.warp_clips(frames, MATRICES[2:3], size, backend=backend)
            for backend in ("reference", "cpu")
        )
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_output_dtype(dtype: torch.dtype) -> None:
    frames = noise_frames(1, 2, 20, 16)
    actual = ops.warp_clips(frames, MATRICES[2:3], (8, 6), dtype=dtype)
    assert actual.dtype == dtype
    assert actual.is_contiguous()
    expected = ops.warp_clips(frames, MATRICES[2:3], (8, 6))
    torch.testing.assert_close(actual, expected.to(dtype))


def test_far_away_and_enormous_matrices() -> None:
    frames = noise_frames(2, 1, 8, 8)
    matrices = torch.tensor(
        [[[1e-12, 0, 0], [0, 1e-12, 0]], [[1, 0, 1e300], [0, 1, -1e300]]], dtype=torch.float64
    )
    levels = grey_levels(ops.warp_clips(frames, matrices, (4, 4), **PLAIN))
    assert np.isfinite(levels).all()
    assert (levels[1] == 0).all()


GOOD: dict[str, Any] = {
    "frames": torch.zeros(1, 1, 4, 4, 3, dtype=torch.uint8),
    "matrices": torch.eye(2, 3)[None],
    "size": (2, 2),
}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"size": (0, 2)}, ValueError, r"^size must be between 1 and 2147483647, got 0"),
        ({"size": (1, 2, 3)}, ValueError, r"^size must hold 2 numbers, got \(1, 2, 3\)"),
        ({"size": 3}, TypeError, r"^size must be a tuple of 2 numbers, got 3"),
        ({"mean": (0.5,)}, ValueError, r"^mean must hold 3 numbers, got \(0.5,\)"),
        ({"mean": (0.5, "x", 0.5)}, TypeError, r"^mean must be a number, got 'x'"),
        ({"std": (1.0, 0.0, 1.0)}, ValueError, r"^std must be between 1e-30 and 1e\+30, got 0.0"),
        ({"dtype": torch.uint8}, TypeError, r"dtype must be a floating-point dtype"),
        ({"matrices": torch.zeros(1, 2, 3)}, ValueError, r"matrices must be invertible"),
        ({"matrices": torch.full((1, 2, 3), math.nan)}, ValueError, r"matrices must be finite"),
        ({"matrices": torch.eye(3)[None]}, ValueError, r"matrices must have shape \[B, 2, 3\]"),
        (
            {"frames": torch.zeros(1, 1, 0, 4, 3, dtype=torch.uint8)},
            ValueError,
            r"frames must have h ≥ 1 in \[B, T, h, w, 3\], got \[1, 1, 0, 4, 3\]",
        ),
        (
            {"frames": torch.zeros(1, 1, 3, 4, 4, dtype=torch.uint8)},
            ValueError,
            r"frames must have shape \[B, T, h, w, 3\], got \[1, 1, 3, 4, 4\]",
        ),
    ],
)
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.warp_clips(**{**GOOD, **options})
