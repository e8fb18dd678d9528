"""Photometric augmentation: other light, colours, sharpness and textures, the same joints."""

from __future__ import annotations

import cv2
import numpy as np


def change_look(clip: np.ndarray, chance: float, rng: np.random.Generator) -> np.ndarray:
    """Draws six changes, each with probability ``chance``, the same for all frames but for noise.

    In their order: uneven light; contrast, brightness, gamma and white balance; saturation;
    texture, by a random convolution that keeps shapes (RandConv: Xu et al., "Robust and
    Generalizable Visual Representation Learning via Random Convolutions", ICLR 2021); blur; noise.

    Args:
        clip: uint8 [T, H, W, 3] RGB; not changed.
        chance: 0 to 1.
        rng: the item's own generator.

    Returns:
        uint8 [T, H, W, 3].
    """
    frames, height, width = clip.shape[:3]
    picture: np.ndarray = clip.reshape(frames * height, width, 3).astype(np.float32)
    light, tone, colour, texture, blur, noise = rng.random(6) < chance
    if light:
        coarse = rng.standard_normal((4, 4)).astype(np.float32)
        field = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        picture *= np.tile(np.exp(0.35 * field), (frames, 1))[..., None]
    if tone:
        gain = np.exp(rng.uniform(-0.5, 0.5) + rng.uniform(-0.15, 0.15, 3))
        picture = (picture - 128) * gain.astype(np.float32) + 128 + float(rng.uniform(-40, 40))
        gamma = float(np.exp(rng.uniform(-0.5, 0.5)))
        picture = 255 * (np.clip(picture, 0, 255) / 255) ** gamma
    if colour:
        grey = picture.mean(axis=-1, keepdims=True)
        picture = grey + (picture - grey) * float(rng.uniform(0, 1.5))
    if texture:
        picture = _random_texture(picture, rng)
    if blur:
        sigma = height * float(rng.uniform(0.004, 0.016))
        picture = np.concatenate(
            [cv2.GaussianBlur(part, (0, 0), sigma) for part in np.split(picture, frames)]
        )
    if noise:
        grain = rng.standard_normal(picture.shape, np.float32)
        picture += grain * float(rng.uniform(2, 15))
    return np.clip(np.rint(picture), 0, 255).astype(np.uint8).reshape(clip.shape)


def _random_texture(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture mixed with its convolution by random weights, at its own mean and contrast."""
    size = int(rng.choice([1, 3, 5]))
    weights = rng.standard_normal((3, 3, size, size), np.float32)
    mean, spread = picture.mean(), picture.std()
    centred = picture - mean
    mixed = np.stack(
        [sum(cv2.filter2D(centred[..., i], -1, weights[o, i]) for i in range(3)) for o in range(3)],
        axis=-1,
    )
    mixed *= spread / max(float(mixed.std()), 1e-3)
    share = float(rng.uniform(0, 0.7))
    return picture + share * (mixed - centred)
