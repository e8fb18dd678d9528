"""Broken annotation files: the message names file, field and value."""

from __future__ import annotations

import re
from typing import Any

import pytest

from cmpose.data.formats.posetrack import AnnotationError, load_annotations
from cmpose.data.skeleton import SLOTS17
from tests.data import synthetic


def _set(document: Any, path: tuple[Any, ...], value: Any) -> None:
    for key in path[:-1]:
        document = document[key]
    if value is None:
        del document[path[-1]]
    else:
        document[path[-1]] = value


NAN = float("nan")
COCO = [
    (("images",), None, r"neither 'annolist' \(PoseTrack17\) nor 'images'"),
    (("annotations",), None, r": missing key 'annotations'"),
    (("images",), 3, r": images: expected a list, got 3"),
    (("images", 1), [], r": images\[1\]: expected an object, got \[\]"),
    (("images", 1, "id"), None, r": images\[1\]: missing key 'id'"),
    (("images", 1, "id"), "7", r": images\[1\]\.id: expected an integer, got '7'"),
    (("images", 1, "id"), 10000070000, r": images\[1\]\.id: 10000070000 occurs twice"),
    (("images", 1, "file_name"), None, r": images\[1\]: missing key 'file_name'"),
    (("images", 1, "file_name"), "a/b.jpg", r"images\[1\]\.file_name: 'a/b\.jpg' holds no frame"),
    (
        ("images", 1, "file_name"),
        "images/val/000007_mpii_test/000000.png",
        r"file_name: frame 0 of sequence 000007_mpii_test occurs twice",
    ),
    (("images", 1, "is_labeled"), "yes", r"images\[1\]\.is_labeled: expected true or false"),
    (("images", 1, "width"), 0, r"images\[1\]\.width: expected a positive size, got 0"),
    (
        ("images", 0, "nframes"),
        3,
        r"images\[1\]\.nframes: 4, but the sequence's other frames say 3",
    ),
    (("images", 0, "nframes"), 0, r"images\[0\]\.nframes: expected at least 1, got 0"),
    (("images", 2, "ignore_regions_x"), [], r"ignore_regions_x: 0 polygons, but ignore_regions_y"),
    (
        ("images", 2, "ignore_regions_y", 0),
        [1],
        r"ignore_regions_y\[0\]: expected 3 numbers, got 1",
    ),
    (("annotations", 2), 5, r": annotations\[2\]: expected an object, got 5"),
    (("annotations", 2, "image_id"), None, r": annotations\[2\]: missing key 'image_id'"),
    (("annotations", 2, "image_id"), 5, r"annotations\[2\]\.image_id: 5 is not among the file's"),
    (
        ("categories", 0),
        {"id": 1, "keypoints": ["nose", "left_eye"]},
        r"categories\[\*\]\.keypoints: no right_ankle, .* among \['nose', 'left_eye'\]",
    ),
]
PEOPLE = [
    (
        ("bbox",),
        [1, 2, -3, 4],
        r"bbox: negative size in \[x, y, width, height\] = \[1\.0, 2\.0, -3",
    ),
    (("bbox",), [1, 2, 3], r"bbox: expected 4 numbers, got 3"),
    (("bbox",), [1, 2, NAN, 4], r"bbox\[2\]: expected a finite number, got nan"),
    (("bbox",), "1 2 3 4", r"bbox: expected a list, got '1 2 3 4'"),
    (("bbox_head",), [1, 2, 3, -4], r"bbox_head: negative size"),
    (("keypoints",), [1.0] * 50, r"keypoints: expected 51 numbers, got 50"),
    (("keypoints", 4), NAN, r"keypoints\[4\]: expected a finite number, got nan"),
    (("keypoints", 4), "x", r"keypoints\[4\]: expected a number, got 'x'"),
    (("keypoints", 2), -1, r"keypoints: visibility -1 of nose; it must be 0"),
    (("track_id",), 0.5, r"track_id: expected an integer, got 0\.5"),
    (("scores",), [0.5], r"scores: expected 17 numbers, got 1"),
    (("score",), "high", r"score: expected a number, got 'high'"),
]


