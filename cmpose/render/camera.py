"""The camera of rendered videos: its way over the scene, its focus and its exposure."""

from __future__ import annotations

import numpy as np


def smooth_curve(rng: np.random.Generator, times: np.ndarray, rate: float) -> np.ndarray:
    """[F] a random curve between about -1 and 1 that changes ``rate`` times a second."""
    curve = np.zeros_like(times)
    for k in (1.0, 1.7):
        curve += np.sin(2 * np.pi * (rate * k * rng.uniform(0.7, 1.3) * times + rng.random())) / k
    return curve / 1.6


def camera(
    rng: np.random.Generator,
    times: np.ndarray,
    size: tuple[int, int],
    subject: np.ndarray,
    motion: float,
) -> np.ndarray:
    """The camera's way: matrices from canvas to picture, float64 [F, 2, 3].

    Args:
        rng: draws.
        times: [F] seconds.
        size: (height, width) of the picture.
        subject: [F, 2] canvas point that the camera follows, at a strength that is drawn.
        motion: 0 holds the camera still; 1 is the usual pan, zoom, roll and shake.
    """
    height, width = size
    follow = rng.choice([0.0, 0.6, 1.0])
    middle = subject.mean(0)
    centre = middle + follow * (subject - middle)
    kernel = np.ones(9) / 9  # a camera lags behind a quick subject
    padded = np.pad(centre, ((4, 4), (0, 0)), mode="edge")
    centre = np.stack([np.convolve(padded[:, i], kernel, "valid") for i in (0, 1)], 1)
    pan = np.stack([smooth_curve(rng, times, 0.15), 0.35 * smooth_curve(rng, times, 0.15)], 1)
    shake = np.stack([smooth_curve(rng, times, 2.5), smooth_curve(rng, times, 2.5)], 1)
    centre = centre + motion * (0.07 * width * pan + rng.choice([0.0, 0.0, 0.004]) * width * shake)
    zoom = np.exp(motion * 0.12 * smooth_curve(rng, times, 0.18)) * rng.uniform(0.95, 1.08)
    roll = np.deg2rad(motion * 2.0 * smooth_curve(rng, times, 0.2))
    matrices = np.zeros((len(times), 2, 3))
    matrices[:, 0, 0] = matrices[:, 1, 1] = zoom * np.cos(roll)
    matrices[:, 1, 0] = zoom * np.sin(roll)
    matrices[:, 0, 1] = -matrices[:, 1, 0]
    matrices[:, :, 2] = (
        np.array([width / 2, height / 2]) - (matrices[:, :, :2] @ centre[..., None])[..., 0]
    )
    return matrices


def defocus_curve(rng: np.random.Generator, frames: int, chance: float, unit: float) -> np.ndarray:
    """[F] blur sigma in pixels: zero, except for a stretch in which it grows and falls again.

    Args:
        rng: draws.
        frames: F.
        chance: probability that there is such a stretch.
        unit: scales sigma to the size of the picture.
    """
    if rng.random() >= chance:
        return np.zeros(frames)
    centre, half = rng.uniform(0, frames), rng.uniform(0.12, 0.4) * frames + 1
    away = np.abs(np.arange(frames) - centre) / half
    return unit * rng.uniform(1.2, 3.2) * np.clip(2 * (1 - away), 0, 1)


def grade_tables(rng: np.random.Generator, times: np.ndarray) -> np.ndarray:
    """[F, 1, 256, 3] exposure, contrast and tint as look-up tables, with a slow drift."""
    level = np.arange(256)[None, :, None] / 255
    gain = rng.uniform(0.8, 1.15) * (1 + 0.05 * smooth_curve(rng, times, 0.3))[:, None, None]
    tint = rng.uniform(0.94, 1.06, 3)
    gamma = rng.uniform(0.85, 1.2)
    table = 255 * (level**gamma) * gain * tint
    return np.clip(table + rng.uniform(-6, 10), 0, 255).astype(np.uint8)[:, None]
