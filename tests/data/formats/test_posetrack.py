"""Every PoseTrack format becomes the same sequences."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cmpose.data.formats.posetrack import (
    AnnotationError,
    describe,
    load_annotations,
    posetrack18_image_id,
    validate,
    write_posetrack18,
)
from cmpose.data.sequence import box_of_keypoints
from cmpose.data.skeleton import JOINTS, SLOTS17
from tests.data import synthetic
from tests.shared_data import shared_data


@pytest.mark.parametrize("document", [synthetic.posetrack18, synthetic.posetrack21])
def test_posetrack18_and_21(tmp_path, document):
    truth = synthetic.sequence()
    synthetic.write_json(tmp_path / "val" / f"{truth.name}.json", document(truth))
    (read,) = load_annotations("val", tmp_path)
    synthetic.assert_same_people(read, truth)
    assert (read.name, read.file_stem, read.nframes) == (truth.name, truth.name, 4)
    assert [frame.image_id for frame in read.frames] == [f.image_id for f in truth.frames]
    np.testing.assert_array_equal(
        read.frames[0].ignore_regions[0], truth.frames[0].ignore_regions[0]
    )
    assert read.frames[0].width is None
    person_id = read.frames[0].people[1].person_id
    assert person_id == (501 if document is synthetic.posetrack21 else None)


def test_posetrack21_boxes_without_keypoints(tmp_path):
    truth = synthetic.sequence()
    document = synthetic.posetrack21(truth)
    document["annotations"][0].pop("keypoints")
    document["annotations"][1]["keypoints"] = [0] * 51
    document["images"][1]["is_labeled"] = False
    path = synthetic.write_json(tmp_path / "a.json", document)
    (read,) = load_annotations(path)
    assert [person.num_visible for person in read.frames[0].people] == [0, 0]
    np.testing.assert_array_equal(read.frames[0].people[0].box, truth.frames[0].people[0].box)
    assert not read.frames[1].labeled
    assert read.frames[1].extra["has_labeled_person"] is True


def test_posetrack17_annolist(tmp_path):
    truth = synthetic.sequence("000342_mpii", (1, 2, 3), digits=8, folder="images/bonn_5sec")
    truth.frames[2].people[0].keypoints[:] = 0
    path = synthetic.write_json(tmp_path / "val" / "16719_mpii.json", synthetic.annolist(truth))
    (read,) = load_annotations(path)
    synthetic.assert_same_people(read, truth, boxes=False)
    assert (read.name, read.file_stem, read.nframes) == ("000342_mpii", "16719_mpii", None)
    # Extents plus a pixel, 1.2 times about the centre.
    visible = truth.frames[0].people[0].keypoints[:, 2] > 0
    points = truth.frames[0].people[0].keypoints[visible, :2]
    size = points.max(0) - points.min(0) + 1
    expected = [*(points.min(0) + size / 2 - 0.6 * size), *(1.2 * size)]
    np.testing.assert_allclose(read.frames[0].people[0].box, expected, rtol=1e-14)
    assert read.frames[2].people[0].box[2] == 0
    np.testing.assert_array_equal(
        read.frames[0].ignore_regions[0], truth.frames[0].ignore_regions[0]
    )


def test_annolist_ids_are_unique_among_the_files(tmp_path):
    for name in ("000001_mpii", "000002_mpii"):
        item = synthetic.sequence(name, (1, 2), digits=8)
        synthetic.write_json(tmp_path / f"{name}.json", synthetic.annolist(item))
    sequences = load_annotations(tmp_path)
    ids = [frame.image_id for item in sequences for frame in item.frames]
    assert ids == [100000001, 100000002, 200000001, 200000002]


def test_annolist_without_lists_around_scalars_and_with_scores(tmp_path):
    item = synthetic.sequence("000001_mpii", (1,), people=1, digits=8)
    document = synthetic.annolist(item)
    entry = document["annolist"][0]
    entry["image"] = entry["image"][0]
    del entry["is_labeled"]
    rect = entry["annorect"][0]
    rect["score"], rect["track_id"] = 0.5, 3
    for key in ("x1", "y1", "x2", "y2"):
        del rect[key]
    rect["annopoints"][0]["point"][0]["score"] = [0.25]
    (read,) = load_annotations(synthetic.write_json(tmp_path / "a.json", document))
    person = read.frames[0].people[0]
    assert read.frames[0].labeled
    assert (person.score, person.track_id, person.head_box) == (0.5, 3, None)
    assert person.joint_scores is not None
    assert person.joint_scores[:2].tolist() == [0.25, -9999.0]


def test_merged_files_are_split_by_folder(tmp_path):
    """Also the visibility 2 of DetectAndTrack's files, and its head boxes as corners."""
    one = synthetic.sequence("000001_mpii", (1, 2), digits=8, folder="mpii")
    two = synthetic.sequence("000002_mpii", (1, 2, 3), digits=8, folder="mpii")
    for frame in two.frames:
        frame.image_id += 10_000
    path = synthetic.write_json(tmp_path / "all.json", synthetic.detect_and_track(one, two))
    read = load_annotations(path)
    assert [item.file_stem for item in read] == ["000001_mpii", "000002_mpii"]
    for item, truth in zip(read, (one, two), strict=True):
        synthetic.assert_same_people(item, truth)
        assert item.nframes == len(truth.frames)
        assert item.frames[0].width == synthetic.WIDTH


