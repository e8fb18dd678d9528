"""Own annotations → PoseTrack18's layout: round trips, grouping, checks, the report."""

from __future__ import annotations

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from cmpose.config import DataConfig
from cmpose.convert.convert import convert
from cmpose.convert.options import ConvertOptions
from cmpose.data.clips import ClipDataset
from cmpose.data.formats.posetrack import load_annotations
from cmpose.data.sequence import AnnotationError
from cmpose.data.skeleton import POSETRACK, SLOTS17, to_slots17
from tests.data import synthetic
from tests.data.synthetic import COCO_KEYPOINTS
from tests.shared_data import shared_data

NAMES = ["head", "left_paw", "right_paw"]


def pictures(folder: Path, names, size=(64, 48)) -> None:
    for name in names:
        synthetic.write_picture(folder / name, 1, size)


def coco(files, people=((0, 7),), keypoints=NAMES, **category):
    """One person in each picture that ``people`` lists as (number of the picture, track id)."""
    images = [
        {"id": 50 + i, "file_name": f, "width": 64, "height": 48} for i, f in enumerate(files)
    ]
    annotations = [
        {
            "id": 900 + k,
            "image_id": 50 + picture,
            "category_id": 3,
            "bbox": [5, 6, 30, 40],
            "area": 1200,
            "iscrowd": 0,
            "keypoints": [v for j in range(len(keypoints)) for v in (10 + j, 20.5 + picture, 2)],
        }
        | ({} if track is None else {"track_id": track})
        for k, (picture, track) in enumerate(people)
    ]
    categories = [{"id": 3, "name": "cat", "keypoints": list(keypoints), **category}]
    return {"images": images, "annotations": annotations, "categories": categories}


def run(tmp_path: Path, document, **options):
    """Converts a COCO document whose pictures lie in ``pics``; report and sequences."""
    source = synthetic.write_json(tmp_path / "own.json", document)
    report = convert(source, tmp_path / "out", tmp_path / "pics", ConvertOptions(**options))
    folder = tmp_path / "out" / "annotations" / options.get("split", "train")
    return report, load_annotations(folder)


def test_a_video_of_coco_keypoints(tmp_path):
    files = [f"walk/{n:04d}.jpg" for n in range(10, 16)]
    pictures(tmp_path / "pics", files)
    document = coco(files[1:3], people=((0, 7), (1, 7)), skeleton=[[1, 2], [1, 3]])
    document["annotations"][0]["keypoints"][:3] = [0, 0, 0]
    document["annotations"][1]["keypoints"][2] = 1
    report, [sequence] = run(tmp_path, document)
    assert sequence.name == sequence.file_stem == "walk"
    assert sequence.skeleton.keypoints == tuple(NAMES)
    assert sequence.skeleton.flip_pairs == ((1, 2),)
    assert sequence.skeleton.limbs == ((0, 1), (0, 2))
    assert [f.file_name for f in sequence.frames] == [
        "images/train/walk/000001.jpg",
        "images/train/walk/000002.jpg",
    ]
    assert [f.image_id for f in sequence.frames] == [50, 51], "detections by image id still fit"
    assert sequence.nframes == 6
    assert len(list((tmp_path / "out/images/train/walk").iterdir())) == 6, "neighbours come along"
    first, second = (frame.people[0] for frame in sequence.frames)
    assert first.keypoints.tolist() == [[0, 0, 0], [11, 20.5, 1], [12, 20.5, 1]]
    assert second.keypoints.tolist() == [[10, 21.5, 1], [11, 21.5, 1], [12, 21.5, 1]]
    assert (first.track_id, first.box.tolist()) == (7, [5, 6, 30, 40])
    clips = ClipDataset([sequence], tmp_path / "out", (64, 48), 3, DataConfig(), train=True)
    item = clips[0]
    assert item["keypoints"].shape == (3, 2)
    assert item["visible"].tolist() == [0, 1, 1]
    assert [Path(f).name for f in clips.records[0].files] == [f"00000{n}.jpg" for n in range(3)]
    assert report.facts["keypoints"] == {"head": 1, "left_paw": 2, "right_paw": 2}
    written = json.loads((tmp_path / "out/train_report.json").read_text())
    assert written == report.to_json()
    assert (written["labelled_frames"], written["warnings"], written["left_out"]) == (2, {}, {})
    assert not list((tmp_path / "out").rglob(".*"))


