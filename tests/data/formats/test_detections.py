"""Detection files of DCPose and mmpose."""

from __future__ import annotations

import numpy as np
import pytest

from cmpose.data.formats.posetrack import AnnotationError, load_annotations, load_detections
from tests.data import synthetic
from tests.shared_data import shared_data

STEM = "000007_mpii_test"


def box(**fields):
    return {"bbox": [10, 20, 30, 40], "score": 0.9, "category_id": 1} | fields


def load(tmp_path, entries, **options):
    path = synthetic.write_json(tmp_path / "boxes.json", entries)
    return load_detections(path, [synthetic.sequence()], **options)


def test_frames_by_id_name_and_tail(tmp_path):
    result = load(
        tmp_path,
        [
            box(image_id=10_000_070_001),
            box(image_name=f"images/val/{STEM}/000002.jpg", nframes=4, frame_id=2),
            box(image_name=f"/data/pt18/{STEM}/000002.jpg", bbox=[1.5, 2, 3, 4]),
        ],
    )
    assert result.name == "boxes.json"
    assert list(result.boxes) == [(STEM, 10_000_070_001), (STEM, 10_000_070_002)]
    first, second = result.boxes[STEM, 10_000_070_002]
    np.testing.assert_array_equal(first.box, [10, 20, 30, 40])
    np.testing.assert_array_equal(second.box, [1.5, 2, 3, 4])
    assert first.score == 0.9
    assert not result.dropped


def test_what_is_dropped_is_counted(tmp_path):
    image_id = 10_000_070_001
    entries = [
        box(image_id=image_id, score=0.19),
        box(image_id=image_id, score=0.2),
        box(image_id=image_id, category_id=3),
        box(image_id=99),
    ]
    result = load(tmp_path, entries, threshold=0.2)
    assert [each.score for each in result.boxes[STEM, image_id]] == [0.2]
    assert result.dropped == {
        "score below 0.2": 1,
        "not a person (category_id)": 1,
        "frame not in the annotations": 1,
    }


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (5, r"\[1\]: expected an object, got 5"),
        ({"score": 1}, r"\[1\]: missing key 'bbox'"),
        ({"bbox": [1, 2, 3, 4]}, r"\[1\]: missing key 'score'"),
        (box(), r"\[1\]: has neither 'image_id' nor 'image_name'"),
        (box(image_id=1, bbox=[1, 2, -3, 4]), r"\[1\]\.bbox: negative size"),
        (box(image_id=1, bbox=[1, 2, float("nan"), 4]), r"\[1\]\.bbox\[2\]: expected a finite"),
        (box(image_id=1, score=None), r"\[1\]\.score: expected a number, got None"),
        (box(image_id="x"), r"\[1\]\.image_id: expected an integer, got 'x'"),
    ],
)
def test_broken_entries(tmp_path, entry, message):
    entries = [box(image_id=10_000_070_001), entry]
    with pytest.raises(AnnotationError, match=r"boxes\.json: " + message):
        load(tmp_path, entries)
    assert load(tmp_path, entries, on_error="skip").dropped == {"broken detection": 1}


def test_no_detection_matches(tmp_path):
    message = (
        r"none of the 2 detections belongs to a frame of the annotations: the file has e\.g\. 5, "
        r"the annotations image_id 10000070000, image_name 'images/val/000007_mpii_test/000000"
    )
    with pytest.raises(AnnotationError, match=message):
        load(tmp_path, [box(image_id=5), box(image_id=6)])
    with pytest.raises(AnnotationError, match=r"e\.g\. 'a/000009\.jpg', the annotations"):
        load(tmp_path, [box(image_name="a/000009.jpg")])


def test_empty_missing_and_malformed(tmp_path):
    with pytest.raises(AnnotationError, match=r"boxes\.json: holds no detections"):
        load(tmp_path, [])
    with pytest.raises(
        AnnotationError, match=r"boxes\.json: expected a list, got {'images': \[\]}"
    ):
        load(tmp_path, {"images": []})
    with pytest.raises(FileNotFoundError, match=r"no\.json: no such detection file"):
        load_detections(tmp_path / "no.json", [])


def test_ambiguous_id(tmp_path):
    path = synthetic.write_json(tmp_path / "boxes.json", [box(image_id=10_000_070_001)])
    sequences = [synthetic.sequence(), synthetic.sequence("000008_mpii_test")]
    message = r"\[0\]: 10000070001 is the name of 2 frames, e\.g\. .*000007.* and .*000008"
    with pytest.raises(AnnotationError, match=message):
        load_detections(path, sequences)


@pytest.mark.shared_data
def test_real_detections():
    root = shared_data("posetrack18")
    sequences = load_annotations("annotations/val", root)
    for threshold, count in ((0.0, 278), (0.2, 186), (0.4, 88)):
        path = root / "annotations" / "val_detections.json"
        result = load_detections(path, sequences, threshold)
        assert sum(map(len, result.boxes.values())) == count
        assert sum(result.dropped.values()) == 278 - count
