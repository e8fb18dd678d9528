"""Photometric augmentation: pixels change, joints do not, and an item is the same every time."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch

from cmpose.config import AugmentConfig, DataConfig
from cmpose.data.clips import ClipDataset
from cmpose.data.photometric import change_look
from tests.data import synthetic

SIZE = (64, 48)
LIKELY = AugmentConfig(photometric=0.9)


@pytest.fixture
def scene(tmp_path):
    """A sequence of noise pictures, and its folder."""
    item = synthetic.sequence()
    shape = (synthetic.HEIGHT, synthetic.WIDTH, 3)
    for frame in item.frames:
        file = tmp_path / frame.file_name
        file.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(frame.index).integers(0, 256, shape, np.uint8)
        cv2.imwrite(str(file), noise)
    return item, tmp_path


def clips(scene, augment: AugmentConfig, train: bool = True, warp: str = "host") -> ClipDataset:
    item, root = scene
    return ClipDataset([item], root, SIZE, 3, DataConfig(augment=augment, warp=warp), train=train)


@pytest.mark.parametrize("warp", ["host", "device"])
def test_pixels_change_and_nothing_else_does(scene, warp) -> None:
    plain = clips(scene, AugmentConfig(), warp=warp)
    changed = clips(scene, LIKELY, warp=warp)
    name = "clip" if warp == "host" else "frames"
    for index in range(len(plain)):
        before, after = plain[index], changed[index]
        assert after.keys() == before.keys()
        assert after[name].dtype == torch.uint8
        assert after[name].shape == before[name].shape
        assert (after[name].float() - before[name].float()).abs().mean() > 2
        for key in before.keys() - {name}:
            assert torch.equal(before[key], after[key])


def test_an_item_depends_on_seed_epoch_and_index_only(scene) -> None:
    first, second = clips(scene, LIKELY), clips(scene, LIKELY)
    assert torch.equal(first[3]["clip"], second[3]["clip"])
    assert torch.equal(first[(5, 3)]["clip"], second[(5, 3)]["clip"])
    still = replace(LIKELY, scale=0, rotation=0, flip=0, half_body=0)  # the look alone
    assert not torch.equal(clips(scene, still)[(1, 3)]["clip"], clips(scene, still)[3]["clip"])


def test_evaluation_and_unaugmented_training_keep_their_pixels(scene) -> None:
    for augment, train in ((LIKELY, False), (replace(LIKELY, enabled=False), True)):
        actual = clips(scene, augment, train)[0]["clip"]
        assert torch.equal(actual, clips(scene, AugmentConfig(enabled=False), train)[0]["clip"])


def test_each_change_happens_as_often_as_asked() -> None:
    """A grey clip: at 0 it stays; at 1 it always changes; at 0.5, six times out of all, never."""
    clip = np.full((1, 8, 6, 3), 100, np.uint8)
    rng = np.random.default_rng(0)
    assert (change_look(clip, 0.0, rng) == clip).all()
    changed = [(change_look(clip, 1.0, rng) != clip).any() for _ in range(50)]
    assert all(changed)
    # Saturation, texture and blur leave an even grey; light, tone and noise do not.
    unchanged = [(change_look(clip, 0.5, rng) == clip).all() for _ in range(1200)]
    assert sum(unchanged) == pytest.approx(1200 * 0.5**3, abs=4 * (1200 / 8 * 7 / 8) ** 0.5)


def test_shapes_stay_where_they_are() -> None:
    """The middle of an edge between dark and bright halves moves by less than two pixels."""
    clip = np.full((2, 64, 48, 3), 40, np.uint8)
    clip[:, :, 24:] = 200
    for seed in range(40):
        changed = change_look(clip, 0.5, np.random.default_rng(seed)).astype(float)
        steps = np.abs(np.diff(changed.mean(axis=(0, 1, 3))[4:-4])) ** 2
        middle = (steps * (np.arange(len(steps)) + 4.5)).sum() / steps.sum()
        assert abs(middle - 23.5) < 2


@pytest.mark.parametrize("chance", [-0.1, 1.5])
def test_a_probability_is_one(scene, chance) -> None:
    with pytest.raises(ValueError, match=rf"data\.augment\.photometric: {chance} is no probab"):
        clips(scene, AugmentConfig(photometric=chance))
