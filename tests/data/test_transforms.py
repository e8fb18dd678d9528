"""Crop geometry against DCPose's three-point construction, augmentation, flips, targets."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from cmpose.config import AugmentConfig
from cmpose.data import transforms as T
from cmpose.data.skeleton import FLIP_PAIRS, NUM_JOINTS
from tests.data import synthetic

SIZE = (256, 192)


def three_point_matrix(center, size, rotation, image_size):
    """The affine map that takes center, a point half a width above it (turned), and the corner
    of the right angle on both, to the same three points of the crop."""
    height, width = image_size
    angle = np.pi * rotation / 180
    up = np.array([size[0] / 2 * np.sin(angle), -size[0] / 2 * np.cos(angle)])

    def third(a, b):
        return b + np.array([-(a - b)[1], (a - b)[0]])

    source, target = np.zeros((3, 2), np.float32), np.zeros((3, 2), np.float32)
    source[0], source[1] = center, center + up
    target[0] = width / 2, height / 2
    target[1] = target[0] + [0, -width / 2]
    source[2], target[2] = third(source[0], source[1]), third(target[0], target[1])
    return cv2.getAffineTransform(source, target)


def test_crop_matrix_is_dcposes():
    rng = np.random.default_rng(0)
    for _ in range(200):
        box = np.concatenate([rng.uniform(0, 1000, 2), rng.uniform(20, 800, 2)])
        image_size = [(256, 192), (384, 288), (128, 96)][rng.integers(3)]
        rotation = rng.uniform(-90, 90)
        region = T.crop_region(box, image_size)
        expected = three_point_matrix(region.center, region.size, rotation, image_size)
        matrix = T.crop_matrix(region, image_size, rotation)
        corners = region.center + np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * region.size / 2
        # The three points are float32; the closed form is not.
        np.testing.assert_allclose(
            T.apply_matrix(matrix, corners), T.apply_matrix(expected, corners), atol=0.02
        )


def test_crop_region_by_hand():
    # 60×100 is narrower than 3:4 → 75×100; 90×100 is wider → 90×120; both × 1.25.
    narrow = T.crop_region(np.array([10.0, 20, 60, 100]), SIZE)
    np.testing.assert_array_equal(narrow.center, [40, 70])
    np.testing.assert_allclose(narrow.size, [93.75, 125])
    np.testing.assert_allclose(T.crop_region(np.array([0.0, 0, 90, 100]), SIZE).size, [112.5, 150])
    np.testing.assert_allclose(
        T.crop_region(np.array([0.0, 0, 75, 100]), SIZE, 1.0).size, [75, 100]
    )


def test_udp_maps_the_regions_corners_to_corner_pixels():
    region = T.crop_region(np.array([10.0, 20, 60, 100]), SIZE)
    matrix = T.crop_matrix(region, SIZE, udp=True)
    half = region.size / 2
    points = T.apply_matrix(matrix, np.stack([region.center - half, region.center + half]))
    np.testing.assert_allclose(points, [[0, 0], [191, 255]], atol=1e-9)
    plain = T.apply_matrix(T.crop_matrix(region, SIZE), np.stack([region.center + half]))
    np.testing.assert_allclose(plain, [[192, 256]], atol=1e-9)


def test_positive_rotation_turns_the_content_anticlockwise():
    region = T.crop_region(np.array([0.0, 0, 96, 128]), SIZE)
    right_of_center = region.center + [10, 0]
    x, y = T.apply_matrix(T.crop_matrix(region, SIZE, 90.0), right_of_center)
    assert abs(x - 96) < 1e-9
    assert y < 128  # above the centre


def test_flip_matrix_mirrors_the_crop():
    region = T.crop_region(np.array([13.0, 27, 60, 100]), SIZE)
    points = np.random.default_rng(0).uniform(0, 500, (20, 2))
    for udp in (False, True):
        matrix = T.crop_matrix(region, SIZE, 33.0, udp=udp)
        x, y = T.apply_matrix(matrix, points).T
        mirrored = T.apply_matrix(T.flip_matrix(matrix, SIZE[1]), points)
        np.testing.assert_allclose(mirrored, np.stack([SIZE[1] - 1 - x, y], axis=1), atol=1e-9)
        twice = T.flip_matrix(T.flip_matrix(matrix, SIZE[1]), SIZE[1])
        np.testing.assert_allclose(twice, matrix, atol=1e-9)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([10, 20, 30, 40], [10, 20, 29, 39]),
        ([-5, 20, 30, 40], [0, 20, 29, 39]),  # moved inside, as DCPose does
        ([300, 200, 100, 100], [300, 200, 19, 39]),  # cut at W − 1, H − 1
        ([0, 0, 320, 240], [0, 0, 319, 239]),
        ([-400, -400, 2000, 2000], [0, 0, 319, 239]),
        ([50, 60, 0, 10], None),
        ([50, 60, 10, 0], None),
        ([50, 60, 1, 1], None),
        ([-50, 10, 50, 10], None),  # ends where the picture begins
        ([320, 10, 50, 10], None),
        ([10, -30, 20, 20], None),
        ([10, 240, 20, 20], None),
    ],
)
def test_clean_box(box, expected):
    cleaned = T.clean_box(np.array(box, dtype=float), synthetic.WIDTH, synthetic.HEIGHT)
    if expected is None:
        assert cleaned is None
    else:
        np.testing.assert_array_equal(cleaned, expected)


def test_joints_that_leave_the_crop_become_invisible():
    keypoints = np.zeros((NUM_JOINTS, 3))
    keypoints[:5] = [[96, 128, 1], [0, 0, 1], [192, 256, 1], [-0.1, 5, 1], [5, 256.1, 1]]
    keypoints[5] = [50, 50, 0]
    identity = np.array([[1.0, 0, 0], [0, 1, 0]])
    points, visible = T.transform_joints(keypoints, identity, SIZE)
    assert visible.tolist() == [1, 1, 1, 0, 0] + [0] * 10
    np.testing.assert_array_equal(points[:5], keypoints[:5, :2])
    np.testing.assert_array_equal(points[5:], 0)


def spread_person():
    """All joints on whole pixels, far from one another."""
    keypoints = np.ones((NUM_JOINTS, 3))
    keypoints[:, 0] = 60 + 45 * (np.arange(NUM_JOINTS) % 5)
    keypoints[:, 1] = 50 + 55 * (np.arange(NUM_JOINTS) // 5)
    return keypoints


def test_flipping_twice_gives_picture_and_joints_back():
    keypoints = synthetic.person(3).keypoints
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (synthetic.HEIGHT, synthetic.WIDTH, 3), dtype=np.uint8)
    size = picture.shape[:2]
    identity = np.array([[1.0, 0, 0], [0, 1, 0]])
    mirror = T.flip_matrix(identity, size[1])
    once = T.warp(picture, mirror, size)
    np.testing.assert_array_equal(once, picture[:, ::-1])
    np.testing.assert_array_equal(T.warp(once, mirror, size), picture)
    np.testing.assert_array_equal(T.flip_matrix(mirror, size[1]), identity)

    points, visible = T.transform_joints(keypoints, mirror, size, flip=True)
    again, visible_again = T.transform_joints(
        np.concatenate([points, visible[:, None]], axis=1), mirror, size, flip=True
    )
    np.testing.assert_array_equal(again, keypoints[:, :2])
    np.testing.assert_array_equal(visible_again, keypoints[:, 2])


@pytest.mark.parametrize("udp", [False, True])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("rotation", [0.0, 30.0, -70.0])
def test_picture_and_joints_agree(udp, flip, rotation):
    """A dot painted at a joint is found at the transformed joint, under its mirrored name."""
    keypoints = spread_person()
    region = T.crop_region(np.array([30.0, 20, 240, 200]), SIZE)
    matrix = T.clip_matrix(T.Augmentation(region, rotation, flip), SIZE, udp=udp)
    points, visible = T.transform_joints(keypoints, matrix, SIZE, flip=flip)
    swap = dict(FLIP_PAIRS) | {b: a for a, b in FLIP_PAIRS}
    ys, xs = np.mgrid[: SIZE[0], : SIZE[1]]
    checked = 0
    for joint in range(NUM_JOINTS):
        x, y = points[joint]
        if not visible[joint] or not (9 < x < SIZE[1] - 9 and 9 < y < SIZE[0] - 9):
            continue
        painted = swap.get(joint, joint) if flip else joint
        crop = T.warp(synthetic.dot(*keypoints[painted, :2], 12), matrix, SIZE).astype(float)
        centre = (xs * crop).sum() / crop.sum(), (ys * crop).sum() / crop.sum()
        np.testing.assert_allclose(centre, (x, y), atol=0.03)
        checked += 1
    assert checked >= 5


def draws(config, count=4000):
    keypoints = spread_person()
    region = T.crop_region(np.array([30.0, 20, 240, 200]), SIZE)
    rng = np.random.default_rng(0)
    samples = [T.sample_augmentation(region, keypoints, SIZE, config, rng) for _ in range(count)]
    scale = np.array([sample.region.size[0] for sample in samples]) / region.size[0]
    return samples, scale, np.array([sample.rotation for sample in samples])


def test_paper_sampling():
    samples, scale, rotation = draws(AugmentConfig(half_body=0.0))
    assert 0.65 <= scale.min() < 0.66
    assert 1.34 < scale.max() <= 1.35
    assert -45 <= rotation.min() < -44.5
    assert 44.5 < rotation.max() <= 45
    # Uniform: the standard deviation is range / √12.
    assert abs(scale.std() - 0.7 / 12**0.5) < 0.005
    assert abs(rotation.std() - 90 / 12**0.5) < 0.7
    assert abs(np.mean([sample.flip for sample in samples]) - 0.5) < 0.03


def test_dcpose_sampling():
    _, scale, rotation = draws(AugmentConfig(sampling="dcpose", half_body=0.0))
    assert scale.min() == pytest.approx(0.65)
    assert scale.max() == pytest.approx(1.35)
    assert abs((scale <= 0.6500001).mean() - 0.1587) < 0.02  # beyond one standard deviation
    assert abs((rotation == 0).mean() - 0.4) < 0.03
    assert 45 < np.abs(rotation).max() <= 90
    assert abs(rotation[rotation != 0].std() - 43) < 2.5


@pytest.mark.parametrize(("sampling", "upper_share"), [("paper", 0.5), ("dcpose", 0.6915)])
def test_half_body(sampling, upper_share):
    config = AugmentConfig(sampling=sampling, scale=0.0, rotation=0.0)
    samples, _, _ = draws(config)
    keypoints = spread_person()
    whole = T.crop_region(np.array([30.0, 20, 240, 200]), SIZE).center
    halves = {
        upper: T.half_body_region(keypoints, SIZE, upper=upper).center for upper in (True, False)
    }
    count = {
        name: sum(np.array_equal(sample.region.center, center) for sample in samples)
        for name, center in (("upper", halves[True]), ("lower", halves[False]), ("whole", whole))
    }
    assert sum(count.values()) == len(samples)
    assert abs(count["whole"] / len(samples) - 0.7) < 0.03
    assert abs(count["upper"] / (count["upper"] + count["lower"]) - upper_share) < 0.05


def test_half_body_region_by_hand():
    keypoints = spread_person()
    region = T.half_body_region(keypoints, SIZE, upper=True)
    assert region is not None
    points = keypoints[6:, :2]
    np.testing.assert_allclose(region.center, points.mean(0))
    w, h = points.max(0) - points.min(0)  # 180 × 55, wider than 3:4
    assert (w, h) == (180, 55)
    np.testing.assert_allclose(region.size, [180 * 1.5, 240 * 1.5])


def test_half_body_guards():
    """Too few joints fall to the other half; none at all or no extent gives no region."""
    lower_only = spread_person()
    lower_only[6:, 2] = 0
    lower = T.half_body_region(lower_only, SIZE, upper=False)
    np.testing.assert_array_equal(
        T.half_body_region(lower_only, SIZE, upper=True).center, lower.center
    )
    one = np.zeros((NUM_JOINTS, 3))
    one[3] = [10, 10, 1]
    assert T.half_body_region(one, SIZE, upper=True) is None
    assert T.half_body_region(np.zeros((NUM_JOINTS, 3)), SIZE, upper=False) is None
    point = np.tile([10.0, 10.0, 1.0], (NUM_JOINTS, 1))
    assert T.half_body_region(point, SIZE, upper=True) is None


def test_few_joints_never_get_half_body():
    keypoints = spread_person()
    keypoints[8:, 2] = 0  # eight visible: not more than half_body_min_joints
    region = T.crop_region(np.array([30.0, 20, 240, 200]), SIZE)
    config = AugmentConfig(half_body=1.0)
    for seed in range(50):
        rng = np.random.default_rng(seed)
        drawn = T.sample_augmentation(region, keypoints, SIZE, config, rng)
        np.testing.assert_array_equal(drawn.region.center, region.center)


def test_normalize_clips():
    clips = torch.randint(0, 256, (2, 3, 8, 6, 3), dtype=torch.uint8)
    result = T.normalize_clips(clips)
    assert result.shape == (2, 3, 3, 8, 6)
    mean, std = torch.tensor(T.IMAGENET_MEAN), torch.tensor(T.IMAGENET_STD)
    expected = ((clips.double() / 255 - mean) / std).permute(0, 1, 4, 2, 3)
    torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=1e-6)
    assert T.normalize_clips(clips, torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(TypeError, match=r"clips: expected uint8, got torch\.float32"):
        T.normalize_clips(clips.float())
    with pytest.raises(ValueError, match=r"clips: expected \[B, T, H, W, 3\], got \(2, 3\)"):
        T.normalize_clips(torch.zeros(2, 3, dtype=torch.uint8))


def targets(x, y, visible=1.0, **options):
    centers, weight = T.heatmap_targets(
        torch.tensor([[[x, y]]]),
        torch.tensor([[visible]]),
        image_size=SIZE,
        heatmap_size=(64, 48),
        **options,
    )
    return centers[0, 0].tolist(), weight[0, 0].item()


def test_heatmap_targets_of_dcpose():
    assert targets(10.0, 20.0) == ([3.0, 5.0], 1.0)  # ⌊2.5 + 0.5⌋, ⌊5 + 0.5⌋
    assert targets(9.99, 17.99) == ([2.0, 4.0], 1.0)
    assert targets(192.0, 256.0) == ([48.0, 64.0], 1.0)
    # σ = 2: the patch reaches 6 pixels. 48 + 5 still touches column 47, 48 + 6 does not.
    assert targets(53 * 4.0, 0.0)[1] == 1
    assert targets(54 * 4.0, 0.0) == ([0.0, 0.0], 0.0)
    assert targets(-6 * 4.0, 0.0)[1] == 1
    assert targets(-7 * 4.0, 0.0)[1] == 0
    assert targets(54 * 4.0, 0.0, sigma=3.0)[1] == 1


def test_heatmap_targets_of_udp():
    (x, y), weight = targets(10.0, 20.0, udp=True)
    assert weight == 1
    assert x == pytest.approx(10 * 47 / 191)
    assert y == pytest.approx(20 * 63 / 255)


def test_heatmap_targets_of_unannotated_joints():
    assert targets(10.0, 20.0, visible=0.0) == ([0.0, 0.0], 0.0)
    assert targets(10.0, 20.0, visible=0.0, unannotated="background") == ([-1e4, -1e4], 1.0)
    assert targets(10.0, 20.0, unannotated="background") == ([3.0, 5.0], 1.0)
    with pytest.raises(ValueError, match="unannotated: 'empty' is neither"):
        targets(1.0, 1.0, unannotated="empty")
    with pytest.raises(ValueError, match=r"keypoints, visible: expected .* got \(1, 2\) and"):
        T.heatmap_targets(torch.zeros(1, 2), torch.zeros(1), image_size=SIZE, heatmap_size=(64, 48))