def test_posetrack17_and_18_hold_the_same_pose(tmp_path):
    """17 → 18 → 17: joints keep their names whatever the order of the file."""
    truth = synthetic.sequence("000003_mpii_test", (1, 2), digits=8)
    old = synthetic.write_json(tmp_path / "old" / "a.json", synthetic.annolist(truth))
    (first,) = load_annotations(old)
    write_posetrack18(tmp_path / "new" / "a.json", first)
    slots = json.loads((tmp_path / "new" / "a.json").read_text())["annotations"][0]["keypoints"]
    for joint, name in enumerate(JOINTS):
        at = 3 * SLOTS17.index(name)
        assert slots[at : at + 3] == truth.frames[0].people[0].keypoints[joint].tolist()
    assert slots[9:15] == [0] * 6
    (second,) = load_annotations(tmp_path / "new")
    again = synthetic.write_json(tmp_path / "again" / "a.json", synthetic.annolist(second))
    (third,) = load_annotations(again)
    for item in (second, third):
        synthetic.assert_same_people(item, truth, boxes=False)
    synthetic.assert_same_people(third, first)


def test_keypoint_names_of_the_file_decide_the_order(tmp_path):
    truth = synthetic.sequence(people=1)
    document = synthetic.posetrack18(truth)
    document["categories"][0] = {"id": 1, "name": "person", "keypoints": list(JOINTS)}
    frames = {frame.image_id: frame for frame in truth.frames}
    for annotation in document["annotations"]:
        pose = frames[annotation["image_id"]].people[0].keypoints
        annotation["keypoints"] = pose.ravel().tolist()
    (read,) = load_annotations(synthetic.write_json(tmp_path / "a.json", document))
    synthetic.assert_same_people(read, truth)

    document = synthetic.posetrack18(truth)
    names = list(SLOTS17)
    names[1:3] = ["left_eye", "right_eye"]
    document["categories"] = [{"id": 1, "name": "person", "keypoints": names}]
    (read,) = load_annotations(synthetic.write_json(tmp_path / "a.json", document))
    synthetic.assert_same_people(read, truth)


def test_without_bbox_the_box_is_made_of_the_keypoints(tmp_path):
    truth = synthetic.sequence(people=1)
    document = synthetic.posetrack18(truth)
    for annotation in document["annotations"]:
        del annotation["bbox"]
    (read,) = load_annotations(synthetic.write_json(tmp_path / "a.json", document))
    person = read.frames[0].people[0]
    np.testing.assert_array_equal(person.box, box_of_keypoints(person.keypoints, 1.3, 0.0))


def test_labelled_when_the_file_does_not_say(tmp_path):
    truth = synthetic.sequence(people=1)
    document = synthetic.posetrack18(truth)
    for image in document["images"]:
        del image["is_labeled"]
    document["annotations"] = document["annotations"][:1]
    (read,) = load_annotations(synthetic.write_json(tmp_path / "a.json", document))
    assert [frame.labeled for frame in read.frames] == [True, False, False, False]


def test_crowds_and_other_categories_are_counted(tmp_path):
    document = synthetic.posetrack18(synthetic.sequence())
    document["annotations"][0]["iscrowd"] = 1
    document["annotations"][1]["category_id"] = 2
    (read,) = load_annotations(synthetic.write_json(tmp_path / "a.json", document))
    assert read.frames[0].people == []
    assert read.skipped == {"crowd region (iscrowd)": 1, "not a person (category_id)": 1}
    assert "skipped 1: crowd region (iscrowd)" in describe([read])


@pytest.mark.parametrize(
    ("categories", "person"),
    [([(0, "person")], 0), ([(1, "car"), (5, "Person")], 5), ([(7, "player")], 7), ([], 1)],
)
def test_people_are_of_the_category_that_is_named_so(tmp_path, categories, person):
    document = synthetic.posetrack18(synthetic.sequence())
    document["categories"] = [
        document["categories"][0] | {"id": id, "name": name} for id, name in categories
    ]
    for annotation in document["annotations"]:
        annotation["category_id"] = person
    document["annotations"][0]["category_id"] = person + 2
    (read,) = load_annotations(synthetic.write_json(tmp_path / "a.json", document))
    assert read.skipped == {"not a person (category_id)": 1}
    assert sum(len(frame.people) for frame in read.frames) == len(document["annotations"]) - 1