def test_cocos_17_stay_17_or_become_posetracks(tmp_path):
    pictures(tmp_path / "pics", ["a.jpg"])
    document = coco(["a.jpg"], keypoints=COCO_KEYPOINTS)
    _, [own] = run(tmp_path, document, split="own")
    assert own.skeleton.keypoints == tuple(COCO_KEYPOINTS)
    assert len(own.skeleton.flip_pairs) == 8
    report, [mapped] = run(tmp_path, document, split="mapped", to="posetrack")
    assert mapped.skeleton == POSETRACK
    pose, source = mapped.frames[0].people[0].keypoints, own.frames[0].people[0].keypoints
    for j, name in enumerate(POSETRACK.keypoints):
        expected = source[COCO_KEYPOINTS.index(name)] if name in COCO_KEYPOINTS else np.zeros(3)
        np.testing.assert_array_equal(pose[j], expected)
    assert sorted(
        report.warnings["PoseTrack joint that the source does not have, not annotated"]
    ) == ["head_bottom", "head_top"]
    left = report.left_out["keypoint that PoseTrack does not have"]
    assert left == ["left_eye", "right_eye", "left_ear", "right_ear"]


@pytest.mark.parametrize(
    ("names", "group", "expected"),
    [
        (["000000000785.jpg", "000000040083.jpg", "000000196141.jpg"], "auto", [1, 1, 1]),
        (["f_10.jpg", "f_11.jpg", "f_12.jpg"], "auto", [3]),
        (["f_10.jpg", "f_11.jpg", "f_12.jpg"], "still", [1, 1, 1]),
        (["f_10.jpg", "f_15.jpg", "f_20.jpg"], "auto", [3]),
        (["f_10.jpg", "f_11.jpg"], "auto", [1, 1]),
        (["f_10.jpg", "f_11.jpg"], "video", [2]),
        (["f_1.jpg", "f_2.jpg", "f_3.jpg", "f_9.jpg", "f_10.jpg"], "auto", [3, 2]),
        (["a/f_1.jpg", "b/f_1.jpg"], "auto", [1, 1]),
        (["portrait.jpg"], "auto", [1]),
    ],
)
def test_what_becomes_a_sequence(tmp_path, names, group, expected):
    pictures(tmp_path / "pics", names)
    people = [(i, None) for i in range(len(names))]
    report, sequences = run(tmp_path, coco(names, people), group=group)
    assert sorted(len(s.frames) for s in sequences) == sorted(expected)
    for sequence in sequences:
        assert [f.index for f in sequence.frames] == list(range(len(sequence.frames)))
    jumps = report.warnings.get("numbers of pictures jump: a new sequence begins", [])
    assert len(jumps) == (expected == [3, 2])
    clips = ClipDataset(sequences, tmp_path / "out", (64, 48), 3, DataConfig(), train=True)
    assert len(clips) == len(names)
    assert not clips.notes


def test_a_video_id_groups_whatever_the_track_says(tmp_path):
    pictures(tmp_path / "pics", ["v/1.jpg", "v/2.jpg"])
    document = coco(["v/1.jpg", "v/2.jpg"], people=((0, None), (1, None)))
    document["videos"] = [{"id": 4, "name": "my cat"}]
    for image in document["images"]:
        image["video_id"] = 4
    _, [sequence] = run(tmp_path, document)
    assert sequence.name == "my_cat"
    assert len(sequence.frames) == 2


def test_crowds_become_ignore_regions(tmp_path):
    pictures(tmp_path / "pics", ["a.jpg"])
    document = coco(["a.jpg"])
    for k, shape in enumerate(([[1, 2, 30, 2, 30, 20]], {"counts": [3], "size": [48, 64]})):
        crowd = {"id": k, "image_id": 50, "category_id": 3, "iscrowd": 1, "bbox": [1, 2, 10, 20]}
        document["annotations"].append(crowd | {"segmentation": shape})
    _, [sequence] = run(tmp_path, document)
    [frame] = sequence.frames
    assert [r.tolist() for r in frame.ignore_regions] == [
        [[1, 2], [30, 2], [30, 20]],
        [[1, 2], [11, 2], [11, 22], [1, 22]],
    ]
    assert len(frame.people) == 1


