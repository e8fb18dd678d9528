"""A rendered video's frames: pictures drawn from a plan, and their annotations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

from cmpose.data.sequence import Frame, box_of_keypoints
from cmpose.data.sequence import Person as Annotation
from cmpose.data.skeleton import JOINTS, LIMBS, NUM_JOINTS
from cmpose.render.body import Person
from cmpose.render.draw import Layer
from cmpose.render.occluder import Occluder

MIN_JOINTS = 3
"""A person with fewer joints that show becomes an ignore region."""

_OCCLUDER = 200  # owner numbers of occluders start here; people count from 1
_NEIGHBOURS = [[b if a == j else a for a, b in LIMBS if j in (a, b)] for j in range(NUM_JOINTS)]


@dataclass
class Actor:
    """A person with all their frames on the canvas, the scene's picture in its own pixels.

    Attributes:
        person: body and clothes.
        motion: names of the motions, joined by ``+``.
        near: pixels a metre half way through.
        flat: point name → canvas (x, y), [F, 2].
        depth: point name → metres away from the camera, [F].
        axes: ``chest`` and ``head`` → [F, 3, 3], see ``Person.draw``.
        scale: canvas pixels a metre, [F]; who has more stands nearer.
        ground: canvas point below the pelvis, [F, 2].
    """

    person: Person
    motion: str
    near: float
    flat: dict[str, np.ndarray]
    depth: dict[str, np.ndarray]
    axes: dict[str, np.ndarray]
    scale: np.ndarray
    ground: np.ndarray


@dataclass
class Video:
    """A video ready to be drawn; F frames of H×W pixels.

    Attributes:
        size: (H, W).
        background: uint8 canvas, BGR, larger than the frames.
        background_sigma: of the defocus in it, pixels.
        actors: people.
        things: occluders and clutter with their pixels a metre.
        views: [F, 2, 3] from canvas to picture.
        light: see ``rendered_draw.shade``.
        defocus: [F] sigma of the whole picture's blur, pixels.
        shutter: share of a frame's time that the shutter is open; 0: no motion blur.
        grade: uint8 [F, 1, 256, 3] look-up tables of exposure.
        noise: int8 [H+64, W+64, 3] sensor noise.
        noise_at: [F, 2] corner of each frame's piece of it.
    """

    size: tuple[int, int]
    background: np.ndarray
    background_sigma: float
    actors: list[Actor]
    things: list[tuple[float, Occluder]]
    views: np.ndarray
    light: np.ndarray
    defocus: np.ndarray
    shutter: float
    grade: np.ndarray
    noise: np.ndarray
    noise_at: np.ndarray

    def draw(self, name: str, first_id: int, folder: str) -> Iterator[tuple[np.ndarray, Frame]]:
        """Yields each frame's picture (uint8 [H, W, 3], BGR) and its annotation.

        Args:
            name: the sequence's.
            first_id: image id of frame 0.
            folder: what ``file_name`` starts with, e.g. ``images/val``.
        """
        height, width = self.size
        # Minus the canvas point in the picture's corner: how far the camera has moved the scene.
        moved = np.linalg.solve(self.views[:, :, :2], self.views[:, :, 2:])[..., 0]
        moved -= moved.mean(0)
        for f, view in enumerate(self.views):
            layer = Layer(
                cv2.warpAffine(
                    self.background, view, (width, height), borderMode=cv2.BORDER_REFLECT_101
                )
            )
            order = [(a.scale[f], i + 1) for i, a in enumerate(self.actors)]
            order += [(near, _OCCLUDER + i) for i, (near, _) in enumerate(self.things)]
            owners = [owner for _, owner in sorted(order)]  # far to near
            flats: dict[int, dict[str, np.ndarray]] = {}
            for owner in owners:
                if owner < _OCCLUDER:
                    flats[owner] = self._act(layer, owner, f)
                else:
                    thing = self.things[owner - _OCCLUDER][1]
                    thing.draw(layer, view, thing.parallax * moved[f], owner)
            frame = Frame(
                image_id=first_id + f,
                file_name=f"{folder}/{name}/{f:06d}.jpg",
                index=f,
                width=width,
                height=height,
            )
            record = self._annotate(frame, layer, flats, owners)
            picture, lens = self._develop(layer.image, f)
            frame.extra["cmpose"] = record | lens
            yield picture, frame

    def _act(self, layer: Layer, owner: int, f: int) -> dict[str, np.ndarray]:
        """Draws one person with their shadow; returns their points in the picture."""
        actor, view = self.actors[owner - 1], self.views[f]
        points = np.stack([at[f] for at in actor.flat.values()]) @ view[:, :2].T + view[:, 2]
        flat = dict(zip(actor.flat, points, strict=True))
        depth = {name: float(z[f]) for name, z in actor.depth.items()}
        zoom = float(np.hypot(view[0, 0], view[1, 0]))
        roll = np.eye(3)  # the camera's, with y up
        roll[:2, :2] = view[:, :2].T / zoom
        chest, head = (roll @ actor.axes[name][f] for name in ("chest", "head"))
        scale = float(actor.scale[f]) * zoom
        x0, y0 = view[:, :2] @ actor.ground[f] + view[:, 2]
        across, along = 0.38 * scale, 0.11 * scale
        box = layer.box(x0 - across, y0 - along, x0 + across, y0 + along)
        if box is not None:
            x, y = layer.grid(box)
            d = ((x - x0) / across) ** 2 + ((y - y0) / along) ** 2
            alpha = np.clip(0.6 * (1 - d), 0, 0.45).astype(np.float32)
            layer.cover(box, np.zeros((*alpha.shape, 3), np.uint8), alpha, 0)
        actor.person.draw(layer, owner, flat, depth, chest, head, scale, self.light)
        flat["head_box"] = actor.person.head_box(flat, head, scale)
        return flat

    def _annotate(
        self,
        frame: Frame,
        layer: Layer,
        flats: dict[int, dict[str, np.ndarray]],
        owners: list[int],
    ) -> dict[str, Any]:
        """Fills in the frame's people and ignore regions; returns what happened to them."""
        height, width = self.size
        people: list[dict[str, Any]] = []
        by_thing = by_person = 0
        for owner, flat in sorted(flats.items()):
            points = np.round(np.stack([flat[name] for name in JOINTS]), 3)
            inside = ((points >= 0) & (points <= [width - 1, height - 1])).all(1)
            nearer = owners[owners.index(owner) + 1 :]
            hidden = np.zeros(NUM_JOINTS, bool)
            for j in np.flatnonzero(inside):
                top = int(layer.owner[int(points[j, 1] + 0.5), int(points[j, 0] + 0.5)])
                if top in nearer:
                    hidden[j] = True
                    by_thing += top >= _OCCLUDER
                    by_person += top < _OCCLUDER
            seen = inside & ~hidden
            # A hidden joint can be told from a neighbour that shows; if none does, it cannot.
            told = np.array([seen[_NEIGHBOURS[j]].any() for j in range(NUM_JOINTS)])
            annotated = seen | (inside & hidden & told)
            if seen.sum() < MIN_JOINTS:
                self._ignore(frame, points)
                continue
            keypoints = np.concatenate([points, annotated[:, None]], 1) * annotated[:, None]
            frame.people.append(
                Annotation(
                    box=box_of_keypoints(keypoints, 1.3, 0),
                    keypoints=keypoints,
                    head_box=np.round(flat["head_box"], 3),
                    track_id=owner - 1,
                )
            )
            people.append(
                {
                    "track_id": owner - 1,
                    "motion": self.actors[owner - 1].motion,
                    "occluded_joints": [JOINTS[j] for j in np.flatnonzero(hidden)],
                }
            )
        return {
            "occluder": bool(by_thing),
            "crossing": bool(by_person),
            "occluded_joints": int(by_thing + by_person),
            "people": people,
        }

    def _ignore(self, frame: Frame, points: np.ndarray) -> None:
        """Covers what shows of a person nobody could annotate by an ignore rectangle."""
        last = np.array(self.size)[::-1] - 1
        edge = 0.1 * float(np.ptp(points[:, 1]))
        low = np.round(np.clip(points.min(0) - edge, 0, last), 1)
        high = np.round(np.clip(points.max(0) + edge, 0, last), 1)
        if (high - low > 1).all():
            corners = [low, [high[0], low[1]], high, [low[0], high[1]]]
            frame.ignore_regions.append(np.array(corners))

    def _develop(self, picture: np.ndarray, f: int) -> tuple[np.ndarray, dict[str, float]]:
        """Lens and sensor: motion blur, defocus, exposure, noise. Also returns their record."""
        height, width = self.size
        smear = self._smear(f) if self.shutter else np.zeros(2)
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
        return picture, {
            "defocus_sigma": round(sigma, 3) if sigma > 0.3 else 0.0,
            "background_defocus_sigma": round(self.background_sigma, 3),
            "motion_blur": round(length, 3) if length > 1 else 0.0,
        }

    def _smear(self, f: int) -> np.ndarray:
        """(x, y) pixels that the picture's middle moves while the shutter is open."""
        height, width = self.size
        view = self.views[f]
        middle = np.linalg.solve(view[:, :2], np.array([width, height]) / 2 - view[:, 2])
        first, last = max(f - 1, 0), min(f + 1, len(self.views) - 1)
        way = self.views[last] - self.views[first]
        return (way[:, :2] @ middle + way[:, 2]) / max(last - first, 1) * self.shutter
