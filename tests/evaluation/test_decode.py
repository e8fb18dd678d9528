"""Decoding against rendered Gaussians, hand-worked pixels, and flips there and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cmpose.data.skeleton import FLIP_PERMUTATION
from cmpose.evaluation.decode import decode_heatmaps, flip_heatmaps, to_crop, to_image


def gaussians(centers, size=(64, 48), sigma=2.0):
    """[B, K, 2] heatmap px → [B, K, h, w], cut to the square of 3 sigma as the targets are."""
    y = torch.arange(size[0], dtype=torch.float64).view(1, 1, -1, 1)
    x = torch.arange(size[1], dtype=torch.float64).view(1, 1, 1, -1)
    dx, dy = x - centers[..., 0, None, None], y - centers[..., 1, None, None]
    maps = torch.exp(-(dx**2 + dy**2) / (2 * sigma**2))
    return torch.where((dx.abs() <= 3 * sigma) & (dy.abs() <= 3 * sigma), maps, 0.0)


def random_centers(seed, margin=8.0):
    low = torch.tensor([margin, margin], dtype=torch.float64)
    high = torch.tensor([47 - margin, 63 - margin], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(20, 15, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("sigma", [2.0, 3.0])
def test_dark_finds_the_centre(sigma):
    centers = random_centers(0, margin=4 * sigma)
    xy, scores = decode_heatmaps(gaussians(centers, sigma=sigma), "dark", sigma=sigma)
    assert (xy - centers).abs().max() < 0.05
    assert scores.min() > 0.9
    xy32, _ = decode_heatmaps(gaussians(centers, sigma=sigma).float(), "dark", sigma=sigma)
    assert (xy32 - centers).abs().max() < 0.05


def test_dark_withstands_noise_better_than_quarter():
    centers = random_centers(1)
    noise = torch.randn(20, 15, 64, 48, generator=torch.Generator().manual_seed(2))
    noisy = gaussians(centers) * 0.6 + 0.02 * noise
    errors = {
        method: (decode_heatmaps(noisy, method)[0] - centers).norm(dim=-1).mean()
        for method in ("quarter", "dark")
    }
    assert errors["dark"] < 0.15 < errors["quarter"] < 0.35


def test_quarter_is_within_its_resolution():
    centers = random_centers(3)
    xy, _ = decode_heatmaps(gaussians(centers), "quarter")
    assert (xy - centers).abs().max() <= 0.25 + 1e-9


def test_quarter_by_hand():
    maps = torch.zeros(1, 6, 8, 8)
    maps[0, 0, 3, 4], maps[0, 0, 3, 5], maps[0, 0, 2, 4] = 1.0, 0.5, 0.4  # right and up
    maps[0, 1, 3, 4] = 1.0  # both sides equal: no offset
    maps[0, 2, 1, 4], maps[0, 2, 1, 5] = 1.0, 0.5  # row 1 is too near the border
    maps[0, 3, 6, 6], maps[0, 3, 6, 7] = 1.0, 0.5  # row and column 6 of 8 are not
    maps[0, 4] = -torch.rand(8, 8) - 0.1  # no positive value
    maps[0, 5, 0, 7] = 2.0
    xy, scores = decode_heatmaps(maps)
    expected = [[4.25, 2.75], [4, 3], [4, 1], [6.25, 6], [0, 0], [7, 0]]
    torch.testing.assert_close(xy[0], torch.tensor(expected))
    torch.testing.assert_close(scores[0], maps[0].amax(dim=(1, 2)))


@pytest.mark.parametrize("corner", [(0.0, 0.0), (47.0, 63.0), (1.0, 30.0), (46.0, 62.0)])
def test_dark_near_the_border_stays_on_the_pixel(corner):
    centers = torch.tensor(corner, dtype=torch.float64).view(1, 1, 2)
    xy, _ = decode_heatmaps(gaussians(centers), "dark")
    torch.testing.assert_close(xy, centers)


def test_dark_on_hostile_maps_stays_within_a_pixel():
    maps = torch.randn(8, 15, 16, 12, generator=torch.Generator().manual_seed(4))
    flat = torch.full((8, 15, 16, 12), 0.5)
    for heatmaps in (maps, flat, flat.bfloat16()):
        xy, _ = decode_heatmaps(heatmaps, "dark")
        peak = heatmaps.flatten(2).argmax(dim=2)
        at = torch.stack([peak % 12, peak // 12], dim=-1)
        assert xy.isfinite().all()
        assert (xy - at).abs().max() <= 1.0
    assert decode_heatmaps(maps.half())[0].dtype == torch.float32


def test_to_image_undoes_the_crop():
    rng = np.random.default_rng(0)
    turn = torch.from_numpy(rng.uniform(-1, 1, (6, 2, 2)) + 2 * np.eye(2))
    matrices = torch.cat([turn, torch.from_numpy(rng.uniform(-9, 9, (6, 2, 1)))], dim=2)
    points = torch.from_numpy(rng.uniform(-50, 400, (6, 15, 2)))
    crop = points @ turn.mT + matrices[:, None, :, 2]
    sizes = {"heatmap_size": (64, 48), "image_size": (256, 192)}
    torch.testing.assert_close(to_image(crop / 4, matrices, **sizes), points)
    udp = crop * torch.tensor([47 / 191, 63 / 255], dtype=torch.float64)
    torch.testing.assert_close(to_image(udp, matrices, **sizes, udp=True), points)
    torch.testing.assert_close(to_crop(torch.tensor([47.0, 63.0]), (64, 48), (256, 192), udp=True),
                               torch.tensor([191.0, 255.0]))  # fmt: skip


@pytest.mark.parametrize("udp", [False, True])
def test_flip_there_and_back(udp):
    """The heatmaps of a mirrored crop land on those of the crop, joints included."""
    crop = random_centers(6) * 4
    mirrored = crop[:, list(FLIP_PERMUTATION)] * torch.tensor([-1, 1]) + torch.tensor([191, 0])
    scale = torch.tensor([47 / 191, 63 / 255] if udp else [0.25, 0.25], dtype=torch.float64)
    heatmaps, flipped = gaussians(crop * scale), gaussians(mirrored * scale)
    restored = flip_heatmaps(flipped, udp=udp)
    exact, _ = decode_heatmaps(heatmaps, "dark")
    back, _ = decode_heatmaps(restored, "dark")
    # UDP is exact; without it a quarter pixel remains of the three quarters that are moved.
    assert (exact - back).abs().max() < (0.1 if udp else 0.35)
    assert (back - exact).mean(dim=(0, 1))[0] == pytest.approx(0.0 if udp else 0.25, abs=0.02)


def test_errors():
    maps = torch.zeros(1, 15, 8, 8)
    with pytest.raises(ValueError, match=r"heatmaps must be \[B, K, h, w\], got shape \(15, 8"):
        decode_heatmaps(maps[0])
    with pytest.raises(ValueError, match=r"got shape \(1, 15, 0, 8\)"):
        decode_heatmaps(maps[:, :, :0])
    with pytest.raises(ValueError, match="method must be 'quarter' or 'dark', got 'argmax'"):
        decode_heatmaps(maps, "argmax")
    with pytest.raises(ValueError, match="sigma must be positive, got 0"):
        decode_heatmaps(maps, "dark", sigma=0)
    with pytest.raises(ValueError, match=r"heatmaps must be \[B, 15"):
        flip_heatmaps(maps[:, :14])
    sizes = {"heatmap_size": (8, 8), "image_size": (32, 32)}
    with pytest.raises(ValueError, match=r"matrices\[0\] cannot be inverted"):
        to_image(torch.zeros(1, 15, 2), torch.zeros(1, 2, 3), **sizes)
    with pytest.raises(ValueError, match=r"matrices \[B, 2, 3\]"):
        to_image(torch.zeros(2, 15, 2), torch.zeros(1, 2, 3), **sizes)
    with pytest.raises(ValueError, match="too small for udp=True"):
        to_crop(torch.zeros(2), (1, 8), (4, 32), udp=True)
    assert decode_heatmaps(maps[:0])[0].shape == (0, 15, 2)
