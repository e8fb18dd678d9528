"""What makes rendered videos more like camera footage: cluttered backgrounds, a small camera."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from cmpose.render.scene import noise, tone


@dataclass(frozen=True)
class Footage:
    """What a small camera and its encoder do to a picture.

    Attributes:
        contrast: factor on the distance from middle grey, which then saturates.
        exposure: added grey levels.
        colour: factor on saturation; 0 is grey.
        shrink: the picture's resolution as a share of its size.
        sharpen: strength of the sharpening; 0 is none.
        quality: of JPEG compression, 1 to 100.
    """

    contrast: float
    exposure: float
    colour: float
    shrink: float
    sharpen: float
    quality: int

    @staticmethod
    def draw(rng: np.random.Generator) -> Footage:
        """A random camera."""
        return Footage(
            contrast=float(np.exp(rng.uniform(-0.35, 0.65))),
            exposure=float(rng.uniform(-35, 55)),
            colour=float(rng.uniform(0.15, 1.15)),
            shrink=float(rng.choice([1.0, rng.uniform(0.35, 0.9)])),
            sharpen=float(rng.choice([0.0, rng.uniform(0.3, 1.2)])),
            quality=int(rng.integers(12, 85)),
        )

    def develop(self, picture: np.ndarray) -> np.ndarray:
        """The picture, uint8 [H, W, 3] BGR, as this camera gives it."""
        height, width = picture.shape[:2]
        level = np.arange(256, dtype=np.float32)
        table = np.clip(128 + (level - 128) * self.contrast + self.exposure, 0, 255)
        picture = cv2.LUT(picture, table.astype(np.uint8))
        grey = cv2.cvtColor(cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY), cv2.COLOR_GRAY2BGR)
        picture = cv2.addWeighted(picture, self.colour, grey, 1 - self.colour, 0)
        if self.shrink < 1:
            small = (max(int(width * self.shrink), 8), max(int(height * self.shrink), 8))
            picture = cv2.resize(picture, small, interpolation=cv2.INTER_AREA)
        if self.sharpen:
            soft = cv2.GaussianBlur(picture, (0, 0), 1.2)
            picture = cv2.addWeighted(picture, 1 + self.sharpen, soft, -self.sharpen, 0)
        _, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, self.quality])
        decoded = cv2.imdecode(data, cv2.IMREAD_COLOR)
        assert decoded is not None
        return cv2.resize(decoded, (width, height), interpolation=cv2.INTER_LINEAR)


def clutter(rng: np.random.Generator, scene: np.ndarray, horizon: int) -> np.ndarray:
    """A scene behind overlapping shapes of all sizes, "dead leaves".

    Lee, Mumford and Huang, "Occlusion models for natural images" (IJCV 2001), show that these have
    the statistics of photographs: many small shapes, few large ones, each before others.

    Args:
        rng: draws.
        scene: uint8 [H, W, 3] BGR.
        horizon: row; half of the scenes keep the ground below it free.
    """
    height, width = scene.shape[:2]
    # The scene's own horizon, which keeps to the picture.
    horizon = int(np.clip(horizon, height // 8, height - height // 8))
    low = height if rng.random() < 0.5 else int(horizon + rng.uniform(0, 0.12) * height)
    picture = scene.copy()
    palette = [tone(rng, (0, 180), (0, int(rng.integers(40, 200))), (10, 245)) for _ in range(8)]
    count = int(np.exp(rng.uniform(np.log(40), np.log(500))))
    largest = rng.uniform(0.08, 0.3) * height
    # Radii r of density r⁻³ between 3 pixels and the largest, cut short below.
    radii = 1 / np.sqrt(rng.uniform(1 / largest**2, 1 / 3**2, count))
    radii = np.where(rng.random(count) < 0.5, rng.uniform(3, largest, count), radii)
    for radius in radii:
        colour = (palette[int(rng.integers(8))] * rng.uniform(0.6, 1.2)).tolist()
        x, y = rng.uniform(0, width), rng.uniform(0, low)
        turn = rng.uniform(0, 180)
        kind = int(rng.integers(4))
        if kind == 0:
            axes = (int(radius) + 1, int(radius * rng.uniform(0.3, 1)) + 1)
            cv2.ellipse(picture, (int(x), int(y)), axes, turn, 0, 360, colour, -1, cv2.LINE_AA)
        elif kind == 1:
            box = ((x, y), (radius * 2, radius * rng.uniform(0.2, 2)), turn if turn < 60 else 0.0)
            cv2.fillPoly(picture, [cv2.boxPoints(box).astype(np.int32)], colour, cv2.LINE_AA)
        elif kind == 2:
            angles = np.sort(rng.uniform(0, 2 * np.pi, int(rng.integers(3, 8))))
            away = radius * rng.uniform(0.4, 1.2, len(angles))
            corners = np.stack([x + away * np.cos(angles), y + away * np.sin(angles)], 1)
            cv2.fillPoly(picture, [corners.astype(np.int32)], colour, cv2.LINE_AA)
        else:
            end = (int(x + 2 * radius * np.cos(turn)), int(y + 2 * radius * np.sin(turn)))
            thick = max(int(radius * rng.uniform(0.05, 0.4)), 1)
            cv2.line(picture, (int(x), int(y)), end, colour, thick, cv2.LINE_AA)
    grain = noise(rng, (height, width), float(np.exp(rng.uniform(np.log(4), np.log(60)))), 3)
    grain = 1 + rng.uniform(0.02, 0.18) * grain
    picture[:low] = cv2.multiply(picture[:low], cv2.merge([grain[:low]] * 3), dtype=cv2.CV_8U)
    return picture
