"""Drawings: what is drawn lies where it should, in the right colour, and nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest

from cmpose.data.skeleton import FLIP_PERMUTATION, JOINTS, LIMBS
from cmpose.viz.draw import (
    JOINT_COLORS,
    SIDE_COLORS,
    draw_key,
    draw_skeleton,
    limb_color,
    line_width,
    montage,
)


def standing(height=200.0, x=150.0, y=20.0):
    """A person who faces us: the left joints are on the right of the picture."""
    places = {
        "ankle": (0.12, 1.0),
        "knee": (0.11, 0.75),
        "hip": (0.10, 0.5),
        "wrist": (0.22, 0.52),
        "elbow": (0.20, 0.36),
        "shoulder": (0.13, 0.2),
        "bottom": (0.0, 0.16),
        "nose": (0.0, 0.08),
        "top": (0.0, 0.0),
    }
    points = []
    for name in JOINTS:
        dx, dy = places[name.split("_")[-1]]
        points.append((x + height * (dx if name.startswith("left") else -dx), y + height * dy))
    return np.array(points)


def canvas():
    return np.full((240, 300, 3), 90, np.uint8)


def test_joints_and_limbs_have_their_sides_colours():
    image = canvas()
    pose = standing()
    assert draw_skeleton(image, pose) is image
    for j, name in enumerate(JOINTS):
        x, y = np.round(pose[j]).astype(int)
        side = name.split("_")[0] if name.split("_")[0] in SIDE_COLORS else "middle"
        assert np.abs(image[y, x].astype(int) - SIDE_COLORS[side]).max() < 60, name
    x, y = np.round((pose[0] + pose[1]) / 2).astype(int)  # the right shin
    assert np.abs(image[y, x].astype(int) - SIDE_COLORS["right"]).max() < 10


def test_bgr_is_rgb_turned_round():
    rgb, bgr = canvas(), canvas()
    draw_key(draw_skeleton(rgb, standing(), box=np.array([50, 5, 200, 220]), track_id=3), note="n")
    draw_key(
        draw_skeleton(bgr, standing(), box=np.array([50, 5, 200, 220]), track_id=3, order="bgr"),
        note="n",
        order="bgr",
    )
    np.testing.assert_array_equal(rgb, bgr[..., ::-1])


def test_weak_and_absent_joints_are_left_out():
    pose, scores = standing(), np.full(15, 0.9)
    scores[:6] = 0.05
    pose[6:12] = np.nan
    image = draw_skeleton(canvas(), pose, scores, min_score=0.1)
    assert (image[100:] == 90).all()  # no legs, no arms
    assert (image[:70] != 90).any()
    np.testing.assert_array_equal(draw_skeleton(canvas(), np.full((15, 2), np.nan)), canvas())


def test_far_outside_is_clipped():
    pose = standing()
    pose[0] = (1e9, -1e9)
    draw_skeleton(canvas(), pose, box=np.array([-1e7, -5, 2e7, 9]), track_id=123456)


def test_line_width_grows_with_the_person():
    image = np.zeros((1080, 1920, 3), np.uint8)
    widths = [line_width(standing(height), image) for height in (50, 300, 900)]
    assert widths[0] == 1
    assert widths == sorted(set(widths))
    assert line_width(standing(900), np.zeros((90, 60, 3), np.uint8)) == 1


def test_palettes():
    assert len(set(JOINT_COLORS)) == 15
    assert all(limb_color(a, b) in SIDE_COLORS.values() for a, b in LIMBS)
    for j, k in enumerate(FLIP_PERMUTATION):  # blue stands for right, red for left
        if j < k:
            (r1, _, b1), (r2, _, b2) = JOINT_COLORS[j], JOINT_COLORS[k]
            assert (b1 > r1) == JOINTS[j].startswith("right")
            assert (b2 > r2) == JOINTS[k].startswith("right")


def test_key_stays_in_its_corner():
    image = draw_key(canvas(), note="boxes: HOG")
    assert (image[:-40] == 90).all()
    for color in SIDE_COLORS.values():
        assert (image == color).all(axis=2).any()
    draw_key(np.zeros((8, 8, 3), np.uint8))  # a picture smaller than the key


def test_montage():
    crops = np.random.default_rng(0).integers(0, 255, (5, 128, 96, 3), np.uint8)
    poses = np.stack([standing(100, 48, 10)] * 5)
    visible = np.ones((5, 15))
    visible[:, 3:] = 0
    sheet = montage(crops, poses, np.ones((5, 15)), poses + 3, visible)
    assert sheet.dtype == np.uint8
    assert sheet.shape == (2 * 256 + 2, 3 * 192 + 4, 3)
    assert (sheet[258:, 2 * 194 :] == 24).all()  # the sixth tile stays empty
    assert montage(crops[:1], poses[:1], np.ones((1, 15))).shape == (256, 192, 3)
    with pytest.raises(ValueError, match="with B >= 1"):
        montage(crops[:0], poses[:0], np.ones((0, 15)))
    with pytest.raises(ValueError, match=r"keypoints must be \[5, 15, 2\], got \(4, 15, 2\)"):
        montage(crops, poses[:4], np.ones((5, 15)))


def test_errors():
    with pytest.raises(ValueError, match=r"image must be uint8 \[H, W, 3\], got float64"):
        draw_skeleton(np.zeros((8, 8, 3)), standing())
    with pytest.raises(ValueError, match=r"keypoints must be \[15, 2\], got \(17, 2\)"):
        draw_skeleton(canvas(), np.zeros((17, 2)))
    with pytest.raises(ValueError, match=r"scores must be \[15\], got \(17,\)"):
        draw_skeleton(canvas(), standing(), np.zeros(17))
