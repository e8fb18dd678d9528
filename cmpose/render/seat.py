"""What rendered people sit on: a chair or a wheelchair, of bars between points."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cmpose.render.draw import ACROSS, ALONG
from cmpose.render.kinematics import Build, Pose3D

Bar = tuple[str, str, float]
"""Two points' names, and the half-width of the bar between them in units of stature."""


@dataclass(frozen=True)
class Seat:
    """Bars, and the texture [ALONG, ACROSS, 3] uint8 that they are drawn with."""

    bars: tuple[Bar, ...]
    texture: np.ndarray


_RIM = 14
"""Points of a wheel's rim."""


def seat(rng: np.random.Generator, build: Build, posed: Pose3D) -> Seat:
    """A seat below a person who sits; its points are added to ``posed``.

    Args:
        rng: draws.
        build: the person's measures.
        posed: their motion.
    """
    s, points = build.stature, posed.points
    bars: list[Bar] = []
    tint = rng.uniform(20, 160) * rng.uniform(0.85, 1.15, 3)
    texture = np.full((ALONG, ACROSS, 3), tint).astype(np.uint8)
    pelvis = points["pelvis"].mean(0)

    def put(name: str, side: float, up: float, forward: float) -> str:
        at = pelvis + np.array([side, up, forward]) * s
        points[f"seat_{name}"] = np.broadcast_to(at, points["pelvis"].shape).copy()
        return f"seat_{name}"

    low, floor = -0.07, -float(pelvis[1]) / s
    bars.append((put("back", 0, low, -0.08), put("front", 0, low, 0.19), 0.03))
    bars.append(
        (put("lean", 0, low + 0.05, -0.1), put("top", 0, rng.uniform(0.1, 0.3), -0.13), 0.1)
    )
    if rng.random() < 0.4:
        for side, x in (("left", 0.1), ("right", -0.1)):
            for end, z in (("back", -0.1), ("front", 0.18)):
                name = f"{side}_{end}"
                bars.append((put(f"{name}_1", x, low, z), put(f"{name}_0", x, floor, z), 0.012))
        return Seat(tuple(bars), texture)
    radius = min(rng.uniform(0.15, 0.19), -floor - 0.01)
    around = np.linspace(0, 2 * np.pi, _RIM, endpoint=False)
    disc = rng.random() < 0.35
    for side, x in (("left", 0.165), ("right", -0.165)):
        rim = [
            put(f"{side}_{i}", x, floor + radius * (1 + np.sin(a)), -0.02 + radius * np.cos(a))
            for i, a in enumerate(around)
        ]
        bars += [(a, b, 0.008) for a, b in zip(rim, rim[1:] + rim[:1], strict=True)]
        hub = put(f"{side}_hub", x, floor + radius, -0.02)
        bars += [(hub, rim[i], 0.03 if disc else 0.003) for i in range(0, _RIM, 2)]
    return Seat(tuple(bars), texture)