@pytest.mark.parametrize(("path", "value", "message"), COCO)
def test_broken_file(tmp_path, path, value, message):
    document = synthetic.posetrack18(synthetic.sequence())
    _set(document, path, value)
    file = synthetic.write_json(tmp_path / "000007_mpii_test.json", document)
    for on_error in ("raise", "skip"):
        with pytest.raises(AnnotationError, match=message) as info:
            load_annotations(file, on_error=on_error)
        assert str(file) in str(info.value)


@pytest.mark.parametrize(("path", "value", "message"), PEOPLE)
def test_broken_person(tmp_path, path, value, message):
    document = synthetic.posetrack18(synthetic.sequence())
    _set(document, ("annotations", 3, *path), value)
    file = synthetic.write_json(tmp_path / "000007_mpii_test.json", document)
    with pytest.raises(AnnotationError, match=message) as info:
        load_annotations(file)
    assert str(info.value).startswith(f"{file}: annotations[3].")
    (read,) = load_annotations(file, on_error="skip")
    assert [len(frame.people) for frame in read.frames] == [2, 1, 2, 2]
    assert read.skipped == {"broken annotation": 1}


def test_person_without_box_and_keypoints(tmp_path):
    document = synthetic.posetrack18(synthetic.sequence())
    del document["annotations"][0]["bbox"], document["annotations"][0]["keypoints"]
    file = synthetic.write_json(tmp_path / "a.json", document)
    with pytest.raises(
        AnnotationError, match=r"annotations\[0\]: has neither 'bbox' nor annotated"
    ):
        load_annotations(file)


POINT = ("annolist", 1, "annorect", 0, "annopoints", 0, "point")
ANNOLIST = [
    (("annolist",), {}, r": annolist: expected a list, got {}", False),
    (("annolist", 1, "image"), None, r": annolist\[1\]: missing key 'image'", False),
    (("annolist", 1, "image"), [], r"annolist\[1\]\.image: expected one value, got 0", False),
    (("annolist", 1, "image", 0, "name"), None, r"\[1\]\.image: missing key 'name'", False),
    (
        ("annolist", 1, "image", 0, "name"),
        "images/other/00000002.jpg",
        r"image\.name: frames lie in 2 folders",
        False,
    ),
    (
        ("annolist", 1, "ignore_regions", 0, "point", 2, "y"),
        [],
        r"ignore_regions\[0\]\.point\.y: expected one value, got 0: \[\]",
        False,
    ),
    (("annolist", 1, "annorect", 0), 7, r"annorect\[0\]: expected an object, got 7", True),
    ((*POINT, 1, "id"), [15], r"point\[1\]\.id: 15 is no joint; ids run from 0", True),
    ((*POINT, 1, "id"), [0], r"point\[1\]\.id: joint 0 \(right_ankle\) occurs twice", True),
    ((*POINT, 1, "x"), [NAN], r"point\[1\]\.x\[0\]: expected a finite number", True),
    ((*POINT, 1, "x"), None, r"point\[1\]: missing key 'x'", True),
    (("annolist", 1, "annorect", 0, "y2"), None, r"annorect\[0\]: missing key 'y2'", True),
    (
        ("annolist", 1, "annorect", 0, "track_id"),
        ["a"],
        r"track_id\[0\]: expected an integer, got 'a'",
        True,
    ),
]


@pytest.mark.parametrize(("path", "value", "message", "skippable"), ANNOLIST)
def test_broken_annolist(tmp_path, path, value, message, skippable):
    item = synthetic.sequence("000342_mpii", (1, 2, 3), digits=8)
    document = synthetic.annolist(item)
    _set(document, path, value)
    file = synthetic.write_json(tmp_path / "000342_mpii.json", document)
    with pytest.raises(AnnotationError, match=message) as info:
        load_annotations(file)
    assert str(info.value).startswith(f"{file}: annolist")
    if skippable:
        (read,) = load_annotations(file, on_error="skip")
        assert read.skipped == {"broken annotation": 1}
    else:
        with pytest.raises(AnnotationError, match=message):
            load_annotations(file, on_error="skip")


