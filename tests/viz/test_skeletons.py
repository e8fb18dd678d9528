"""Pictures of keypoints that are not PoseTrack's."""

from __future__ import annotations

import numpy as np
import pytest

from cmpose.data.skeleton import POSETRACK, Skeleton, default_skeleton
from cmpose.viz.draw import (
    JOINT_COLORS,
    SIDE_COLORS,
    draw_key,
    draw_skeleton,
    keypoint_colors,
    montage,
)
from cmpose.viz.explain import explain_figure
from cmpose.viz.tokens import Tokens

HANDS = Skeleton(("left_hand", "right_hand", "head"), ((0, 1), (0, 2)), ((0, 1),))


def test_limbs_and_sides_are_the_skeletons_own():
    pose = np.array([[20.0, 50], [80, 50], [20, 10]])
    image = draw_skeleton(np.zeros((100, 100, 3), np.uint8), pose, skeleton=HANDS, width=5)
    assert tuple(image[50, 50]) == SIDE_COLORS["middle"], "left to right: the middle's colour"
    assert tuple(image[50, 20]) == SIDE_COLORS["left"]
    assert tuple(image[50, 80]) == SIDE_COLORS["right"]
    assert not image[30, 60].any(), "no limb from the right hand to the head"
    with pytest.raises(ValueError, match=r"keypoints must be \[3, 2\], got \(15, 2\)"):
        draw_skeleton(image, np.zeros((15, 2)), skeleton=HANDS)


def test_every_keypoint_has_a_colour_of_its_own():
    assert keypoint_colors(POSETRACK) == JOINT_COLORS
    for count in (1, 3, 17, 40):
        assert len(set(keypoint_colors(default_skeleton(count)))) == count


@pytest.mark.parametrize("count", [1, 3, 20])
def test_any_number_of_keypoints_is_explained(count):
    rng = np.random.default_rng(count)
    skeleton = HANDS if count == 3 else default_skeleton(count)
    crop = rng.integers(0, 255, (128, 96, 3)).astype(np.uint8)
    order = rng.permutation(48)
    tokens = Tokens(
        (8, 6), rng.random((count, 48)), order[:count, None], order[:count], order[count:]
    )
    image = explain_figure(
        crop,
        rng.random((count, 32, 24)),
        rng.uniform(0, 96, (count, 2)),
        rng.random(count),
        tokens,
        skeleton=skeleton,
    )
    assert image.shape == (1000, 1600, 3)
    top = [tuple(c) for c in np.unique(image[60:600, 1424:1440].reshape(-1, 3), axis=0)]
    assert set(keypoint_colors(skeleton)) <= set(top), "the key has every colour"
    with pytest.raises(ValueError, match=rf"tokens\.top must be \[{count}, n\]"):
        Tokens((8, 6), tokens.scores, order[:25], order[:1], order[1:]).check(count)


def test_a_sheet_of_crops():
    crops = np.zeros((2, 64, 48, 3), np.uint8)
    poses = np.full((2, 3, 2), 20.0)
    sheet = montage(crops, poses, np.ones((2, 3)), poses, np.ones((2, 3)), skeleton=HANDS)
    assert sheet.max() > 200
    with pytest.raises(ValueError, match=r"keypoints must be \[2, 3, 2\], got \(2, 15, 2\)"):
        montage(crops, np.zeros((2, 15, 2)), np.ones((2, 15)), skeleton=HANDS)
    plain, own = (np.zeros((60, 300, 3), np.uint8) for _ in range(2))
    assert (draw_key(plain) != draw_key(own, skeleton=HANDS)).any(), "middle in place of head"