# CSV --------------------------------------------------------------------------------------------


def csv_of(tmp_path, text, **options):
    source = tmp_path / "labels.csv"
    source.write_text(text, encoding="utf-8")
    report = convert(source, tmp_path / "out", tmp_path / "pics", ConvertOptions(**options))
    return report, load_annotations(tmp_path / "out/annotations/train")


def test_csv_by_frame_number_with_boxes_from_detections(tmp_path):
    pictures(tmp_path / "pics", [f"walk/{n:06d}.jpg" for n in range(4)])
    boxes = [
        {"frame": 1, "bbox": [0, 0, 60, 40], "score": 0.5},
        {"frame": 1, "bbox": [5, 5, 20, 30], "score": 0.9},
        {"frame": 3, "bbox": [1, 1, 9, 9], "score": 0.4},
    ]
    detections = synthetic.write_json(tmp_path / "boxes.json", boxes)
    report, [sequence] = csv_of(
        tmp_path,
        "\ufeffsequence,frame,track,keypoint,x,y,visible\n"
        "walk,1,0,head,10,11.5,2\nwalk,1,0,left_paw,12,30,1\nwalk,1,0,right_paw,,,\n"
        "walk,2,0,head,50,11,\n walk,2,0,left_paw,40,30,0\n".replace(" walk", "walk"),
        boxes=str(detections),
    )
    one, two = sequence.frames
    assert one.people[0].keypoints.tolist() == [[10, 11.5, 1], [12, 30, 1], [0, 0, 0]]
    assert one.people[0].box.tolist() == [5, 5, 20, 30], "the smaller of those that hold all"
    assert two.people == [], "a single keypoint makes no box"
    assert report.left_out["person without a box, or keypoints to make one from"]
    written = json.loads((tmp_path / "out/annotations/train_boxes.json").read_text())
    assert [(e["image_id"], e["score"]) for e in written] == [
        (one.image_id, 0.5),
        (one.image_id, 0.9),
    ]
    left = report.left_out["boxes of a picture that the source does not list"]
    assert left == [f"{detections}: [2] (frame 3)"]
    data = DataConfig(boxes="annotations/train_boxes.json")
    assert len(ClipDataset([sequence], tmp_path / "out", (64, 48), 3, data, train=False)) == 2


@pytest.mark.parametrize("bbox", [[10, 11, 0, 0], [10, 11, 2, 0], [9, 10, 2, 2], None])
@pytest.mark.parametrize("keypoints", [3, 1])
def test_a_box_that_is_none_does_not_hide_the_one_of_boxes(tmp_path, bbox, keypoints):
    """Labelling tools write zeros, or the extent of one keypoint, where nobody drew a box."""
    pictures(tmp_path / "pics", ["v/0.jpg"])
    document = coco(["v/0.jpg"])
    [annotation] = document["annotations"]
    annotation["bbox"] = bbox
    annotation["keypoints"][3 * keypoints :] = [0] * 3 * (3 - keypoints)
    boxes = [{"image_id": 50, "bbox": [5, 5, 20, 30], "score": 0.9}]
    detections = synthetic.write_json(tmp_path / "boxes.json", boxes)
    report, [sequence] = run(tmp_path, document, boxes=str(detections))
    assert sequence.frames[0].people[0].box.tolist() == [5, 5, 20, 30]
    warnings = report.warnings.get("box of size zero: one of --boxes is taken", [])
    assert len(warnings) == (bbox is not None)


