"""What is decided before a video is drawn: who is in it, what they do, where things stand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

from cmpose.render.actor import Actor
from cmpose.render.body import Body
from cmpose.render.camera import camera, defocus_curve, grade_tables, smooth_curve
from cmpose.render.footage import Footage, clutter
from cmpose.render.kinematics import Build
from cmpose.render.lens import Lens
from cmpose.render.look import Look
from cmpose.render.motion import perform
from cmpose.render.occluder import Occluder, occluder
from cmpose.render.scene import background
from cmpose.render.seat import seat
from cmpose.render.settings import Difficulty
from cmpose.render.video import RenderedVideo

_MOTIONS = {  # many spread arms and bent legs: a model that always answers one pose is wrong
    "walk": 0.18,
    "run": 0.10,
    "stand": 0.06,
    "wave": 0.17,
    "jump": 0.14,
    "jumping_jack": 0.12,
    "crouch": 0.07,
    "dance": 0.10,
    "kick": 0.06,
}


@dataclass(frozen=True)
class Stage:
    """Ground and perspective of the canvas.

    A thing that is drawn with s pixels a metre stands on the ground at row ``horizon + s · eye``,
    ``focal / s`` metres away from the camera.

    Attributes:
        middle: column of the canvas's middle.
        width: of a frame, in pixels.
        horizon: row of the canvas.
        eye: the camera's height above the ground, in metres.
        focal: focal length in pixels.
    """

    middle: float
    width: float
    horizon: float
    eye: float
    focal: float


def plan_video(
    key: list[int],
    *,
    frames: int,
    size: tuple[int, int],
    fps: float,
    max_people: int,
    difficulty: Difficulty,
) -> RenderedVideo:
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
    # What was added later draws from generators of its own: without it, all is as it was.
    extra = np.random.default_rng([*key, 1])
    high = np.random.default_rng([*key, 2])
    height, width = size
    canvas = (int(1.6 * height), int(1.8 * width))
    middle = np.array([canvas[1] / 2, canvas[0] / 2])
    times = np.arange(frames) / fps
    weights = 0.8 ** np.arange(max_people)
    count = int(rng.choice(max_people, p=weights / weights.sum())) + 1
    closeup = rng.random() < difficulty.closeup
    share = rng.uniform(0.95, 1.5) if closeup else rng.uniform(0.44, 0.78)
    metre = share * height / 1.7
    eye = rng.uniform(1.1, 2.3)  # the camera's height in metres
    focal = 1.4 * height
    if high.random() < difficulty.above:
        eye = 0.9 + focal / metre * np.tan(np.deg2rad(high.uniform(12, 40)))
    horizon = middle[1] - metre * (eye - rng.uniform(0.8, 0.95))
    stage = Stage(middle[0], width, horizon, eye, focal)

    crowded = extra.random() < difficulty.crowd
    sunny = extra.random() < difficulty.sunlight
    actors = _people(rng, extra, stage, times, count, metre, crowded, difficulty)
    if sunny:
        sun = (float(extra.uniform(-1.3, 1.3)), float(extra.uniform(-0.35, 0.3)))
        actors = [replace(actor, sun=sun) for actor in actors]
    subject = np.mean([(a.flat["pelvis"] + a.flat["head_bottom"]) / 2 for a in actors], 0)
    scene = background(rng, canvas, int(horizon))
    if extra.random() < difficulty.clutter:
        scene = clutter(extra, scene, int(horizon))
    soft = 0.0
    if rng.random() < difficulty.background_defocus:
        soft = rng.uniform(1.5, 3.5) * height / 360
        scene = cv2.GaussianBlur(scene, (0, 0), soft)
    away = rng.uniform(-0.8, 0.8)
    light = np.array([np.sin(away), -0.55, np.cos(away), 0.0]) * rng.uniform(0.4, 0.62)
    light[3] = rng.uniform(0.42, 0.6)
    if sunny:
        light *= [extra.uniform(1.4, 2.0)] * 3 + [extra.uniform(0.6, 0.95)]
    grain = rng.standard_normal((height + 64, width + 64, 3), np.float32) * rng.uniform(1, 5)
    return RenderedVideo(
        size=size,
        background=scene,
        background_sigma=float(soft),
        actors=actors,
        occluders=_occluders(rng, stage, actors, metre, difficulty.occluders),
        views=camera(rng, times, size, subject, difficulty.camera_motion),
        light=light,
        lens=Lens(
            defocus=defocus_curve(rng, frames, difficulty.defocus, height / 360),
            shutter=float(rng.uniform(0.3, 0.9)) if rng.random() < difficulty.motion_blur else 0.0,
            grade=grade_tables(rng, times),
            noise=np.clip(np.round(grain * difficulty.noise), -127, 127).astype(np.int8),
            noise_at=rng.integers(0, 64, (frames, 2)),
            footage=Footage.draw(extra) if extra.random() < difficulty.footage else None,
        ),
    )


def _people(
    rng: np.random.Generator,
    extra: np.random.Generator,
    stage: Stage,
    times: np.ndarray,
    count: int,
    metre: float,
    crowded: bool,
    difficulty: Difficulty,
) -> list[Actor]:
    """The people of a video, far to near: ``count`` of them, about ``metre`` pixels a metre."""
    crossing = count >= 2 and rng.random() < difficulty.crossing
    slots = (np.arange(count) + 0.5) / count - 0.5
    rng.shuffle(slots)
    actors = []
    for i in range(count):
        crosses = crossing and i < 2
        slot = rng.uniform(-0.12, 0.12) if crosses else slots[i] + rng.uniform(-0.1, 0.1)
        near = metre * np.exp(rng.uniform(-0.16, 0.16))
        heading = None
        if crowded:
            slot, near = slot * extra.uniform(0.3, 0.7), near * np.exp(extra.uniform(-0.2, 0.2))
        if crosses:
            heading = (1 if i == 0 else -1) * (np.pi / 2 + rng.uniform(-0.4, 0.4))
        actors.append(
            plan_actor(
                rng,
                stage,
                times,
                slot * 0.72 * stage.width,
                near,
                heading,
                extra if extra.random() < difficulty.seated else None,
                extra if extra.random() < difficulty.muted else None,
            )
        )
    return sorted(actors, key=lambda actor: actor.near)


def _occluders(
    rng: np.random.Generator, stage: Stage, actors: list[Actor], metre: float, chance: float
) -> list[tuple[float, Occluder]]:
    """Occluders before the people, and clutter behind them; each with its pixels a metre."""
    occluders = []
    if rng.random() < chance:
        for _ in range(int(rng.integers(1, 3))):
            actor = actors[int(rng.integers(len(actors)))]
            near = actor.near * rng.uniform(1.06, 1.35)
            at = actor.ground[int(rng.integers(len(actor.ground))), 0] + rng.normal(0, 0.35) * metre
            blur = rng.uniform(1.5, 4) if rng.random() < 0.3 else 0.0
            occluders.append(
                (near, occluder(rng, at, stage.horizon + near * stage.eye, near, blur))
            )
    for _ in range(int(rng.integers(0, 3))):
        near = metre * rng.uniform(0.5, 0.8)
        at = stage.middle + rng.uniform(-0.6, 0.6) * stage.width
        occluders.append((near, occluder(rng, at, stage.horizon + near * stage.eye, near, 0.0)))
    return sorted(occluders, key=lambda entry: entry[0])


# Many parameters: each is drawn or decided by the video's plan, and no two belong together.
def plan_actor(
    rng: np.random.Generator,
    stage: Stage,
    times: np.ndarray,
    slot: float,
    near: float,
    heading: float | None,
    seated: np.random.Generator | None = None,
    muted: np.random.Generator | None = None,
) -> Actor:
    """Draws a person's looks and motion, and their way over the canvas.

    Args:
        rng: draws.
        stage: ground and perspective.
        times: [F] seconds.
        slot: where they are half way through the video, in canvas pixels from the middle.
        near: pixels a metre there.
        heading: radians, 0 towards the camera, π/2 to the right; None draws one.
        seated: draws how they sit; None lets them move about.
        muted: draws plain clothes; None those of any colour.
    """
    build = Build.draw(rng)
    look = Look.draw(rng, build)
    body = Body(build, look if muted is None else Look.draw(muted, build, muted=True))
    if heading is None:
        names = [str(rng.choice(list(_MOTIONS), p=list(_MOTIONS.values())))]
        if times[-1] > 1.2 and rng.random() < 0.3:
            names.append(str(rng.choice(list(_MOTIONS))))
        heading = rng.uniform(-np.pi, np.pi)
    else:
        names = [str(rng.choice(["walk", "run"], p=[0.75, 0.25]))]
    posed = perform(names, build, times, rng)
    if seated is not None:
        names, posed = ["sit"], perform(["sit"], build, times, seated)
        body.seat = seat(seated, build, posed)
    yaw = heading + (0.35 * smooth_curve(rng, times, 0.2) if len(times) > 1 else 0 * times)
    step = np.diff(posed.travel, axis=0, prepend=posed.travel[:1])
    length = float(np.linalg.norm(step, axis=1).sum())
    if length * near > 0.9 * stage.width:
        # Who would leave the picture walks a circle instead, away from the camera first.
        turn = length / (0.28 * stage.width / near)
        yaw += np.sign(np.sin(heading)) * turn * (times - times.mean()) / np.ptp(times)
    cos, sin = np.cos(yaw), np.sin(yaw)

    def to_camera(v: np.ndarray) -> np.ndarray:
        """Person axes (left, up, forward) → camera axes (right, up, away), level camera."""
        x, y, z = v[..., 0], v[..., 1], v[..., 2]
        return np.stack([x * cos + z * sin, y, x * sin - z * cos], -1)

    way = to_camera(np.stack([step[:, 0], np.zeros_like(times), step[:, 1]], -1)).cumsum(0)
    way -= way[len(way) // 2]
    away = np.maximum(stage.focal / near + way[:, 2], 0.45 * stage.focal / near)
    scale = stage.focal / away
    x = stage.middle + slot + scale * way[:, 0]
    ground = np.stack([x, stage.horizon + scale * stage.eye], -1)

    pitch = np.arctan2(stage.eye - 0.9, stage.focal / near)  # the camera looks down on people
    tilt = np.array(
        [[1, 0, 0], [0, np.cos(pitch), np.sin(pitch)], [0, -np.sin(pitch), np.cos(pitch)]]
    )
    flat, depth = {}, {}
    for name, at in posed.points.items():
        in_camera = to_camera(at) @ tilt.T
        flat[name] = ground + scale[:, None] * in_camera[:, :2] * [1, -1]
        depth[name] = in_camera[:, 2]
    axes = {}
    for name, part in (("chest", posed.chest), ("head", posed.head)):
        axes[name] = np.stack([to_camera(part[:, :, i]) @ tilt.T for i in range(3)], -1)
    return Actor(body, "+".join(names), near, flat, depth, axes, scale, ground)
