"""Skeletons that a file describes: names, flips, limbs, halves."""

from __future__ import annotations

import numpy as np
import pytest

from cmpose.config import AugmentConfig
from cmpose.data import transforms as T
from cmpose.data.formats.skeleton import skeleton_of_category
from cmpose.data.skeleton import (
    POSETRACK,
    Skeleton,
    default_skeleton,
)
from tests.data.synthetic import COCO_KEYPOINTS


def read(**category) -> Skeleton:
    return skeleton_of_category(category, "f.json", "categories[0]")


def test_cocos_flips_limbs_and_halves_follow_from_its_names():
    skeleton = read(keypoints=COCO_KEYPOINTS, skeleton=[[16, 14], [1, 2]])
    assert skeleton.flip_pairs == tuple((j, j + 1) for j in range(1, 16, 2))
    assert skeleton.flip_permutation == (0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15)
    assert skeleton.limbs == ((15, 13), (0, 1))
    assert skeleton.lower_body == tuple(range(11, 17))
    assert skeleton.upper_body == tuple(range(11))
    assert skeleton.sides[:3] == ("middle", "left", "right")
    assert skeleton.unpaired == ()
    assert read(**skeleton.category()) == skeleton


def test_posetracks_constants_are_what_its_names_say():
    by_name = read(keypoints=list(POSETRACK.keypoints), skeleton=[])
    assert {frozenset(p) for p in by_name.flip_pairs} == {
        frozenset(p) for p in POSETRACK.flip_pairs
    }
    assert (by_name.upper_body, by_name.lower_body) == (POSETRACK.upper_body, POSETRACK.lower_body)
    assert read(**POSETRACK.category()) == POSETRACK
    assert default_skeleton(15) is POSETRACK
    assert default_skeleton(3).flip_permutation == (0, 1, 2)


@pytest.mark.parametrize(
    ("names", "pairs"),
    [
        (["l_hand", "r_hand"], ((0, 1),)),
        (["RKnee", "LKnee"], ((1, 0),)),
        (["knee-r", "tail", "knee-l"], ((2, 0),)),
        (["rightFrontPaw", "leftFrontPaw", "leftBackPaw"], ((1, 0),)),
        (["relay", "lever", "head"], ()),
        (["one"], ()),
    ],
)
def test_flips_by_name(names, pairs):
    assert read(keypoints=names).flip_pairs == pairs


def test_a_side_without_partner_is_known():
    assert read(keypoints=["left_hand", "head"]).unpaired == ("left_hand",)
    skeleton = read(keypoints=["left_hand", "other"], flip_pairs=[["left_hand", "other"]])
    assert skeleton.unpaired == ()
    assert skeleton.flip_permutation == (1, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keypoints": []}, r"categories\[0\]\.keypoints: expected a list of at least one name"),
        (
            {"keypoints": ["a", 3]},
            r"keypoints\[1\]: expected a text, got 3; keypoints, .* are lists of names",
        ),
        ({"keypoints": ["a", "a"]}, r"keypoints\[1\]: 'a' occurs twice"),
        ({"flip_pairs": [["a", "x"]]}, r"flip_pairs\[0\]: 'x' is no keypoint; there are a, b, c"),
        (
            {"flip_pairs": [[1, 2]]},
            r"flip_pairs\[0\]\[0\]: expected a text, got 1; .*flip_pairs a list of pairs of",
        ),
        ({"flip_pairs": [["a", "b"], ["b", "c"]]}, r"flip_pairs: 'b' is in two pairs"),
        ({"flip_pairs": [["a", "a"]]}, r"flip_pairs\[0\]: 'a' is paired with itself"),
        (
            {"flip_pairs": "ab"},
            r"flip_pairs: expected a list, got 'ab'; .*flip_pairs a list of pairs of",
        ),
        ({"skeleton": [[0, 1]]}, r"skeleton\[0\]: 0 is no keypoint; numbers run from 1 to 3"),
        ({"skeleton": [[1, 2, 3]]}, r"skeleton\[0\]: expected 2 values, got 3: \[1, 2, 3\]"),
        (
            {"upper_body": "a"},
            r"upper_body: expected a list, got 'a'; .*upper_body and lower_body are lists of",
        ),
        ({"lower_body": ["z"]}, r"lower_body: 'z' is no keypoint"),
    ],
)
def test_a_broken_category_is_named(fields, message):
    with pytest.raises(ValueError, match=message):
        read(**({"keypoints": ["a", "b", "c"]} | fields))


def test_mirroring_swaps_the_skeletons_own_pairs():
    skeleton = read(keypoints=["tail", "paw_l", "paw_r"])
    pose = np.array([[10.0, 5, 1], [2, 6, 1], [14, 7, 1]])
    matrix = T.flip_matrix(np.eye(2, 3), 16)
    points, visible = T.transform_joints(pose, matrix, (16, 16), flip=True, skeleton=skeleton)
    np.testing.assert_array_equal(points, [[5, 5], [1, 7], [13, 6]])
    assert visible.all()


def test_half_bodies_need_both_halves():
    rng = np.random.default_rng(0)
    pose = np.concatenate([rng.uniform(0, 100, (9, 2)), np.ones((9, 1))], axis=1)
    names = [f"p{j}" for j in range(9)]
    region = T.Region(np.array([50.0, 50.0]), np.array([75.0, 100.0]))
    config = AugmentConfig(scale=0, rotation=0, half_body=1.0)

    def center(**category) -> np.ndarray:
        skeleton = read(keypoints=names, **category)
        rng = np.random.default_rng(1)
        return T.sample_augmentation(region, pose, (64, 48), config, rng, skeleton).region.center

    np.testing.assert_array_equal(center(), region.center)
    halves = {"upper_body": names[:3], "lower_body": names[3:]}
    expected = [pose[:3, :2].mean(0), pose[3:, :2].mean(0)]
    assert any(np.allclose(center(**halves), one) for one in expected)