def test_an_annolists_boxes_are_those_of_boxes(tmp_path):
    """The format has no person boxes; the reader makes them from the joints."""
    pictures(tmp_path / "pics", ["v/1.jpg"])
    points = [{"id": [j], "x": [20 + j], "y": [20 + 2 * j]} for j in range(3)]
    entry = {"image": [{"name": "v/1.jpg"}], "annorect": [{"annopoints": [{"point": points}]}]}
    source = synthetic.write_json(tmp_path / "s.json", {"annolist": [entry]})
    actual = []
    for split, boxes in (("with", [5, 5, 30, 35]), ("without", [0, 0, 9, 9])):
        detections = synthetic.write_json(tmp_path / "boxes.json", [{"frame": 1, "bbox": boxes}])
        options = ConvertOptions(split=split, boxes=str(detections))
        convert(source, tmp_path / "out", tmp_path / "pics", options)
        [sequence] = load_annotations(tmp_path / "out/annotations" / split)
        actual.append(sequence.frames[0].people[0].box.tolist())
    assert actual == [[5, 5, 30, 35], pytest.approx([19.7, 19.5, 3.6, 6.0])]


def test_nobody_to_convert_is_an_error_with_the_reasons(tmp_path):
    pictures(tmp_path / "pics", ["v/0.jpg"])
    document = coco(["v/0.jpg"])
    document["annotations"][0] |= {"bbox": [10, 11, 0, 0], "keypoints": [10, 11, 2, *[0] * 6]}
    message = (
        r"own\.json: nobody to convert; left out: 1 × person without a box, .*, e\.g\. .*\[0\]"
    )
    with pytest.raises(AnnotationError, match=message):
        run(tmp_path, document)
    document["annotations"].clear()
    with pytest.raises(AnnotationError, match="nobody to convert; left out: nothing: it lists no"):
        run(tmp_path, document)
    assert not (tmp_path / "out").exists()


def test_keypoints_in_shares_of_the_picture_are_refused(tmp_path):
    pictures(tmp_path / "pics", ["v/0.jpg"])
    document = coco(["v/0.jpg"])
    document["annotations"][0]["keypoints"] = [0.5, 0.25, 2, 0.125, 1, 2, 0, 0, 0]
    message = r"own\.json: keypoints are shares of the picture, e\.g\. \[0\.5, 0\.25\], and pixels"
    with pytest.raises(AnnotationError, match=message):
        run(tmp_path, document)


def test_csv_by_file_and_a_skeleton_of_ones_own(tmp_path):
    pictures(tmp_path / "pics", ["a.jpg"])
    skeleton = {"keypoints": ["tip", "up", "down"], "flip_pairs": [["up", "down"]]}
    file = synthetic.write_json(tmp_path / "s.json", skeleton)
    text = "image,keypoint,x,y\na.jpg,down,30,40\na.jpg,tip,10,20\n"
    _, [sequence] = csv_of(tmp_path, text, skeleton=str(file))
    [person] = sequence.frames[0].people
    assert person.keypoints.tolist() == [[10, 20, 1], [0, 0, 0], [30, 40, 1]]
    np.testing.assert_allclose(person.box, [7, 17, 26, 26])
    assert sequence.skeleton.flip_pairs == ((1, 2),)


HEAD = "frame,track,keypoint,x,y\n"
BROKEN_CSV = [
    ("frame;track;keypoint;x;y\n1;0;a;1;2\n", r"line 1: the columns are frame;track;keypoint;x;y"),
    ("frame,keypoint,x,y,z\n", r"line 1: no column is called 'z'"),
    (HEAD, r"holds no keypoints, only a header"),
    (HEAD + "1,0,a,1\n", r"line 2: other than 5 values"),
    (HEAD + "1,0,a,1,2,3\n", r"line 2: other than 5 values"),
    (HEAD + "1,0,a,ten,2\n", r"line 2: x: expected a number of pixels, got 'ten'"),
    (HEAD + "1,0,a,1,nan\n", r"line 2: y: expected a number of pixels, got 'nan'"),
    (HEAD + "1.5,0,a,1,2\n", r"line 2: frame: expected a whole number of .*, got '1\.5'"),
    (HEAD + "1,x,a,1,2\n", r"line 2: track: expected a whole number of .*, got 'x'"),
    *((HEAD + f"1,0,a,1,{y}\n", "line 2: y: expected a num") for y in ("1_0", "inf", "１", "1e10")),
    *((HEAD + f"{n},0,a,1,2\n", "line 2: frame: expected a wh") for n in ("1_0", "１", "9" * 19)),
    (HEAD + "1,0,a,1,2\n1,0,a,3,4\n", r"line 3: keypoint: a of track 0 is given twice in frame 1"),
    (HEAD + "9,0,a,1,2\n", r"line 2: frame: .*pics has 0 pictures of number 9"),
    ("frame,keypoint,x,y,visible\n1,a,1,2,5\n", r"line 2: visible: 5; it must be 0"),
    (HEAD + "1,0,,1,2\n", r"column keypoint\.keypoints\[0\]: expected a name, got ''"),
]


