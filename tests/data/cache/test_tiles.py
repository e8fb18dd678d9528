"""What a cache must hold: every pixel that any augmentation samples, and little else."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from cmpose.config import AugmentConfig, DataConfig
from cmpose.data.cache.tiles import clip_window, merge, plan_tiles, shrink_factor
from cmpose.data.cutouts import Window, sampled_window, shrink, shrunk_matrix
from cmpose.data.pictures import shrunk_size
from cmpose.data.records import ClipRecord
from cmpose.data.transforms import (
    Augmentation,
    Region,
    apply_matrix,
    clip_matrix,
    crop_region,
    sample_augmentation,
)
from tests.data import synthetic

SIZE = (64, 48)
PICTURE = (320, 240)


def record(rng: np.random.Generator, files: tuple[str, ...] = ("a",)) -> ClipRecord:
    """Anywhere in the picture, small or large, some joints outside of the box and the picture."""
    corner, sides = rng.uniform(0, (300, 220)), rng.uniform(2, (300, 230))
    who = synthetic.person(int(rng.integers(1 << 30)))
    who.keypoints[:, :2] = corner + rng.uniform(-0.5, 1.5, (15, 2)) * sides
    item = synthetic.sequence(indices=(0,), people=1)
    box = np.concatenate([corner, sides])
    return ClipRecord(item, item.frames[0], who, box, 1.0, "", files, PICTURE)


@pytest.mark.parametrize("detail", [0.0, 0.5])
@pytest.mark.parametrize("udp", [False, True])
@pytest.mark.parametrize(
    "augment",
    [
        AugmentConfig(),
        AugmentConfig(sampling="dcpose", rotation=15.0, half_body=1.0),
        AugmentConfig(rotation=180.0, half_body=1.0, half_body_min_joints=3),
        AugmentConfig(enabled=False),
    ],
    ids=["paper", "dcpose", "turned", "plain"],
)
def test_whatever_is_drawn_is_in_the_window(augment, udp, detail):
    rng = np.random.default_rng(3)
    data = DataConfig(augment=augment, udp=udp, cache_detail=detail)
    shrunk = 0
    for _ in range(30):
        clip = record(rng)
        region = crop_region(clip.box, SIZE, data.box_enlarge)
        cached = clip_window(clip, SIZE, data, train=True)
        factor = shrink_factor(clip, SIZE, data)
        size = shrunk_size(PICTURE, factor)
        shrunk += factor > 1
        assert 0 <= cached.left < cached.right <= size[0]
        assert 0 <= cached.top < cached.bottom <= size[1]
        for _ in range(40):
            drawn = Augmentation(region)
            if augment.enabled:
                drawn = sample_augmentation(region, clip.person.keypoints, SIZE, augment, rng)
            matrix = shrunk_matrix(clip_matrix(drawn, SIZE, udp=udp), factor)
            window = sampled_window(matrix, SIZE, size)
            if window.left >= size[0] or window.right <= 0:
                continue  # nothing of the picture shows
            assert cached.left <= max(window.left, 0)
            assert min(window.right, size[0]) <= cached.right
            assert cached.top <= window.top < window.bottom <= cached.bottom
    assert shrunk > 5 or detail == 0


@pytest.mark.parametrize("rotation", [10.0, 45.0, 90.0])
def test_the_window_is_no_larger_than_what_can_be_drawn(rotation):
    """Against the strongest scale at every angle, within the few pixels of its margin."""
    augment = AugmentConfig(rotation=rotation, half_body=0.0)
    data = DataConfig(augment=augment)
    clip = dataclasses.replace(
        record(np.random.default_rng(0)), box=np.array([900.0, 700, 300, 420]),
        picture_size=(4000, 3000),
    )  # fmt: skip
    cached = clip_window(clip, SIZE, data, train=True)
    region = crop_region(clip.box, SIZE, data.box_enlarge)
    largest = Region(region.center, region.size * 1.35)
    windows = [
        sampled_window(clip_matrix(Augmentation(largest, angle), SIZE), SIZE, (4000, 3000))
        for angle in np.linspace(-rotation, rotation, 181)
    ]
    # A crop's last pixel lies a crop pixel inside of its region: 12 picture pixels here.
    assert 0 <= min(w.left for w in windows) - cached.left < 16
    assert 0 <= min(w.top for w in windows) - cached.top < 16
    assert 0 <= cached.right - max(w.right for w in windows) < 16
    assert 0 <= cached.bottom - max(w.bottom for w in windows) < 16


def area(window: Window) -> int:
    return (window.right - window.left) * (window.bottom - window.top)


@pytest.mark.parametrize("form", ["raw", "jpeg"])
def test_tiles_hold_every_window_and_cost_no_more(form):
    rng = np.random.default_rng(1)
    merged = 0
    for _ in range(200):
        windows = []
        for _ in range(rng.integers(1, 9)):
            left, top = rng.integers(0, (300, 220))
            windows.append(Window(left, top, *(rng.integers((left, top), PICTURE) + 1)))
        tiles = merge(windows, PICTURE, form)
        for w in windows:
            assert any(
                t.left <= w.left and t.top <= w.top and w.right <= t.right and w.bottom <= t.bottom
                for t in tiles
            )
        merged += len(tiles) < len(windows)
        if form == "raw":
            assert sum(map(area, tiles)) <= min(sum(map(area, windows)), 320 * 240)
    assert merged > 50


def test_a_jpeg_tile_is_hardly_larger_than_what_is_read_of_it():
    person, next_frame, other = (
        Window(10, 10, 110, 110), Window(14, 12, 114, 112), Window(60, 10, 160, 110),
    )  # fmt: skip
    assert merge([person, next_frame], PICTURE, "jpeg") == (Window(10, 10, 114, 112),)
    assert len(merge([person, other], PICTURE, "jpeg")) == 2
    assert len(merge([person, other], PICTURE, "raw")) == 1


def test_consecutive_clips_and_people_share_tiles():
    rng = np.random.default_rng(0)
    near = [dataclasses.replace(record(rng, ("a", "b")), box=np.array([100.0 + i, 80, 30, 40]))
            for i in range(3)]  # fmt: skip
    far = dataclasses.replace(record(rng, ("b", "c")), box=np.array([10.0, 10, 6, 8]))
    frames = plan_tiles(
        [*near, far],
        SIZE,
        DataConfig(augment=AugmentConfig(half_body=0.0)),
        train=True,
        format="raw",
    )
    assert [(frame.file, len(frame.windows)) for frame in frames] == [("a", 1), ("b", 2), ("c", 1)]


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_shrunk_pictures(factor):
    """Means of blocks; where a point of the picture lies in them; the last block may be cut."""
    rng = np.random.default_rng(0)
    picture = rng.integers(0, 256, (7, 11, 3)).astype(np.uint8)
    width, height = shrunk_size((11, 7), factor)
    whole = shrink(picture, Window(0, 0, width, height), factor)
    assert whole.shape == (height, width, 3)
    block = picture[factor : 2 * factor, 2 * factor : 3 * factor].mean((0, 1))
    np.testing.assert_allclose(whole[1, 2], block, atol=0.5)
    last = picture[(height - 1) * factor :, (width - 1) * factor :]
    if factor == 2:  # one pixel, repeated
        np.testing.assert_array_equal(whole[-1, -1], last[0, 0])
    part = shrink(picture, Window(1, 1, width, height), factor)
    np.testing.assert_array_equal(part, whole[1:, 1:])

    matrix = np.array([[0.7, 0.2, 3.0], [-0.1, 0.9, -2.0]])
    center = np.array([2 * factor, 1 * factor]) + (factor - 1) / 2  # of the block above
    np.testing.assert_allclose(
        apply_matrix(shrunk_matrix(matrix, factor), np.array([2.0, 1.0])),
        apply_matrix(matrix, center),
    )


def test_people_are_shrunk_to_no_less_than_the_detail():
    rng = np.random.default_rng(0)
    factors = set()
    for _ in range(50):
        clip = record(rng)
        data = DataConfig(cache_detail=0.75)
        factor = shrink_factor(clip, SIZE, data)
        height = crop_region(clip.box, SIZE, data.box_enlarge).size[1]
        assert factor == 1 or height / factor >= 0.75 * SIZE[0]
        assert height / (factor + 1) < 0.75 * SIZE[0]
        assert shrink_factor(clip, SIZE, DataConfig()) == 1
        factors.add(factor)
    assert {1, 2, 3} <= factors
