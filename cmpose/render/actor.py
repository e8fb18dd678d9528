"""A person in a rendered video: where they are in each frame, and how they are drawn there."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from cmpose.render.body import Body
from cmpose.render.draw import Layer


@dataclass
class Actor:
    """A person with all their frames on the canvas, the scene's picture in its own pixels.

    Attributes:
        body: body and clothes.
        motion: names of the motions, joined by ``+``.
        near: pixels a metre half way through the video.
        flat: point name → canvas (x, y), [F, 2].
        depth: point name → metres away from the camera, [F].
        axes: ``chest`` and ``head`` → [F, 3, 3], see ``Body.draw``.
        scale: canvas pixels a metre, [F]; the larger it is, the nearer the person stands.
        ground: canvas point below the pelvis, [F, 2].
        sun: where a point's shadow falls: (right, down) pixels of the picture for each pixel that
            the point is above the ground; None casts none.
    """

    body: Body
    motion: str
    near: float
    flat: dict[str, np.ndarray]
    depth: dict[str, np.ndarray]
    axes: dict[str, np.ndarray]
    scale: np.ndarray
    ground: np.ndarray
    sun: tuple[float, float] | None = None

    def draw(
        self, layer: Layer, owner: int, f: int, view: np.ndarray, light: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Draws the person of frame ``f`` with their shadow.

        Args:
            layer: picture to draw on.
            owner: number that marks this person's pixels.
            f: the frame.
            view: [2, 3] from canvas to picture.
            light: see ``draw.shade``.

        Returns:
            Point name → picture (x, y), and ``head_box`` [4], x, y, width, height.
        """
        points = np.stack([at[f] for at in self.flat.values()]) @ view[:, :2].T + view[:, 2]
        flat = dict(zip(self.flat, points, strict=True))
        depth = {name: float(z[f]) for name, z in self.depth.items()}
        zoom = float(np.hypot(view[0, 0], view[1, 0]))
        roll = np.eye(3)  # the camera's, with y up
        roll[:2, :2] = view[:, :2].T / zoom
        chest, head = (roll @ self.axes[name][f] for name in ("chest", "head"))
        scale = float(self.scale[f]) * zoom
        ground = view[:, :2] @ self.ground[f] + view[:, 2]
        _draw_shadow(layer, ground, scale)
        if self.sun is not None:
            _cast_shadow(layer, flat, ground, scale, self.sun)
        self.body.draw(layer, owner, flat, depth, chest, head, scale, light)
        flat["head_box"] = self.body.head_box(flat, head, scale)
        return flat


def _draw_shadow(layer: Layer, ground: np.ndarray, scale: float) -> None:
    """A dark ellipse at picture point ``ground``; ``scale`` is in pixels a metre."""
    x0, y0 = ground
    across, along = 0.38 * scale, 0.11 * scale
    box = layer.box(x0 - across, y0 - along, x0 + across, y0 + along)
    if box is not None:
        x, y = layer.grid(box)
        d = ((x - x0) / across) ** 2 + ((y - y0) / along) ** 2
        alpha = np.clip(0.6 * (1 - d), 0, 0.45).astype(np.float32)
        layer.cover(box, np.zeros((*alpha.shape, 3), np.uint8), alpha, 0)


_CASTING = (
    *(("neck_base", "pelvis", 0.15), ("head_centre", "head_centre", 0.11)),
    *(
        (f"{side}_{a}", f"{side}_{b}", wide)
        for side in ("left", "right")
        for a, b, wide in (
            ("hip", "knee", 0.075),
            ("knee", "ankle", 0.055),
            ("shoulder", "elbow", 0.045),
            ("elbow", "hand", 0.04),
        )
    ),
)
"""What casts a shadow: two points, and half the width between them in metres."""


def _cast_shadow(
    layer: Layer,
    flat: dict[str, np.ndarray],
    ground: np.ndarray,
    scale: float,
    sun: tuple[float, float],
) -> None:
    """The body's shadow on level ground below picture point ``ground``."""
    height, width = layer.image.shape[:2]
    mask = np.zeros((height, width), np.uint8)

    def fall(name: str) -> list[int]:
        x, y = flat[name]
        above = max(float(ground[1] - y), 0.0)
        at = np.array([x + sun[0] * above, ground[1] + sun[1] * above])
        return np.clip(at, -30000, 30000).astype(int).tolist()

    for start, end, wide in _CASTING:
        thick = max(int(2 * wide * scale), 1)
        cv2.line(mask, fall(start), fall(end), 255, min(thick, 255))
    soft = cv2.GaussianBlur(mask, (0, 0), max(0.012 * scale, 0.5))
    layer.image[:] = cv2.multiply(
        layer.image, cv2.merge([1 - soft * (0.62 / 255)] * 3), dtype=cv2.CV_8U
    )