@pytest.mark.parametrize(("text", "message"), BROKEN_CSV)
def test_a_broken_csv_is_named(tmp_path, text, message):
    pictures(tmp_path / "pics", ["000001.jpg"])
    with pytest.raises(AnnotationError, match=message) as info:
        csv_of(tmp_path, text)
    assert "labels.csv" in str(info.value)


# Checks -----------------------------------------------------------------------------------------


def change(*path_and_value):
    *path, last, value = path_and_value

    def apply(document):
        part = document
        for key in path:
            part = part[key]
        part[last] = value

    return apply


BROKEN_COCO = [
    (change("images", 1, "id", 50), r"images\[1\]\.id: 50 occurs twice: v/1\.jpg and v/0\.jpg"),
    (change("annotations", 1, "id", 900), r"annotations\[1\]\.id: 900 is also the id of annot"),
    (change("annotations", 1, "image_id", 5), r"annotations\[1\]\.image_id: 5 is not among"),
    (change("annotations", 0, "keypoints", [1] * 8), r"keypoints: expected 9 numbers, got 8"),
    (change("annotations", 0, "keypoints", 2, 3), r"visibility 3 of head; it must be 0"),
    (change("annotations", 0, "keypoints", 0, float("nan")), r"keypoints\[0\]: expected a finite"),
    (change("annotations", 0, "bbox", [1, 2, -3, 4]), r"bbox: negative size"),
    (change("annotations", 0, "bbox", [100, 2, 3, 4]), r"bbox: \[100.* is outside the picture of"),
    (change("images", 0, "file_name", "v/9.jpg"), r"images\[0\]: 'v/9\.jpg' is not below"),
    (change("images", 0, "width", 640), r"width, height: 640×48, but .*0\.jpg is 64×48; label"),
    (change("annotations", 1, "image_id", 50), r"track id 7 occurs twice; a person has one pose"),
    (change("categories", []), r"categories: 0 with keypoints \(with keypoints: none\)"),
    (change("categories", 0, "keypoints", ["a", "a", "b"]), r"keypoints\[1\]: 'a' occurs twice"),
    (change("categories", 0, "flip_pairs", [["head", "x"]]), r"flip_pairs\[0\]: 'x' is no keyp"),
    (change("images", []), r"annotations\[0\]\.image_id: 50 is not among the file's images"),
]


@pytest.mark.parametrize(("apply", "message"), BROKEN_COCO)
def test_broken_coco_is_named_and_writes_nothing(tmp_path, apply, message):
    pictures(tmp_path / "pics", ["v/0.jpg", "v/1.jpg"])
    document = coco(["v/0.jpg", "v/1.jpg"], people=((0, 7), (1, 7)))
    apply(document)
    with pytest.raises(AnnotationError, match=message):
        run(tmp_path, document)
    assert not (tmp_path / "out/annotations").exists()


def test_broken_people_can_be_left_out_and_are_counted(tmp_path):
    pictures(tmp_path / "pics", ["v/0.jpg", "v/1.jpg"])
    document = coco(["v/0.jpg", "v/1.jpg", "v/7.jpg"], people=((0, 1), (0, 2), (1, 1), (2, 1)))
    document["annotations"][0]["keypoints"][2] = 9
    report, [sequence] = run(tmp_path, document, on_error="skip")
    assert [len(f.people) for f in sequence.frames] == [1, 1]
    assert {k: len(v) for k, v in report.left_out.items()} == {
        "broken annotation": 1,
        "picture missing": 1,
    }
    assert "left out: 1 × broken annotation" in (tmp_path / "out/train_report.txt").read_text()