def test_writer_round_trip_keeps_everything(tmp_path):
    truth = synthetic.sequence()
    truth.frames[0].extra = {"occluders": 2}
    who = truth.frames[1].people[0]
    who.score, who.person_id, who.joint_scores = 0.75, 9, np.arange(15) / 16
    truth.frames[2].labeled = False
    path = tmp_path / "deep" / f"{truth.name}.json"
    write_posetrack18(path, truth)
    assert [item.name for item in path.parent.iterdir()] == [path.name]  # no temporary file left
    (read,) = load_annotations(path)
    synthetic.assert_same_people(read, truth)
    assert read.frames[0].extra == {"occluders": 2}
    again = read.frames[1].people[0]
    assert (again.score, again.person_id) == (0.75, 9)
    assert again.joint_scores is not None
    np.testing.assert_array_equal(again.joint_scores, who.joint_scores)
    document = json.loads(path.read_text())
    assert document["images"][1]["vid_id"] == "000007"
    assert document["annotations"][3]["id"] == document["images"][1]["id"] * 100 + 1


def test_failed_write_leaves_the_old_file(tmp_path):
    truth = synthetic.sequence()
    path = tmp_path / "a.json"
    write_posetrack18(path, truth)
    before = path.read_bytes()
    truth.frames[0].people[0].box[0] = np.nan
    with pytest.raises(ValueError, match=r"box: person 0 of .*000000\.jpg is not finite: \[nan"):
        write_posetrack18(path, truth)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
    truth = synthetic.sequence()
    truth.frames[0].extra = {"nframes": 3}
    with pytest.raises(ValueError, match=r"extra: .*000000\.jpg: \['nframes'\] are set by"):
        write_posetrack18(path, truth)
    truth = synthetic.sequence()
    truth.frames[1].image_id = truth.frames[0].image_id
    with pytest.raises(ValueError, match=r"image_id: 10000070000 .*000001\.jpg\) occurs twice"):
        write_posetrack18(path, truth)


@pytest.mark.parametrize(
    ("name", "frame", "expected"),
    [
        ("000342_mpii_test", 0, 10003420000),
        ("012834_bonn_train", 7, 20128340007),
        ("000001_mpiinew_test", 12, 30000010012),
    ],
)
def test_image_ids(name, frame, expected):
    assert posetrack18_image_id(name, frame) == expected


@pytest.mark.parametrize(
    ("name", "frame", "message"),
    [
        ("soccer", 0, "name: 'soccer' is not <number>_<mpii|bonn|mpiinew>"),
        ("000001_mpii_test", 10_000, "frame: 10000 is not between 0 and 9999"),
    ],
)
def test_image_id_errors(name, frame, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        posetrack18_image_id(name, frame)


def test_validate_and_describe():
    sequences = [synthetic.sequence(f"{n:06d}_mpii_test") for n in range(3)]
    assert describe(sequences) == "3 sequences, 12 frames (12 labelled), 24 people, 312 joints"
    validate(sequences, expected_sequences=3, expected_frames=12)
    with pytest.raises(AnnotationError, match="3 sequences, but 170 are expected"):
        validate(sequences, expected_sequences=170)
    with pytest.raises(AnnotationError, match="12 labelled frames, but 13 are expected"):
        validate(sequences, expected_frames=13)
    old = [synthetic.sequence(f"{n:06d}_mpii_test", (0,), people=0) for n in range(74)]
    with pytest.raises(AnnotationError, match=r"170 files in version 0\.45, 74 in version 0\.2"):
        validate(old, expected_sequences=170)


@pytest.mark.shared_data
def test_real_sample():
    root = shared_data("posetrack18")
    sequences = load_annotations("annotations/val", root)
    assert describe(sequences) == "3 sequences, 3 frames (3 labelled), 14 people, 182 joints"
    assert [len(item.frames[0].people) for item in sequences] == [1, 2, 11]
    assert [len(item.frames[0].ignore_regions) for item in sequences] == [9, 2, 4]
    for item in sequences:
        frame = item.frames[0]
        assert frame.image_id == posetrack18_image_id(item.name, frame.index)
        for who in frame.people:
            # PoseTrack18's own boxes are those of the keypoints, 1.3 times.
            expected = box_of_keypoints(who.keypoints, 1.3, 0.0)
            np.testing.assert_allclose(who.box, expected, rtol=0, atol=1e-9)
    merged = load_annotations("annotations/val_merged.json", root)
    by_stem = {item.file_stem: item for item in merged}
    for item in sequences:
        synthetic.assert_same_people(by_stem[item.file_stem], item)
