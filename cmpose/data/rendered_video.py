"""One rendered video: who is in it, how they and the camera move, and each frame's picture."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np

from cmpose.data.rendered_body import Look, Person
from cmpose.data.rendered_draw import Layer
from cmpose.data.rendered_motion import Build, perform
from cmpose.data.rendered_scene import Occluder, background, camera, occluder, smooth_curve
from cmpose.data.sequence import Frame, box_of_keypoints
from cmpose.data.sequence import Person as Annotation
from cmpose.data.skeleton import JOINTS, LIMBS, NUM_JOINTS

MIN_JOINTS = 3
"""A person with fewer annotated joints becomes an ignore region."""

_OCCLUDER = 200  # owner number of occluders; people count from 1
_MOTIONS = {
    "walk": 0.24,
    "run": 0.12,
    "stand": 0.12,
    "wave": 0.12,
    "jump": 0.10,
    "jumping_jack": 0.06,
    "crouch": 0.10,
    "dance": 0.08,
    "kick": 0.06,
}
_NEIGHBOURS = [[b if a == j else a for a, b in LIMBS if j in (a, b)] for j in range(NUM_JOINTS)]


@dataclass(frozen=True)
class Difficulty:
    """How hard the videos are. Probabilities are per video.

    Attributes:
        occluders: that things stand between the camera and the people.
        defocus: that the whole picture goes out of focus for a stretch of frames.
        background_defocus: that the background is out of focus throughout.
        crossing: that, of two or more people, two walk past each other.
        closeup: that people are larger than the picture, so that it cuts them off.
        motion_blur: that the camera's movement smears the picture.
        camera_motion: 0 holds the camera still; 1 is the usual pan, zoom, roll and shake.
        noise: strength of the sensor noise; 1 is the usual 1 to 5 grey levels.
    """

    occluders: float = 0.35
    defocus: float = 0.25
    background_defocus: float = 0.2
    crossing: float = 0.4
    closeup: float = 0.1
    motion_blur: float = 0.25
    camera_motion: float = 1.0
    noise: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            top = np.inf if name in ("camera_motion", "noise") else 1.0
            if not 0 <= value <= top:
                span = "at least 0" if top > 1 else "between 0 and 1"
                raise ValueError(f"difficulty.{name}: {value} is not {span}")


@dataclass
class Actor:
    """A person with all their frames on the canvas."""

    person: Person
    motion: str
    near: float  # pixels a metre half way through: larger is nearer
    flat: dict[str, np.ndarray]  # name → [F, 2] canvas points
    depth: dict[str, np.ndarray]  # name → [F] metres
    axes: dict[str, np.ndarray]  # chest, pelvis, head → [F, 3, 3]
    scale: np.ndarray  # [F] canvas pixels a metre
    ground: np.ndarray  # [F, 2] canvas point below the pelvis


@dataclass
class Video:
    """A video ready to be drawn; ``Video.plan`` draws its lots from the seed."""

    size: tuple[int, int]
    background: np.ndarray
    background_sigma: float
    actors: list[Actor]
    things: list[tuple[float, Occluder]]
    views: np.ndarray
    light: np.ndarray
    defocus: np.ndarray
    smear: float
    grade: np.ndarray
    noise: np.ndarray
    rng: np.random.Generator = field(repr=False)

    @staticmethod
    def plan(
        key: list[int],
        *,
        frames: int,
        size: tuple[int, int],
        fps: float,
        max_people: int,
        difficulty: Difficulty,
    ) -> Video:
        """Decides everything about a video.

        Args:
            key: non-negative integers that, with the other arguments, determine every pixel.
            frames: number of frames.
            size: (height, width).
            fps: frames a second.
            max_people: people in a video are 1 to this many.
            difficulty: see ``Difficulty``.
        """
        rng = np.random.default_rng(key)
        height, width = size
        canvas = (int(1.6 * height), int(1.8 * width))
        middle = np.array([canvas[1] / 2, canvas[0] / 2])
        times = np.arange(frames) / fps
        count = int(rng.choice(max_people, p=_falling(max_people))) + 1
        closeup = rng.random() < difficulty.closeup
        share = rng.uniform(0.95, 1.5) if closeup else rng.uniform(0.44, 0.78)
        metre = share * height / 1.7
        eye = rng.uniform(1.1, 2.3)  # the camera's height in metres
        horizon = middle[1] - metre * (eye - rng.uniform(0.8, 0.95))
        stage = _Stage(middle[0], horizon, eye, 1.4 * height)

        crossing = count >= 2 and rng.random() < difficulty.crossing
        slots = (np.arange(count) + 0.5) / count - 0.5
        rng.shuffle(slots)
        actors = []
        for i in range(count):
            crosses = crossing and i < 2
            slot = rng.uniform(-0.12, 0.12) if crosses else slots[i] + rng.uniform(-0.1, 0.1)
            near = metre * np.exp(rng.uniform(-0.16, 0.16))
            heading = None
            if crosses:
                side = 1 if i == 0 else -1
                heading = side * (np.pi / 2 + rng.uniform(-0.4, 0.4))
            actors.append(_actor(rng, stage, times, slot * 0.72 * width, near, heading))
        actors.sort(key=lambda actor: actor.near)

        things: list[tuple[float, Occluder]] = []
        if rng.random() < difficulty.occluders:
            for _ in range(int(rng.integers(1, 4))):
                actor = actors[int(rng.integers(len(actors)))]
                near = actor.near * rng.uniform(1.06, 1.35)
                at = actor.ground[int(rng.integers(frames)), 0] + rng.normal(0, 0.35) * metre
                blur = rng.uniform(1.5, 4) if rng.random() < 0.3 else 0.0
                things.append((near, occluder(rng, at, horizon + near * eye, near, blur)))
        for _ in range(int(rng.integers(0, 3))):  # the same things behind people are clutter
            near = metre * rng.uniform(0.5, 0.8)
            at = middle[0] + rng.uniform(-0.6, 0.6) * width
            things.append((near, occluder(rng, at, horizon + near * eye, near, 0.0)))

        subject = np.mean([(a.flat["pelvis"] + a.flat["head_bottom"]) / 2 for a in actors], 0)
        scene = background(rng, canvas, int(horizon))
        soft = rng.uniform(1.5, 3.5) if rng.random() < difficulty.background_defocus else 0.0
        if soft:
            scene = cv2.GaussianBlur(scene, (0, 0), soft)
        away = rng.uniform(-0.8, 0.8)
        light = np.array([np.sin(away), -0.55, np.cos(away), 0.0]) * rng.uniform(0.4, 0.62)
        light[3] = rng.uniform(0.42, 0.6)
        grain = rng.standard_normal((height + 64, width + 64, 3)) * rng.uniform(1, 5)
        return Video(
            size=size,
            background=scene,
            background_sigma=float(soft),
            actors=actors,
            things=sorted(things, key=lambda thing: thing[0]),
            views=camera(rng, times, size, subject, difficulty.camera_motion),
            light=light,
            defocus=_defocus(rng, frames, difficulty.defocus, height / 360),
            smear=float(rng.uniform(0.3, 0.9)) if rng.random() < difficulty.motion_blur else 0.0,
            grade=_grade(rng, times),
            noise=np.clip(np.round(grain * difficulty.noise), -127, 127).astype(np.int8),
            rng=rng,
        )

    def draw(self, name: str, first_id: int, folder: str) -> Iterator[tuple[np.ndarray, Frame]]:
        """Yields each frame's picture (uint8 [H, W, 3], BGR) and its annotation.

        Args:
            name: the sequence's.
            first_id: image id of frame 0.
            folder: what ``file_name`` starts with, e.g. ``images/val``.
        """
        height, width = self.size
        drift = self.views[:, :, :2].transpose(0, 2, 1) @ self.views[:, :, 2:]
        drift = drift[..., 0] / (self.views[:, 0, 0] ** 2 + self.views[:, 1, 0] ** 2)[:, None]
        for f, view in enumerate(self.views):
            picture = cv2.warpAffine(
                self.background, view, (width, height), borderMode=cv2.BORDER_REFLECT_101
            )
            layer = Layer(picture)
            stage = [(a.near, 0, i) for i, a in enumerate(self.actors)]
            stage += [(near, 1, i) for i, (near, _) in enumerate(self.things)]
            ranks: dict[int, int] = {}
            flat_of: dict[int, dict[str, np.ndarray]] = {}
            for rank, (_, is_thing, i) in enumerate(sorted(stage)):
                if is_thing:
                    thing = self.things[i][1]
                    moved = view.copy()
                    slide = thing.parallax * (drift[f] - drift.mean(0))
                    moved[:, 2] += view[:, :2] @ slide
                    thing.draw(layer, moved, _OCCLUDER + i)
                    ranks[_OCCLUDER + i] = rank
                else:
                    flat_of[i] = self._act(layer, self.actors[i], i + 1, f, view)
                    ranks[i + 1] = rank
            flats = [flat_of[i] for i in range(len(self.actors))]
            frame = Frame(
                image_id=first_id + f,
                file_name=f"{folder}/{name}/{f:06d}.jpg",
                index=f,
                width=width,
                height=height,
            )
            self._annotate(frame, layer, flats, ranks, f)
            yield self._develop(layer.image, f, frame), frame

    def _act(
        self, layer: Layer, actor: Actor, owner: int, f: int, view: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Draws one person with their shadow; returns their points in the picture."""
        flat = {name: view[:, :2] @ at[f] + view[:, 2] for name, at in actor.flat.items()}
        depth = {name: float(z[f]) for name, z in actor.depth.items()}
        zoom = float(np.hypot(view[0, 0], view[1, 0]))
        roll = np.eye(3)
        roll[:2, :2] = np.array([[view[0, 0], view[1, 0]], [-view[1, 0], view[0, 0]]]) / zoom
        scale = float(actor.scale[f]) * zoom
        ground = view[:, :2] @ actor.ground[f] + view[:, 2]
        across, along = 0.38 * scale, 0.11 * scale
        x0, y0 = ground
        box = layer.box(x0 - across, y0 - along, x0 + across, y0 + along)
        if box is not None:
            x, y = layer.grid(box)
            d = ((x - x0) / across) ** 2 + ((y - y0) / along) ** 2
            alpha = np.clip(0.6 * (1 - d), 0, 0.45).astype(np.float32)
            layer.cover(box, np.zeros((*alpha.shape, 3), np.uint8), alpha, 0)
        axes = {name: roll @ a[f] for name, a in actor.axes.items()}
        actor.person.draw(layer, owner, flat, depth, axes["chest"], axes["head"], scale, self.light)
        flat["head_box"] = actor.person.head_box(flat, axes["head"], scale)
        return flat

    def _annotate(
        self,
        frame: Frame,
        layer: Layer,
        flats: list[dict[str, np.ndarray]],
        ranks: dict[int, int],
        f: int,
    ) -> None:
        """Fills in the frame's people, ignore regions and the record of what happened."""
        height, width = self.size
        records: list[dict[str, Any]] = []
        by_thing = by_person = 0
        for i, flat in enumerate(flats):
            points = np.round(np.stack([flat[name] for name in JOINTS]), 3)
            inside = ((points >= 0) & (points <= [width - 1, height - 1])).all(1)
            hidden = np.zeros(NUM_JOINTS, bool)
            for j in np.flatnonzero(inside):
                top = int(layer.owner[int(points[j, 1] + 0.5), int(points[j, 0] + 0.5)])
                if top and ranks[top] > ranks[i + 1]:
                    hidden[j] = True
                    by_thing += top >= _OCCLUDER
                    by_person += top < _OCCLUDER
            seen = inside & ~hidden
            # A hidden joint can be told from a neighbour that shows; if none does, it cannot.
            told = np.array([seen[_NEIGHBOURS[j]].any() for j in range(NUM_JOINTS)])
            annotated = seen | (inside & hidden & told)
            keypoints = np.concatenate([points, annotated[:, None]], 1) * annotated[:, None]
            if annotated.sum() < MIN_JOINTS:
                self._ignore(frame, flat)
                continue
            frame.people.append(
                Annotation(
                    box=box_of_keypoints(keypoints, 1.3, 0),
                    keypoints=keypoints,
                    head_box=np.round(flat["head_box"], 3),
                    track_id=i,
                )
            )
            records.append(
                {
                    "track_id": i,
                    "motion": self.actors[i].motion,
                    "occluded_joints": [JOINTS[j] for j in np.flatnonzero(hidden)],
                }
            )
        frame.extra["cmpose"] = {
            "occluder": bool(by_thing),
            "crossing": bool(by_person),
            "occluded_joints": int(by_thing + by_person),
            "defocus_sigma": round(float(self.defocus[f]), 3),
            "background_defocus_sigma": round(self.background_sigma, 3),
            "motion_blur": 0.0,
            "people": records,
        }

    def _ignore(self, frame: Frame, flat: dict[str, np.ndarray]) -> None:
        height, width = self.size
        points = np.stack([flat[name] for name in JOINTS])
        edge = 0.1 * float(np.ptp(points[:, 1]))
        low = np.clip(points.min(0) - edge, 0, [width - 1, height - 1])
        high = np.clip(points.max(0) + edge, 0, [width - 1, height - 1])
        if (high - low > 1).all():
            (x0, y0), (x1, y1) = np.round(low, 1), np.round(high, 1)
            frame.ignore_regions.append(np.array([[x0, y0], [x1, y0], [x1, y1], [x0, y1]]))

    def _develop(self, picture: np.ndarray, f: int, frame: Frame) -> np.ndarray:
        """Lens and sensor: motion blur, defocus, exposure, noise."""
        if self.smear:
            before, after = self.views[max(f - 1, 0)], self.views[min(f + 1, len(self.views) - 1)]
            centre = np.linalg.solve(
                self.views[f][:, :2], np.array(self.size)[::-1] / 2 - self.views[f][:, 2]
            )
            way = ((after - before)[:, :2] @ centre + (after - before)[:, 2]) / 2 * self.smear
            length = float(np.hypot(*way))
            if length > 1:
                n = 2 * int(np.ceil(length / 2)) + 1
                kernel = np.zeros((n, n), np.float32)
                ends = [tuple(int(round(16 * (n // 2 + k * w / 2))) for w in way) for k in (-1, 1)]
                cv2.line(kernel, ends[0], ends[1], 1.0, 1, cv2.LINE_AA, 4)
                picture = cv2.filter2D(picture, -1, kernel / max(kernel.sum(), 1e-6))
                frame.extra["cmpose"]["motion_blur"] = round(length, 3)
        if self.defocus[f] > 0.3:
            picture = cv2.GaussianBlur(picture, (0, 0), float(self.defocus[f]))
        else:
            frame.extra["cmpose"]["defocus_sigma"] = 0.0
        picture = cv2.LUT(picture, self.grade[f])
        y, x = (int(v) for v in self.rng.integers(0, 64, 2))
        height, width = self.size
        return cv2.add(picture, self.noise[y : y + height, x : x + width], dtype=cv2.CV_8U)


@dataclass(frozen=True)
class _Stage:
    """Ground and perspective of the canvas: a thing at s pixels a metre stands at row
    ``horizon + s · eye``, ``focal / s`` metres away."""

    middle: float
    horizon: float
    eye: float
    focal: float


def _falling(count: int) -> np.ndarray:
    weights = 0.8 ** np.arange(count)
    return weights / weights.sum()


def _actor(
    rng: np.random.Generator,
    stage: _Stage,
    times: np.ndarray,
    slot: float,
    near: float,
    heading: float | None,
) -> Actor:
    """A person's lot, and their way over the canvas.

    Args:
        slot: canvas pixels from the middle where they are half way through the video.
        near: pixels a metre there.
        heading: radians, 0 towards the camera, π/2 to the right; None draws one.
    """
    build = Build.draw(rng)
    person = Person(build, Look.draw(rng, build))
    if heading is None:
        names = [str(rng.choice(list(_MOTIONS), p=list(_MOTIONS.values())))]
        if times[-1] > 1.2 and rng.random() < 0.3:
            names.append(str(rng.choice(list(_MOTIONS))))
        heading = rng.uniform(-np.pi, np.pi)
    else:
        names = [str(rng.choice(["walk", "run"], p=[0.75, 0.25]))]
    posed = perform(names, build, times, rng)
    turn = 0.35 if len(times) > 1 else 0.0
    yaw = heading + turn * smooth_curve(rng, times, 0.2)
    cos, sin = np.cos(yaw), np.sin(yaw)

    def to_camera(v: np.ndarray) -> np.ndarray:
        """Person axes (left, up, forward) → camera axes (right, up, away), level camera."""
        x, y, z = v[..., 0], v[..., 1], v[..., 2]
        return np.stack([x * cos + z * sin, y, x * sin - z * cos], -1)

    step = np.diff(posed.travel, axis=0, prepend=posed.travel[:1])
    step = to_camera(np.stack([step[:, 0], np.zeros_like(times), step[:, 1]], -1))
    way = np.cumsum(step, 0)
    way -= way[len(way) // 2]
    away = np.maximum(stage.focal / near + way[:, 2], 0.45 * stage.focal / near)
    scale = stage.focal / away
    x = stage.middle + slot + scale * way[:, 0]
    ground = np.stack([x, stage.horizon + scale * stage.eye], -1)

    pitch = np.arctan2(stage.eye - 0.9, stage.focal / near)
    tilt = np.array(
        [[1, 0, 0], [0, np.cos(pitch), np.sin(pitch)], [0, -np.sin(pitch), np.cos(pitch)]]
    )
    flat, depth = {}, {}
    for name, at in posed.points.items():
        seen = to_camera(at) @ tilt.T
        flat[name] = ground + scale[:, None] * seen[:, :2] * [1, -1]
        depth[name] = seen[:, 2]
    axes = {}
    for name in ("chest", "head"):
        columns = [to_camera(getattr(posed, name)[:, :, i]) @ tilt.T for i in range(3)]
        axes[name] = np.stack(columns, -1)
    return Actor(person, "+".join(names), near, flat, depth, axes, scale, ground)


def _defocus(rng: np.random.Generator, frames: int, chance: float, unit: float) -> np.ndarray:
    """[F] blur sigma in pixels: zero but for a stretch that comes and goes softly."""
    if rng.random() >= chance:
        return np.zeros(frames)
    centre, half = rng.uniform(0, frames), rng.uniform(0.12, 0.4) * frames + 1
    away = np.abs(np.arange(frames) - centre) / half
    return unit * rng.uniform(1.2, 3.2) * np.clip(2 * (1 - away), 0, 1)


def _grade(rng: np.random.Generator, times: np.ndarray) -> np.ndarray:
    """[F, 1, 256, 3] exposure, contrast and tint as look-up tables, with a slow drift."""
    level = np.arange(256)[None, :, None] / 255
    gain = rng.uniform(0.8, 1.15) * (1 + 0.05 * smooth_curve(rng, times, 0.3))[:, None, None]
    tint = rng.uniform(0.94, 1.06, 3)
    gamma = rng.uniform(0.85, 1.2)
    table = 255 * (level**gamma) * gain * tint
    return np.clip(table + rng.uniform(-6, 10), 0, 255).astype(np.uint8)[:, None]
