"""A rendered video's frames: pictures drawn from what was decided, and their annotations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import cv2
import numpy as np

from cmpose.data.sequence import Frame
from cmpose.render.actor import Actor
from cmpose.render.annotate import FIRST_OCCLUDER, annotate
from cmpose.render.draw import Layer
from cmpose.render.lens import Lens
from cmpose.render.occluder import Occluder


@dataclass
class RenderedVideo:
    """A video ready to be drawn; F frames of H×W pixels.

    Attributes:
        size: (H, W).
        background: uint8 canvas, BGR, larger than the frames.
        background_sigma: sigma of the defocus in it, pixels.
        actors: people.
        occluders: things before the people, and clutter, each with its canvas pixels a metre.
        views: [F, 2, 3] from canvas to picture.
        light: see ``draw.shade``.
        lens: blur, exposure and noise.
    """

    size: tuple[int, int]
    background: np.ndarray
    background_sigma: float
    actors: list[Actor]
    occluders: list[tuple[float, Occluder]]
    views: np.ndarray
    light: np.ndarray
    lens: Lens

    def draw(self, name: str, first_id: int, folder: str) -> Iterator[tuple[np.ndarray, Frame]]:
        """Yields each frame's picture (uint8 [H, W, 3], BGR) and its annotation.

        Args:
            name: the sequence's.
            first_id: image id of frame 0.
            folder: what ``file_name`` starts with, e.g. ``images/val``.
        """
        height, width = self.size
        motions = [actor.motion for actor in self.actors]
        # How far the camera has moved the scene: minus the canvas point in the picture's corner.
        moved = np.linalg.solve(self.views[:, :, :2], self.views[:, :, 2:])[..., 0]
        moved -= moved.mean(0)
        for f, view in enumerate(self.views):
            layer = Layer(
                cv2.warpAffine(
                    self.background, view, (width, height), borderMode=cv2.BORDER_REFLECT_101
                )
            )
            order = self._far_to_near(f)
            drawn: dict[int, dict[str, np.ndarray]] = {}
            for owner in order:
                if owner < FIRST_OCCLUDER:
                    drawn[owner] = self.actors[owner - 1].draw(layer, owner, f, view, self.light)
                else:
                    occluder = self.occluders[owner - FIRST_OCCLUDER][1]
                    occluder.draw(layer, view, occluder.parallax * moved[f], owner)
            frame = Frame(
                image_id=first_id + f,
                file_name=f"{folder}/{name}/{f:06d}.jpg",
                index=f,
                width=width,
                height=height,
            )
            record = annotate(frame, layer.owner, drawn, order, motions)
            picture, blur = self.lens.develop(layer.image, f, self.views)
            frame.extra["cmpose"] = record | {
                "defocus_sigma": blur["defocus_sigma"],
                "background_defocus_sigma": round(self.background_sigma, 3),
                "motion_blur": blur["motion_blur"],
            }
            yield picture, frame

    def _far_to_near(self, f: int) -> list[int]:
        """Owner numbers of all people and things in the order in which they are drawn."""
        order = [(actor.scale[f], i + 1) for i, actor in enumerate(self.actors)]
        order += [(near, FIRST_OCCLUDER + i) for i, (near, _) in enumerate(self.occluders)]
        return [owner for _, owner in sorted(order)]
