"""Records: what is kept, and what is refused."""

from __future__ import annotations

import base64
import json

import cv2
import numpy as np
import pytest

from cmpose.data.skeleton import JOINTS, LIMBS
from cmpose.viz.record import RecordError, heatmap_alpha, read_record, write_record
from tests.viz.samples import N, record


def picture(uri: str) -> np.ndarray:
    data = np.frombuffer(base64.b64decode(uri.partition(",")[2]), np.uint8)
    return cv2.imdecode(data, cv2.IMREAD_UNCHANGED)


def test_a_record_comes_back(tmp_path):
    path = tmp_path / "new" / "clip.json"
    expected = record(1)
    write_record(path, expected)
    assert read_record(path) == expected
    assert [p.name for p in path.parent.iterdir()] == ["clip.json"]  # nothing temporary
    assert expected["joints"] == list(JOINTS)
    assert expected["limbs"] == [list(limb) for limb in LIMBS]
    assert expected["truth"][3] is None
    assert picture(expected["crop"]).shape == (128, 96, 3)
    sheet = picture(expected["heatmaps"]["sheet"])
    assert sheet.shape == (15 * 32, 24, 4)
    assert (sheet[..., :3] == 255).all()
    for j, (x, y) in enumerate(expected["keypoints"]):  # every heatmap peaks at its joint
        own = sheet[32 * j : 32 * (j + 1), :, 3]
        row, column = np.unravel_index(own.argmax(), own.shape)
        assert abs(4 * column - x) <= 4
        assert abs(4 * row - y) <= 4
    tokens = expected["tokens"]
    assert sorted(tokens["causal"] + tokens["noncausal"]) == list(range(N))
    assert len(tokens["scores"]) == 15
    assert path.stat().st_size < 60_000


def test_how_opaque_heatmaps_are():
    maps = np.zeros((3, 2, 4), np.float32)
    maps[0, 0, :2] = 1.0, 0.25
    maps[1, 0, 0] = 0.15  # half of 0.3, the least that weak ones are scaled to
    maps[2] = -1.0
    alpha = heatmap_alpha(maps)
    assert alpha[0].tolist() == [[230, 115, 0, 0], [0, 0, 0, 0]]
    assert alpha[1, 0, 0] == int(230 * np.sqrt(0.5))
    assert alpha[2].max() == 0
    assert heatmap_alpha(np.zeros((1, 2, 2))).max() == 0


def test_a_dead_heatmap_does_not_flood_the_picture():
    """Where nothing stands out, of one keypoint or of all, nothing is painted."""
    noise = np.random.default_rng(0).normal(0, 1, (2, 32, 24))
    dead = 0.02 + 0.004 * noise
    assert heatmap_alpha(dead).max() == 0
    grey = 0.4 + 0.004 * noise  # a level all over is no maximum either
    assert heatmap_alpha(grey).max() == 0
    grey[0, 10, 10] = 0.9
    alpha = heatmap_alpha(grey)
    assert alpha[0, 10, 10] == 230
    assert (alpha > 0).sum() == 1


def changed(**changes):
    example = record(1)
    for name, value in changes.items():
        part, _, key = name.partition("__")
        if key:
            example[part][key] = value
        else:
            example[part] = value
    return json.dumps(example)


BAD = {
    "no JSON": (
        "{",
        r"clip\.json: not valid JSON at line 1, .*; write it again with cmpose predict",
    ),
    "a list": ("[]", r"clip\.json: version None, this cmpose reads 1"),
    "another version": (changed(version=9), r"clip\.json: version 9, this cmpose reads 1"),
    "a field is missing": (
        '{"version": 1}',
        r"clip\.json: missing key 'title'; it has \['version'\]; write it again",
    ),
    "a wrong length": (changed(scores=[1.0]), "scores has 1 entries, joints 15"),
    "a limb of nothing": (changed(limbs=[[0, 15]] * 16), "limbs name a joint that is not there"),
    "limbs without colours": (changed(limb_colors=[]), "limbs and limb_colors differ"),
    "a token outside": (changed(tokens__causal=[N]), "tokens.causal leaves its grid of 8 × 6"),
    "clusters of others": (changed(tokens__assignment=[0]), "differ in length"),
    "a cluster of nothing": (changed(tokens__cluster_colors=[]), "names a cluster that is not"),
    "a picture elsewhere": (changed(crop="crop.jpg"), "crop is no data:image/ URI"),
    "an empty crop": (changed(size=[0, 96]), "an empty size"),
}


@pytest.mark.parametrize("case", BAD)
def test_broken_records_are_named(case, tmp_path):
    text, message = BAD[case]
    (tmp_path / "clip.json").write_text(text)
    with pytest.raises(RecordError, match=message):
        read_record(tmp_path / "clip.json")
