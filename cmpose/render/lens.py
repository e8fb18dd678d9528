"""Lens and sensor of a rendered video: motion blur, defocus, exposure and noise."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from cmpose.render.footage import Footage


@dataclass
class Lens:
    """What happens to the drawn pictures of a video; F frames of H×W pixels.

    Attributes:
        defocus: [F] sigma of the whole picture's blur, pixels.
        shutter: share of a frame's time that the shutter is open; 0: no motion blur.
        grade: uint8 [F, 1, 256, 3] look-up tables of exposure.
        noise: int8 [H+64, W+64, 3] sensor noise.
        noise_at: [F, 2] corner of each frame's piece of it.
        footage: what a small camera makes of it all.
    """

    defocus: np.ndarray
    shutter: float
    grade: np.ndarray
    noise: np.ndarray
    noise_at: np.ndarray
    footage: Footage | None = None

    def develop(
        self, picture: np.ndarray, f: int, views: np.ndarray
    ) -> tuple[np.ndarray, dict[str, float]]:
        """The picture [H, W, 3] of frame ``f`` as the sensor sees it, and how much it is blurred.

        Args:
            picture: as drawn.
            f: the frame.
            views: [F, 2, 3] from canvas to picture.
        """
        height, width = picture.shape[:2]
        smear = self._smear(f, views, (height, width)) if self.shutter else np.zeros(2)
        length = float(np.hypot(*smear))
        if length > 1:
            n = 2 * int(np.ceil(length / 2)) + 1
            kernel = np.zeros((n, n), np.float32)
            start, end = (np.rint(16 * (n // 2 + k * smear / 2)).astype(int) for k in (-1, 1))
            cv2.line(kernel, start.tolist(), end.tolist(), 1.0, 1, cv2.LINE_AA, 4)
            picture = cv2.filter2D(picture, -1, kernel / kernel.sum())
        sigma = float(self.defocus[f])
        if sigma > 0.3:
            picture = cv2.GaussianBlur(picture, (0, 0), sigma)
        picture = cv2.LUT(picture, self.grade[f])
        y, x = self.noise_at[f]
        picture = cv2.add(picture, self.noise[y : y + height, x : x + width], dtype=cv2.CV_8U)
        if self.footage is not None:
            picture = self.footage.develop(picture)
        return picture, {
            "defocus_sigma": round(sigma, 3) if sigma > 0.3 else 0.0,
            "motion_blur": round(length, 3) if length > 1 else 0.0,
        }

    def _smear(self, f: int, views: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """(x, y) pixels that the picture's middle moves while the shutter is open."""
        height, width = size
        view = views[f]
        middle = np.linalg.solve(view[:, :2], np.array([width, height]) / 2 - view[:, 2])
        first, last = max(f - 1, 0), min(f + 1, len(views) - 1)
        way = views[last] - views[first]
        return (way[:, :2] @ middle + way[:, 2]) / max(last - first, 1) * self.shutter