def test_warnings_are_counted_with_examples(tmp_path):
    files = [f"v/{n}.jpg" for n in range(8)]
    pictures(tmp_path / "pics", files)
    names = ["head", "left_paw", "tail"]
    document = coco(files, [(n, 1 if n != 3 else 2) for n in range(8)], keypoints=names)
    for annotation in document["annotations"]:
        annotation["keypoints"][6:9] = [0, 0, 0]
    for number in range(6):
        document["annotations"][number]["keypoints"][0] = 64.0 + number  # pixels end at 63.5
    document["annotations"][6]["bbox"] = [9, 9, 0, 0]
    document["annotations"][7]["keypoints"] = [0] * 9
    report, [sequence] = run(tmp_path, document)
    warnings = report.to_json()["warnings"]
    counts = {kind.split(":")[0]: entry["count"] for kind, entry in warnings.items()}
    assert counts == {
        "box of size zero": 1,
        "keypoint of a side without a partner": 1,
        "keypoint outside the picture": 6,
        "keypoint that nobody has annotated": 1,
        "person without keypoints": 1,
        "track id comes back after labelled frames without it": 1,
    }
    assert len(warnings["keypoint outside the picture"]["examples"]) == 5
    assert "head at (64, 20.5)" in warnings["keypoint outside the picture"]["examples"][0]
    assert "and 1 more" in report.text()
    assert len(sequence.frames[6].people) == 0, "both keypoints lie in one row: no box from them"


def test_a_box_of_size_zero_is_made_from_the_keypoints(tmp_path):
    pictures(tmp_path / "pics", ["a.jpg"])
    document = coco(["a.jpg"])
    document["annotations"][0]["bbox"] = [9, 9, 0, 5]
    document["annotations"][0]["keypoints"] = [10, 10, 2, 30, 40, 2, 20, 20, 2]
    report, [sequence] = run(tmp_path, document)
    np.testing.assert_allclose(sequence.frames[0].people[0].box, [7, 5.5, 26, 39])
    assert list(report.warnings) == ["box of size zero: made from the keypoints"]


def test_frames_of_different_size_are_no_video(tmp_path):
    pictures(tmp_path / "pics", ["v/0.jpg", "v/1.jpg"])
    pictures(tmp_path / "pics", ["v/2.jpg"], size=(48, 64))
    document = coco(["v/0.jpg"])
    with pytest.raises(AnnotationError, match=r"2\.jpg: is 48×64 pixels, 0\.jpg of the same seq"):
        run(tmp_path, document)


def test_usage_errors(tmp_path):
    pictures(tmp_path / "pics", ["a.jpg"])
    document = coco(["a.jpg"])
    run(tmp_path, document)
    with pytest.raises(FileExistsError, match="already has annotations: give another --split"):
        run(tmp_path, document)
    run(tmp_path, document, overwrite=True)
    with pytest.raises(FileNotFoundError, match=r"nothing\.json: no such file"):
        convert(tmp_path / "nothing.json", tmp_path / "x", tmp_path / "pics")
    with pytest.raises(FileNotFoundError, match=r"none: no such folder \(--images\)"):
        convert(tmp_path / "own.json", tmp_path / "x", tmp_path / "none")
    with pytest.raises(ValueError, match=r"split: '\.\./x' is no folder name"):
        run(tmp_path, document, split="../x")
    other = synthetic.write_json(tmp_path / "list.json", [1])
    with pytest.raises(AnnotationError, match=r"list\.json: neither 'images' \(COCO\) nor 'annol"):
        convert(other, tmp_path / "x", tmp_path / "pics")
    with pytest.raises(AnnotationError, match=r"none of the keypoints head, left_paw.* is PoseT"):
        run(tmp_path, document, split="y", to="posetrack")
    boxes = synthetic.write_json(
        tmp_path / "b.json", [{"image_name": "z.jpg", "bbox": [1, 2, 3, 4]}]
    )
    with pytest.raises(AnnotationError, match=r"b\.json: none of its entries is of a converted"):
        run(tmp_path, document, split="z", boxes=str(boxes))


