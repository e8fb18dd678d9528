"""Drawing a posed, dressed body: its parts as tubes and a ball, from far to near."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np

from cmpose.render.draw import PROFILE, Layer, ball, limb, turned
from cmpose.render.kinematics import Build
from cmpose.render.look import Look
from cmpose.render.seat import Seat


def _taper(first: float, last: float) -> np.ndarray:
    return np.linspace(first, last, PROFILE, dtype=np.float32)


class _Parts:
    """The parts of one body in one frame, collected to be drawn from far to near.

    Widths and biases are in units of stature. A bias changes a part's depth in the order of
    drawing: a negative one moves it towards the camera.
    """

    def __init__(
        self,
        flat: dict[str, np.ndarray],
        depth: dict[str, float],
        stature: float,
        scale: float,
        draw_limb: Callable[..., None],
    ) -> None:
        self.flat, self.depth = dict(flat), dict(depth)
        self.stature, self.scale = stature, scale
        self.draw_limb = draw_limb
        self.parts: list[tuple[float, int, Callable[[], None]]] = []

    def add(self, z: float, draw: Callable[[], None]) -> None:
        """Adds a part at depth ``z`` (metres away), which ``draw`` draws."""
        self.parts.append((-z, len(self.parts), draw))

    def limb(
        self,
        start: str,
        end: str,
        table: np.ndarray,
        texture: np.ndarray,
        bias: float = 0.0,
        hem: Literal["start", "end"] | None = None,
    ) -> None:
        """Adds a tube between two named points, with half-widths ``table`` [PROFILE]."""
        z = (self.depth[start] + self.depth[end]) / 2 + bias * self.stature
        profile = np.maximum(table * (self.stature * self.scale), 0.6).astype(np.float32)
        ends = self.flat[start], self.flat[end]
        self.add(z, partial(self.draw_limb, *ends, profile, texture, hem=hem))

    def add_point(self, name: str, origin: str, axes: np.ndarray, offset: list[float]) -> None:
        """Names a new point at ``offset`` (left, up, forward; units of stature) from another."""
        away = axes @ np.asarray(offset) * self.stature
        self.flat[name] = self.flat[origin] + np.array([away[0], -away[1]]) * self.scale
        self.depth[name] = self.depth[origin] + float(away[2])

    def draw(self) -> None:
        """Draws all parts, from far to near."""
        for _, _, draw in sorted(self.parts, key=lambda part: part[:2]):
            draw()


class Body:
    """A person's measures, clothes and perhaps a seat, which can be drawn in any pose."""

    def __init__(self, build: Build, look: Look) -> None:
        self.build = build
        self.look = look
        self.seat: Seat | None = None

    def draw(
        self,
        layer: Layer,
        owner: int,
        flat: dict[str, np.ndarray],
        depth: dict[str, float],
        chest: np.ndarray,
        head: np.ndarray,
        scale: float,
        light: np.ndarray,
    ) -> None:
        """Draws the body, and what it sits on.

        Args:
            layer: picture to draw on.
            owner: number that marks this person's pixels.
            flat: point name → picture (x, y).
            depth: point name → metres away from the camera, any origin.
            chest: [3, 3]; columns are its left, up and forward directions in camera axes
                (x right, y up, z away).
            head: likewise.
            scale: pixels a metre.
            light: see ``draw.shade``.
        """

        parts = _Parts(
            flat, depth, self.build.stature, scale, partial(limb, layer, light=light, owner=owner)
        )
        look = self.look.textures
        table = self.look.tables
        for side in ("left", "right"):
            parts.limb(f"{side}_heel", f"{side}_toe", _taper(0.021, 0.017), look["shoe"], 0.005)
            parts.limb(f"{side}_knee", f"{side}_ankle", table["shank"], look["shank"])
            parts.limb(f"{side}_hip", f"{side}_knee", table["thigh"], look["thigh"], -0.005)
            # Arms beside the body are drawn after it; the hand before the sleeve.
            arm = table["upper_arm"]
            parts.limb(f"{side}_shoulder", f"{side}_elbow", arm, look["upper_arm"], -0.05)
            parts.limb(f"{side}_elbow", f"{side}_wrist", table["forearm"], look["forearm"], -0.055)
            parts.limb(f"{side}_wrist", f"{side}_hand", _taper(0.013, 0.017), look["skin"], -0.05)
        # The torso's cross-section is an ellipse: its outline narrows from front to side view.
        yaw = float(np.arctan2(chest[0, 2], -chest[2, 2]))
        side_on = chest[0, 2] ** 2
        width = np.sqrt(table["width"] ** 2 * (1 - side_on) + table["depth"] ** 2 * side_on)
        parts.limb("pelvis", "neck_base", width, turned(look["torso"], yaw), -0.02, hem="start")
        if self.seat is not None:
            for start, end, wide in self.seat.bars:
                parts.limb(start, end, _taper(wide, wide), self.seat.texture, 0.02)
        neck = _taper(0.031 * self.build.girth, 0.029)
        parts.limb("neck_base", "head_centre", neck, look["skin"])
        if self.look.skirt:
            self._skirt(parts, yaw)
        else:
            hips = _taper(0.054, 0.054) * self.build.girth
            parts.limb("left_hip", "right_hip", hips, look["hips"], 0.01)
        radii = self._radii(scale)
        self._head_gear(parts, head)
        parts.add(
            depth["head_centre"] - 0.05 * self.build.stature,
            partial(ball, layer, flat["head_centre"], radii, head, look["head"], light, owner),
        )
        parts.draw()

    def head_box(self, flat: dict[str, np.ndarray], head: np.ndarray, scale: float) -> np.ndarray:
        """PoseTrack's head rectangle [4], x, y, width, height, in picture pixels.

        The box of head and neck enlarged 1.15×: annotators draw loosely, and the diagonal then is
        about 1.4 times the way from head_bottom to head_top, as it is in PoseTrack18.
        """
        reach = np.sqrt(((head * np.asarray(self._radii(scale))) ** 2).sum(1))[:2]
        low = np.minimum(flat["head_centre"] - reach, flat["head_bottom"])
        high = np.maximum(flat["head_centre"] + reach, flat["head_bottom"])
        centre, size = (low + high) / 2, 1.15 * (high - low)
        return np.concatenate([centre - size / 2, size])

    def _radii(self, scale: float) -> tuple[float, float, float]:
        """The head's half-axes in pixels: left, up, forward."""
        s = self.build.stature * self.build.head * scale
        return 0.049 * s, 0.41 * 0.163 * s, 0.060 * s

    def _skirt(self, parts: _Parts, yaw: float) -> None:
        """Adds a tube around both thighs, drawn over them, as wide as the legs stand apart."""
        flat, depth, long = parts.flat, parts.depth, self.look.skirt
        hips, knees = ((f"left_{p}", f"right_{p}") for p in ("hip", "knee"))
        pairs = list(zip(hips, knees, strict=True))
        low = [flat[h] + min(long, 1.0) * (flat[k] - flat[h]) for h, k in pairs]
        flat["hem"] = (low[0] + low[1]) / 2
        flat["hem"] = flat["pelvis"] + (flat["hem"] - flat["pelvis"]) * max(long, 1.0)
        thigh = min((depth[h] + depth[k]) / 2 for h, k in pairs)
        depth["hem"] = 2 * thigh - depth["pelvis"]
        unit = self.build.stature * parts.scale
        flare = 0.5 * float(np.linalg.norm(low[0] - low[1])) / unit + 0.05
        table = _taper(0.074, max(flare, 0.085)) * (0.4 + 0.6 * self.build.girth)
        texture = turned(self.look.textures["skirt"], yaw)
        parts.limb("pelvis", "hem", table, texture, -0.015, hem="end")

    def _head_gear(self, parts: _Parts, head: np.ndarray) -> None:
        """Adds the nose, and hair or a brim that stands out from the head."""
        h = self.build.head
        skin, hair = self.look.textures["skin"], self.look.textures["hair"]
        parts.add_point("bridge", "head_centre", head, [0, 0.004 * h, 0.057 * h])
        parts.limb("bridge", "nose", _taper(0.006 * h, 0.010 * h), skin, -0.05)
        # style → start and end (up, forward) and their half-widths
        gear = {
            "long": ((0.020, -0.028), (-0.115, -0.050), (0.048, 0.050)),
            "pony": ((0.030, -0.062), (-0.100, -0.085), (0.020, 0.010)),
            "bun": ((0.055, -0.045), (0.070, -0.055), (0.024, 0.022)),
            "cap": ((0.030, 0.045), (0.024, 0.105), (0.034, 0.024)),
        }.get(self.look.hair)
        if gear is not None:
            for name, (up, forward) in zip(("start", "end"), gear[:2], strict=True):
                parts.add_point(f"gear_{name}", "head_centre", head, [0, up * h, forward * h])
            widths = _taper(gear[2][0] * h, gear[2][1] * h)
            parts.limb("gear_start", "gear_end", widths, hair, -0.05)
