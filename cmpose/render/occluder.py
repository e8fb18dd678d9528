"""Things in a rendered scene that stand before people (or behind them, as clutter)."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from cmpose.render.draw import Layer
from cmpose.render.scene import noise, tone


@dataclass
class Occluder:
    """A thing in the foreground.

    Attributes:
        kind: post, foliage, box or bench.
        picture: uint8 [h, w, 3], BGR.
        alpha: float32 [h, w].
        corner: canvas point (x, y) of its top left pixel.
        parallax: how far a camera movement shifts it more than the ground, as a share.
    """

    kind: str
    picture: np.ndarray
    alpha: np.ndarray
    corner: tuple[float, float]
    parallax: float

    def draw(self, layer: Layer, view: np.ndarray, shift: np.ndarray, owner: int) -> None:
        """Puts the thing on the picture.

        Args:
            layer: picture to draw on.
            view: [2, 3] from canvas to picture.
            shift: (x, y) canvas pixels to move it by.
            owner: number that marks its pixels.
        """
        height, width = self.alpha.shape
        matrix = view.copy()
        matrix[:, 2] = view[:, :2] @ (np.asarray(self.corner) + shift) + view[:, 2]
        corners = np.array([[0, 0, 1], [width, 0, 1], [0, height, 1], [width, height, 1]])
        low, high = (f(corners @ matrix.T, axis=0) for f in (np.min, np.max))
        box = layer.box(low[0], low[1], high[0], high[1])
        if box is None:
            return
        matrix[:, 2] -= box[:2]
        target = (box[2] - box[0], box[3] - box[1])
        colour = cv2.warpAffine(self.picture, matrix, target, borderMode=cv2.BORDER_REPLICATE)
        alpha = cv2.warpAffine(self.alpha, matrix, target)
        layer.cover(box, colour, alpha, owner)


def occluder(
    rng: np.random.Generator, x: float, foot: float, metre: float, blur: float
) -> Occluder:
    """A random thing that stands on the ground.

    Args:
        rng: draws.
        x: canvas column of its middle.
        foot: canvas row that it stands on.
        metre: canvas pixels a metre.
        blur: sigma in pixels of the defocus that it is drawn with; 0 is sharp.
    """
    kind = str(rng.choice(["post", "foliage", "box", "bench"]))
    wide, tall = {
        "post": (0.12, 3.2),
        "foliage": (1.1, 0.9),
        "box": (0.8, 0.75),
        "bench": (1.5, 0.85),
    }[kind]
    w = max(int(wide * rng.uniform(0.8, 1.4) * metre), 6)
    h = max(int(tall * rng.uniform(0.8, 1.25) * metre), 8)
    pad = int(3 * blur) + 2
    shape = (h + 2 * pad, w + 2 * pad)
    picture, alpha = np.zeros((*shape, 3), np.float32), np.zeros(shape, np.float32)
    inner = (slice(pad, pad + h), slice(pad, pad + w))
    grain = 1 + 0.06 * noise(rng, (h, w), 12, 2)[..., None]
    if kind == "post":
        colour = tone(rng, (0, 180), (0, 120), (60, 200))
        s = np.linspace(-1, 1, w, dtype=np.float32)
        picture[inner] = (
            colour * grain * (0.45 + 0.6 * np.sqrt(1 - 0.7 * (s - 0.15) ** 2))[None, :, None]
        )
        alpha[inner] = 1
    elif kind == "foliage":
        leaf = tone(rng, (28, 75), (80, 200), (50, 150))
        picture[:] = leaf * 0.7
        for _ in range(int(rng.integers(60, 110))):
            u, v = rng.normal(0.5, 0.19), 1 - abs(rng.normal(0, 0.42))
            centre = (int(pad + u * w), int(pad + v * h))
            axes = (int(w * rng.uniform(0.03, 0.09)) + 1, int(w * rng.uniform(0.015, 0.05)) + 1)
            turn = float(rng.uniform(0, 180))
            cv2.ellipse(alpha, centre, axes, turn, 0, 360, 1.0, -1, cv2.LINE_8)
            shade = (leaf * rng.uniform(0.6, 1.25)).tolist()
            cv2.ellipse(picture, centre, axes, turn, 0, 360, shade, -1, cv2.LINE_8)
    elif kind == "box":
        colour = tone(rng, (5, 25), (40, 170), (70, 190))
        picture[inner] = colour * grain
        alpha[inner] = 1
        for y in range(0, h, max(h // 4, 4)):
            picture[pad + y : pad + y + 2, pad : pad + w] *= 0.6
    else:
        colour = tone(rng, (0, 180), (20, 160), (50, 180))
        picture[:] = colour
        picture[inner] = colour * grain
        bar = max(h // 7, 3)
        for y in (0, int(h * 0.28), int(h * 0.5)):
            alpha[pad + y : pad + y + bar, pad : pad + w] = 1
        for u in (0.04, 0.9):
            alpha[pad : pad + h, pad + int(u * w) : pad + int((u + 0.06) * w) + 2] = 1
    size, sigma = ((0, 0), blur) if blur > 0 else ((3, 3), 0.6)
    soft = cv2.GaussianBlur(alpha, size, sigma).astype(np.float32)
    if blur > 0:
        picture[:] = cv2.GaussianBlur(picture, size, sigma)
    corner = (x - shape[1] / 2, foot - h - pad)
    return Occluder(
        kind,
        np.clip(picture, 0, 255).astype(np.uint8),
        soft,
        corner,
        float(rng.uniform(0.05, 0.3)),
    )
