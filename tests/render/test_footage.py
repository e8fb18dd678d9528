"""What makes rendered videos more like camera footage: every option shows, none unasked."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from cmpose.render.actor import Actor
from cmpose.render.dataset import render_dataset
from cmpose.render.footage import Footage, clutter
from cmpose.render.plan import plan_video
from cmpose.render.settings import ADDED, Difficulty

PLAIN = dict(
    occluders=0, defocus=0, background_defocus=0, crossing=0, closeup=0, motion_blur=0, noise=0
)


def pictures(video: int = 0, people: int = 3, **options: float) -> list[np.ndarray]:
    plan = plan_video(
        [4, 0, video],
        frames=2,
        size=(144, 256),
        fps=12,
        max_people=people,
        difficulty=Difficulty(**(PLAIN | options)),
    )
    return [picture for picture, _ in plan.draw("a", 0, "images")]


def actors(seed: int, videos: int, people: int, **options: float) -> list[Actor]:
    """The people of the first frames of some small videos."""
    scene = {"frames": 1, "size": (96, 128), "fps": 12, "max_people": people}
    return [
        actor
        for video in range(videos)
        for actor in plan_video([seed, 0, video], difficulty=Difficulty(**options), **scene).actors
    ]


@pytest.mark.parametrize("option", ADDED)
def test_each_option_changes_the_picture(option: str) -> None:
    plain, changed = pictures()[0], pictures(**{option: 1})[0]
    assert np.abs(plain.astype(int) - changed).mean() > 0.5


def test_unasked_the_settings_are_those_of_before(tmp_path: Path) -> None:
    render_dataset(tmp_path, videos=1, frames=1, seed=2026, size=(144, 256), progress=False)
    settings = (tmp_path / "rendered_val.json").read_text()
    assert not set(ADDED) & set(json.loads(settings)["difficulty"])
    assert hashlib.sha256(settings.encode()).hexdigest()[:16] == "8e46744020dc1a38"


def test_people_sit_on_their_seats() -> None:
    """Hips and knees are about level, and the feet below them."""
    plan = plan_video(
        [1, 0, 0], frames=3, size=(240, 320), fps=12, max_people=4, difficulty=Difficulty(seated=1)
    )
    for actor in plan.actors:
        assert actor.motion == "sit"
        assert actor.body.seat is not None
        assert {name for bar in actor.body.seat.bars for name in bar[:2]} <= set(actor.flat)
        for side in ("left", "right"):
            hip, knee, ankle = (
                actor.flat[f"{side}_{part}"][:, 1] for part in ("hip", "knee", "ankle")
            )
            assert (abs(hip - knee) < 0.35 * actor.scale).all()
            assert (ankle > knee + 0.2 * actor.scale).all()


def test_from_above_people_are_shorter_and_otherwise_the_same() -> None:
    def seen(above: float) -> np.ndarray:
        """Stature in metres, and as it is seen on the way from the feet to the head."""
        people = actors(5, 30, 1, **PLAIN, above=above)
        feet = [(a.flat["left_ankle"] + a.flat["right_ankle"])[0, 1] / 2 for a in people]
        tall = [
            (y - a.flat["head_top"][0, 1]) / a.scale[0] for y, a in zip(feet, people, strict=True)
        ]
        return np.stack([[a.body.build.stature for a in people], tall])

    level, down = seen(0), seen(1)
    assert (level[0] == down[0]).all()
    # 12 to 40 degrees; level cameras look down by up to 14.
    assert np.cos(np.deg2rad(40)) < down[1].sum() / level[1].sum() < np.cos(np.deg2rad(12))


def test_muted_clothes_have_little_colour() -> None:
    def colourfulness(muted: float) -> float:
        looks = [a.body.look.textures["torso"] for a in actors(9, 6, 4, muted=muted)]
        return float(np.mean([np.ptp(cloth.astype(int), axis=-1).mean() for cloth in looks]))

    assert colourfulness(1) < 0.5 * colourfulness(0)


def test_a_shadow_falls_on_the_ground_and_not_on_the_person() -> None:
    scene = dict(size=(240, 320), fps=12, max_people=1, frames=1)
    lit = plan_video([3, 0, 0], difficulty=Difficulty(**PLAIN, sunlight=1), **scene)
    [actor] = lit.actors
    assert actor.sun is not None
    [(with_sun, frame)] = lit.draw("a", 0, "images")
    actor.sun = None
    [(without, _)] = lit.draw("a", 0, "images")
    darker = without.astype(int) - with_sun > 8
    assert darker.any()
    assert (with_sun <= without.astype(int) + 1).all()
    for x, y, visible in frame.people[0].keypoints:
        if visible:
            assert not darker[int(y), int(x)].any()


def test_a_small_camera_loses_detail_and_colour() -> None:
    rng = np.random.default_rng(0)
    sharp = rng.integers(0, 256, (120, 160, 3), np.uint8)
    soft = Footage(1.0, 0.0, 0.2, 0.4, 0.0, 20).develop(sharp)
    assert soft.shape == sharp.shape
    assert (
        np.ptp(soft.astype(int), axis=-1).mean() < 0.5 * np.ptp(sharp.astype(int), axis=-1).mean()
    )
    assert np.abs(cv2.Laplacian(soft, cv2.CV_32F)).mean() < 50
    strong = Footage(1.8, 0.0, 1.0, 1.0, 0.0, 95).develop(np.full((64, 64, 3), 160, np.uint8))
    assert abs(int(strong[32, 32, 0]) - (128 + 1.8 * 32)) <= 2


@pytest.mark.parametrize("horizon", [-50, 60, 400])
def test_clutter_covers_the_scene_down_to_the_ground(horizon: int) -> None:
    scene = np.full((120, 200, 3), 128, np.uint8)
    for seed in range(4):
        covered = clutter(np.random.default_rng(seed), scene, horizon)
        assert covered.shape == scene.shape
        assert covered[:10].std() > 5