def test_malformed_json(tmp_path):
    file = tmp_path / "a.json"
    file.write_text('{"images": [\n1, }')
    message = re.escape(f"{file}: not valid JSON at line 2, column 4")
    with pytest.raises(AnnotationError, match=message):
        load_annotations(file)
    file.write_bytes(b"\xff\xfe\x00\xd8{")
    with pytest.raises(
        AnnotationError,
        match=r"a\.json: not valid utf-16-le text at byte 2 \(0x00\): save it as UTF-8",
    ):
        load_annotations(file)


def test_wrong_kind_of_file(tmp_path):
    file = synthetic.write_json(tmp_path / "boxes.json", [{"bbox": [0, 0, 1, 1]}])
    with pytest.raises(AnnotationError, match=r"a detection file belongs in data\.boxes"):
        load_annotations(file)
    item = synthetic.sequence()
    file = synthetic.write_json(tmp_path / "a.json", synthetic.posetrack18(item))
    with pytest.raises(
        AnnotationError, match=r"format 'posetrack17' was asked for, but .*'images'"
    ):
        load_annotations(file, format="posetrack17")
    file = synthetic.write_json(tmp_path / "b.json", synthetic.annolist(item))
    with pytest.raises(AnnotationError, match=r"format 'coco' was asked for, but .*'annolist'"):
        load_annotations(file, format="coco")


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere: no such file or folder"):
        load_annotations("nowhere", tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty: holds no \*\.json files"):
        load_annotations("empty", tmp_path)


def test_the_same_sequence_twice(tmp_path):
    item = synthetic.sequence()
    other = synthetic.sequence("000008_mpii_test")
    for frame in other.frames:
        frame.image_id += 10_000
    synthetic.write_json(tmp_path / "000007_mpii_test.json", synthetic.posetrack18(item))
    synthetic.write_json(tmp_path / "merged.json", synthetic.detect_and_track(item, other))
    with pytest.raises(AnnotationError, match=r"merged\.json: sequence '000007_mpii_test' is also"):
        load_annotations(tmp_path)


def test_more_frames_than_nframes(tmp_path):
    item = synthetic.sequence()
    item.nframes = 3
    file = synthetic.write_json(tmp_path / "a.json", synthetic.posetrack18(item))
    with pytest.raises(AnnotationError, match="lists 4 frames, more than its nframes 3"):
        load_annotations(file)


def test_cocos_own_file_is_no_data_set(tmp_path):
    names = list(SLOTS17)
    names[1:3] = ["left_eye", "right_eye"]
    document = {
        "images": [{"id": 1, "file_name": "000000000785.jpg", "width": 64, "height": 48}],
        "annotations": [],
        "categories": [{"id": 1, "name": "person", "keypoints": names}],
    }
    file = synthetic.write_json(tmp_path / "coco.json", document)
    with pytest.raises(AnnotationError, match=r"COCO's 17 keypoints, eyes .* cmpose convert"):
        load_annotations(file)


def test_two_skeletons_are_no_data_set(tmp_path):
    for name in ("a", "b"):
        document = synthetic.posetrack18(synthetic.sequence(name=f"00000{len(name)}_{name}"))
        category = {"id": 1, "keypoints": [f"{name}{j}" for j in range(17)], "flip_pairs": []}
        document["categories"] = [category]
        synthetic.write_json(tmp_path / f"{name}.json", document)
    with pytest.raises(
        AnnotationError, match=r"b\.json: categories.*17 keypoints \(b0, b1, b2, b3, \.\.\.\), but "
    ):
        load_annotations(tmp_path)