def test_repeating_keeps_pictures_that_are_there_and_drops_stale_ones(tmp_path):
    files = [f"v/{n}.jpg" for n in range(4)]
    pictures(tmp_path / "pics", files)
    run(tmp_path, coco(files))
    placed = tmp_path / "out/images/train/v/000001.jpg"
    before = placed.stat().st_ino
    os.unlink(tmp_path / "pics/v/3.jpg")
    run(tmp_path, coco(files[:3]), overwrite=True)
    assert placed.stat().st_ino == before
    assert not placed.with_name("000003.jpg").exists()
    run(tmp_path, coco(files[:3]), overwrite=True, place="link", split="linked")
    assert (tmp_path / "out/images/linked/v/000001.jpg").is_symlink()


# PoseTrack's own --------------------------------------------------------------------------------


def test_an_annolist_keeps_people_heads_and_regions(tmp_path):
    truth = synthetic.sequence(indices=(1, 2, 3), digits=8, folder="images/bonn")
    synthetic.write_pictures(tmp_path / "pics", truth)
    source = synthetic.write_json(tmp_path / "gt" / "a.json", synthetic.annolist(truth))
    convert(source.parent, tmp_path / "out", tmp_path / "pics")
    [read] = load_annotations(tmp_path / "out/annotations/train")
    [before] = load_annotations(source)
    assert read.skeleton == POSETRACK
    for a, b in zip(read.frames, before.frames, strict=True):
        assert (a.labeled, a.index) == (b.labeled, b.index - 1)
        for p, q in zip(a.people, b.people, strict=True):
            np.testing.assert_array_equal(p.keypoints, q.keypoints)
            np.testing.assert_allclose(p.head_box, q.head_box)
            np.testing.assert_array_equal(p.box, q.box)
            assert p.track_id == q.track_id
        for r, s in zip(a.ignore_regions, b.ignore_regions, strict=True):
            np.testing.assert_array_equal(r, s)


@pytest.mark.shared_data
def test_the_real_sample_comes_back_from_coco(tmp_path):
    root = shared_data("posetrack18")
    truth = load_annotations("annotations/val", root)
    images, annotations = [], []
    for sequence in truth:
        for frame in sequence.frames[:1]:
            size = cv2.imread(str(root / frame.file_name)).shape
            images.append(
                {
                    "id": frame.image_id,
                    "file_name": frame.file_name.removeprefix("images/val/"),
                    "width": size[1],
                    "height": size[0],
                }
            )
            annotations += [
                {
                    "id": frame.image_id * 100 + k,
                    "image_id": frame.image_id,
                    "category_id": 1,
                    "track_id": who.track_id,
                    "bbox": who.box.tolist(),
                    "bbox_head": who.head_box.tolist(),
                    "keypoints": (to_slots17(who.keypoints) * [1, 1, 2]).ravel().tolist(),
                }
                for k, who in enumerate(frame.people)
            ]
    categories = [{"id": 1, "name": "person", "keypoints": list(SLOTS17)}]
    source = synthetic.write_json(
        tmp_path / "coco.json",
        {"images": images, "annotations": annotations, "categories": categories},
    )
    options = ConvertOptions(to="posetrack", split="val", place="link")
    report = convert(source, tmp_path / "out", root / "images" / "val", options)
    assert report.facts["people"] == 14
    back = {s.name: s for s in load_annotations("annotations/val", tmp_path / "out")}
    for sequence in truth:
        [frame] = back[sequence.name].frames
        assert frame.image_id == sequence.frames[0].image_id
        for p, q in zip(frame.people, sequence.frames[0].people, strict=True):
            np.testing.assert_array_equal(p.keypoints, q.keypoints)
            np.testing.assert_array_equal(p.box, q.box)
            np.testing.assert_array_equal(p.head_box, q.head_box)
            assert p.track_id == q.track_id
    data = DataConfig()
    clips = ClipDataset(list(back.values()), tmp_path / "out", (64, 48), 3, data, train=False)
    assert len(clips) == 14
    assert clips[0]["clip"].float().std() > 10
