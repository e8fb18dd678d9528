"""data.reduced_decode: frames that are decoded at a part of their size, and crops of them."""

from __future__ import annotations

import dataclasses

import cv2
import numpy as np
import pytest
import torch

from cmpose.config import AugmentConfig, DataConfig
from cmpose.data.clips import ClipDataset
from cmpose.data.cutouts import reduced_factor
from cmpose.data.frames import read_frame
from cmpose.data.pictures import FrameError, read_picture, read_with_header, shrink_picture
from cmpose.data.sequence import Frame, Sequence
from cmpose.data.transforms import apply_matrix
from tests.data import synthetic
from tests.data.test_frames import with_tag

SIZE = (64, 48)
PLAIN = DataConfig(augment=AugmentConfig(enabled=False), warp="host")
REDUCED = dataclasses.replace(PLAIN, reduced_decode=True)


def scene(root, factor, ending="jpg"):
    """A person in the lower right corner of a picture, with three dots of light: sequence, dots.

    The picture's sides are no multiples of the factor. The crop is factor + 1/2 times smaller.
    """
    width, height = 190 * factor + 1, 130 * factor + 1
    tall = 64 * (factor + 0.5) / PLAIN.box_enlarge
    box = np.array([width - tall * 0.7, height - tall, tall * 0.6, tall])
    dots = np.array([box[:2] + box[2:] * at for at in ((0.3, 0.2), (0.75, 0.4), (0.85, 0.8))])
    xs, ys = np.arange(width), np.arange(height)[:, None]
    light = sum(np.exp(-((xs - x) ** 2 + (ys - y) ** 2) / (2 * (2 * factor) ** 2)) for x, y in dots)
    name = f"0.{ending}"
    picture = np.rint(220 * light).astype(np.uint8)
    assert cv2.imwrite(str(root / name), cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR))
    keypoints = np.zeros((15, 3))
    keypoints[:3] = [(x, y, 1) for x, y in dots]
    person = dataclasses.replace(synthetic.person(), box=box, keypoints=keypoints)
    frame = Frame(1, name, 0, people=[person], width=width, height=height)
    return Sequence(name="one", file_stem="one", frames=[frame], nframes=1), dots


def clips_of(root, sequence, data):
    return ClipDataset([sequence], root, SIZE, 1, data, train=True)


def centers(crop, expected):
    """Centres of the light around each expected place, in pixels of the crop."""
    ys, xs = np.mgrid[: SIZE[0], : SIZE[1]]
    results = []
    for x, y in expected:
        near = crop * (np.hypot(xs - x, ys - y) < 6)
        results.append(np.array([(xs * near).sum(), (ys * near).sum()]) / near.sum())
    return np.array(results)


@pytest.mark.parametrize(("factor", "ending"), [(2, "jpg"), (4, "jpg"), (8, "jpg"), (4, "png")])
def test_nothing_is_shifted(tmp_path, factor, ending):
    """To 0.05 pixels of the crop: without its half pixel the map would be 0.2 to 0.4 beside it."""
    sequence, dots = scene(tmp_path, factor, ending)
    item = clips_of(tmp_path, sequence, REDUCED)[0]
    matrix = item["matrix"].numpy()
    assert reduced_factor(matrix) == factor
    full = clips_of(tmp_path, sequence, PLAIN)[0]["clip"]
    expected = apply_matrix(matrix, dots)
    for clip in (full, item["clip"]):
        assert np.abs(centers(clip[0, ..., 0].numpy(), expected) - expected).max() < 0.05
    assert 0 < (full.int() - item["clip"].int()).abs().max() < 30

    # The device's cut-outs are of the reduced frame too, and show the same.
    cut = clips_of(tmp_path, sequence, dataclasses.replace(REDUCED, warp="device"))[0]
    assert torch.equal(cut["matrix"], item["matrix"])
    crop = cv2.warpAffine(cut["frames"][0].numpy(), cut["frames_matrix"].numpy(), SIZE[::-1])
    assert np.abs(crop.astype(int) - item["clip"][0].numpy()).max() <= 3
    assert cut["frames"].shape[1] <= 130 + 1


def test_the_factor_never_takes_detail_from_the_crop():
    def factor(enlarged, turn=0.0):
        cos, sin = enlarged * np.cos(turn), enlarged * np.sin(turn)
        return reduced_factor(np.array([[cos, sin, 5.0], [-sin, cos, 7.0]]))

    sizes = (2.0, 1.0, 0.51, 0.5, 0.26, 0.25, 0.13, 0.125, 0.01)
    assert [factor(size) for size in sizes] == [1, 1, 1, 2, 2, 4, 4, 8, 8]
    assert factor(0.49, 0.8) == 2, "a turned crop needs no more"
    assert reduced_factor(np.array([[0.3, 0.0, 0.0], [0.0, 0.6, 0.0]])) == 1, (
        "its finer side counts"
    )


def test_a_turned_picture_is_shrunk_once_it_is_upright(tmp_path):
    path = tmp_path / "a.jpg"
    rng = np.random.default_rng(0)
    cv2.imwrite(str(path), cv2.blur(rng.integers(0, 256, (61, 83, 3), dtype=np.uint8), (9, 9)))
    with_tag(path, 6)
    reduced, header = read_with_header(path, 2)
    assert (header.size, reduced.shape) == ((61, 83), (42, 31, 3))
    assert (reduced == shrink_picture(read_picture(path), 2)).all()


def test_sizes_are_compared_exactly(tmp_path):
    """A frame that is one pixel too wide shrinks to the same size."""
    path = tmp_path / "a.jpg"
    synthetic.write_picture(path, 3, (31, 40))
    assert read_frame(str(path), (31, 40), "x", 2).shape == (20, 16, 3)
    with pytest.raises(FrameError, match=r"a\.jpg: is 31×40 pixels, but x or .* say 32×40"):
        read_frame(str(path), (32, 40), "x", 2)


def test_a_run_knows_which_pixels_it_was_trained_on(tmp_path):
    sequence, _ = scene(tmp_path, 2)
    assert clips_of(tmp_path, sequence, PLAIN).pixels == "frames"
    assert clips_of(tmp_path, sequence, REDUCED).pixels == "frames decoded at reduced scale"
