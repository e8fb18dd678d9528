"""The official PoseTrack AP: published results, a slow oracle, formats and bad input."""

from __future__ import annotations

import copy
import json
import math
import time

import numpy as np
import pytest

from cmpose.cli import main
from cmpose.data.skeleton import CATEGORY, JOINTS, SLOT_OF_JOINT
from cmpose.evaluation.posetrack_ap import score_folders, score_sequences
from tests.evaluation.oracle import slow_ap
from tests.shared_data import shared_data

NAME = "000001_mpii_test.json"


def image(i, seq=1, **extra):
    return {
        "id": 10**10 + seq * 10**4 + i,
        "file_name": f"images/val/{seq:06d}_mpii_test/{i:06d}.jpg",
        **extra,
    }


def person(image_id, joints, *, head=(0, 0, 30, 40), scores=None, track_id=0):
    """``joints``: official joint index → (x, y); ``scores`` likewise."""
    keypoints, slot_scores = [0.0] * 51, [0.0] * 17
    for j, (x, y) in joints.items():
        slot = SLOT_OF_JOINT[j]
        keypoints[3 * slot : 3 * slot + 3] = [float(x), float(y), 1.0]
        slot_scores[slot] = 0.0 if scores is None else float(scores[j])
    entry = {"image_id": image_id, "track_id": track_id, "category_id": 1, "keypoints": keypoints}
    if head is not None:
        entry["bbox_head"] = list(head)
    entry["scores"] = [] if scores is None else slot_scores
    return entry


def sequence(images, annotations):
    return {"images": images, "annotations": annotations, "categories": [CATEGORY]}


def pose(x=100.0, y=100.0):
    return {j: (x + 40 * (j % 4), y + 40 * (j // 4)) for j in range(15)}


def pair(frames=2):
    """Ground truth and equal predictions of one person a frame."""
    images = [image(i) for i in range(frames)]
    truth = [person(im["id"], pose()) for im in images]
    guess = [person(im["id"], pose(), scores=dict.fromkeys(range(15), 0.9)) for im in images]
    return sequence(images, truth), sequence(copy.deepcopy(images), guess)


def score(truth, guess, **options):
    return score_sequences({NAME: truth}, {NAME: guess}, **options)


def random_sequence(rng, seq, ties):
    images, truth, guess = [], [], []
    for i in range(4):
        extra = {}
        if rng.random() < 0.5:
            x, y = rng.uniform(50, 300, 2)
            extra = {
                "ignore_regions_x": [[x, x + 90, x + 60]],
                "ignore_regions_y": [[y, y + 20, y + 90]],
            }
        images.append(image(i, seq, **extra))
        people = int(rng.integers(0, 4))
        joints = [
            {j: tuple(rng.uniform(20, 380, 2)) for j in range(15) if rng.random() < 0.7}
            for _ in range(people)
        ]
        for k, points in enumerate(joints):
            truth.append(person(images[-1]["id"], points, head=(0, 0, 40, 50), track_id=k))
        for k in range(int(rng.integers(0, 5))):
            base = joints[k % people] if people else {}
            points, scores = {}, {}
            for j in range(15):
                if rng.random() < 0.2:
                    continue
                x, y = base.get(j, rng.uniform(20, 380, 2))
                points[j] = (x + rng.normal(0, 14), y + rng.normal(0, 14))
                scores[j] = rng.integers(0, 4) / 4 if ties else rng.random()
            guess.append(person(images[-1]["id"], points, scores=scores, track_id=k))
    return sequence(images, truth), sequence(copy.deepcopy(images), guess)


@pytest.mark.shared_data
@pytest.mark.parametrize(
    "case", ["basic", "multi", "ignore", "dropped_joints", "ankles_absent_gt_only"]
)
def test_equals_the_official_tool(case):
    folder = shared_data("posetrack_ap", case)
    expected = json.loads((folder / "expected.json").read_text())
    result = score_folders(folder / "gt", folder / "pred")

    def numbers(values):
        return np.array([math.nan if value is None else value for value in values], float)

    for ours, theirs in (
        (result.ap, expected["ap"][:15]),
        (result.precision, expected["precision"][:15]),
        (result.recall, expected["recall"][:15]),
        (list(result.columns.values()), expected["columns"].values()),
        ([result.mean], expected["ap"][15:]),
    ):
        np.testing.assert_allclose(ours, numbers(theirs), rtol=0, atol=1e-9, equal_nan=True)
    assert list(result.columns) == list(expected["columns"])
    assert result.num_frames == expected["n_eval_frames"]
    written = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert set(written) == {"columns", "joints", "ap"}
    assert written["joints"] == list(JOINTS) == expected["joints"][:15]
    assert [value is None for value in written["ap"]] == [v is None for v in expected["ap"][:15]]


@pytest.mark.shared_data
def test_real_ground_truth_scores_100_against_itself():
    folder = shared_data("posetrack18", "annotations", "val")
    result = score_folders(folder, folder)
    assert result.ap.tolist() == [100.0] * 15
    assert (result.num_files, result.num_frames, result.num_people) == (3, 3, 14)
    merged = folder.parent / "val_merged.json"  # three sequences in one file, names repeat
    assert score_folders(merged, merged).ap.tolist() == [100.0] * 15


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_slow_oracle_agrees(seed, ties):
    rng = np.random.default_rng(seed)
    cases = {f"{s:06d}.json": random_sequence(rng, s, ties) for s in range(3)}
    result = score_sequences(
        {name: truth for name, (truth, _) in reversed(cases.items())},  # order must not matter
        {name: guess for name, (_, guess) in cases.items()},
    )
    expected = [math.nan if ap is None else ap for ap in slow_ap(cases.values())]
    np.testing.assert_allclose(result.ap, expected, rtol=0, atol=1e-9, equal_nan=True)


def test_hand_worked_pose():
    """Head box 30×40: head size 0.6·50 = 30, so a joint is right within 15 px, border included."""
    frame = image(0)
    truth = sequence([frame], [person(frame["id"], {0: (100, 100), 1: (200, 100)})])
    guess_joints = {0: (115, 100), 1: (200, 115.01), 2: (50, 50)}
    guess = sequence([frame], [person(frame["id"], guess_joints, scores={0: 1, 1: 1, 2: 1})])
    result = score(truth, guess)
    assert result.ap[0] == 100.0
    assert result.ap[1] == 0.0
    assert math.isnan(result.ap[2])  # predicted, nobody has it annotated
    assert result.ap[3] == 0.0  # neither: counts in the mean, as in the official tool
    assert result.mean == pytest.approx(100 / 14)
    assert math.isnan(result.columns["Hip"])
    assert result.seven_column_mean == pytest.approx(50 / 6)


def test_equal_shares_go_to_the_first_person():
    """Both people have all joints near; the first lacks joint 1, so the guess at it is wrong."""
    frame = image(0)
    people = [person(frame["id"], {0: (100, 100)}), person(frame["id"], {0: (99, 100), 1: (9, 9)})]
    guess = sequence(
        [frame], [person(frame["id"], {0: (100, 100), 1: (9, 9)}, scores={0: 1, 1: 1})]
    )
    assert score(sequence([frame], people), guess).ap[1] == 0.0
    assert score(sequence([frame], people[::-1]), guess).ap[1] == 100.0


def test_people_without_joints_still_make_a_frame_count():
    """A guess in a frame whose only person has no joint (left) is wrong; in one of nobody, free."""
    images = [image(0), image(1), image(2)]
    right = person(images[0]["id"], {0: (100, 100)}, scores={0: 0.5})
    wrong = [person(im["id"], {0: (100, 100)}, scores={0: 0.9}) for im in images[1:]]
    guess = sequence(images, [right, *wrong])
    bare = person(images[1]["id"], {}, head=None)  # PoseTrack21 has boxes without keypoints
    result = score(sequence(images, [right | {"scores": []}, bare]), guess)
    assert (result.ap[0], result.num_frames, result.num_frames_total) == (50.0, 2, 3)
    ignored = [
        images[0],
        image(1, ignore_regions_x=[[0, 50, 50, 0]], ignore_regions_y=[[0, 0, 50, 50]]),
        images[2],
    ]
    inside = person(images[1]["id"], {0: (20, 20)})
    assert score(sequence(ignored, [right | {"scores": []}, inside]), guess).ap[0] == 50.0


@pytest.mark.parametrize(("x", "expected"), [(50, 100.0), (49, 0.0), (51, 100.0)])
def test_joints_on_the_border_of_a_region_count(x, expected):
    frame = image(0, ignore_regions_x=[[0, 50, 50, 0]], ignore_regions_y=[[0, 0, 50, 50]])
    truth = person(frame["id"], {0: (x, 25)})
    guess = person(frame["id"], {0: (x, 25)}, scores={0: 1})
    assert score(sequence([frame], [truth]), sequence([frame], [guess])).ap[0] == expected


def test_equal_scores_rank_by_frame():
    """One wrong and one right joint of equal score: precision at recall 1 depends on the order."""
    images = [image(0), image(1)]
    truth = sequence(images, [person(images[1]["id"], {0: (100, 100)}), person(images[0]["id"],
                     {1: (0, 5)})])  # fmt: skip
    wrong_first = sequence(
        images,
        [person(i["id"], {0: (100, 100)}, scores={0: 0.5}) for i in images],
    )
    assert score(truth, wrong_first).ap[0] == 50.0
    wrong_last = copy.deepcopy(wrong_first)
    truth["annotations"][0]["image_id"], truth["annotations"][1]["image_id"] = (
        images[0]["id"],
        images[1]["id"],
    )
    assert score(truth, wrong_last).ap[0] == 100.0


def test_formats_agree():
    """PoseTrack17 and 18 say the same in any combination, and 15 named keypoints will do."""
    rng = np.random.default_rng(5)
    truth, guess = random_sequence(rng, 1, False)
    expected = score(truth, guess).ap
    for a, b in ((True, False), (False, True), (True, True)):
        result = score(annolist(truth) if a else truth, annolist(guess) if b else guess)
        np.testing.assert_array_equal(result.ap, expected)

    corners = copy.deepcopy(truth)  # COCO-style PoseTrack17
    for entry in corners["annotations"]:
        x, y, w, h = entry.pop("bbox_head")
        entry["head_box"] = [x, y, x + w, y + h]
    np.testing.assert_array_equal(score(corners, guess).ap, expected)

    fifteen = copy.deepcopy(guess)
    fifteen["categories"][0] = {**CATEGORY, "keypoints": list(JOINTS)}
    for entry in fifteen["annotations"]:
        points = np.reshape(entry["keypoints"], (17, 3))[list(SLOT_OF_JOINT)]
        entry["keypoints"] = points.reshape(-1).tolist()
        entry["scores"] = [entry["scores"][slot] for slot in SLOT_OF_JOINT]
    np.testing.assert_array_equal(score(truth, fifteen).ap, expected)


def annolist(data):
    """PoseTrack18 object → PoseTrack17 object."""
    entries = []
    for im in data["images"]:
        rects = []
        for entry in data["annotations"]:
            if entry["image_id"] != im["id"]:
                continue
            points = []
            for j, slot in enumerate(SLOT_OF_JOINT):
                x, y, v = entry["keypoints"][3 * slot : 3 * slot + 3]
                if (x, y, v) != (0, 0, 0):
                    points.append({"id": [j], "x": [x], "y": [y], "is_visible": [v]})
                    if entry["scores"]:
                        points[-1]["score"] = [entry["scores"][slot]]
            x, y, w, h = entry["bbox_head"]
            rects.append(
                {"x1": [x], "y1": [y], "x2": [x + w], "y2": [y + h], "track_id": [len(rects)]}
            )
            if points:
                rects[-1]["annopoints"] = [{"point": points}]
        regions = [
            {"point": [{"x": [x], "y": [y]} for x, y in zip(xs, ys, strict=True)]}
            for xs, ys in zip(
                im.get("ignore_regions_x", []), im.get("ignore_regions_y", []), strict=True
            )
        ]
        entry = {"image": [{"name": im["file_name"]}], "imgnum": [1], "annorect": rects}
        if regions:
            entry["ignore_regions"] = regions
        entries.append(entry)
    return {"annolist": entries}


def test_renumbered_but_consistent_ids_are_matched_by_file_name():
    truth, guess = pair(3)
    for new, entry in enumerate(guess["images"]):
        for annotation in guess["annotations"]:
            if annotation["image_id"] == entry["id"]:
                annotation["image_id"] = new
        entry["id"] = new
    guess["images"].reverse()  # the order in the file is of no consequence
    assert score(truth, guess).mean == 100.0


def test_table_names_the_box_source_and_both_means():
    truth, guess = pair()
    text = score(truth, guess).table("val_detections.json")
    assert "val_detections.json" in text
    assert "7 columns is 100.00" in text
    assert "1 file, 2 frames with people of 2" in text
    assert "not stated" in score(truth, guess).table()


def test_what_a_reader_should_know_is_noted(tmp_path):
    truth, guess = pair()
    guess["annotations"][0]["scores"] = []
    truth["annotations"][1]["bbox_head"] = [5, 5, 0, 0]
    for folder, data in (("gt", truth), ("pred", guess)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / NAME).write_text(json.dumps(data))
    (tmp_path / "pred" / "000099_mpii_test.json").write_text(json.dumps(guess))
    notes = "\n".join(score_folders(tmp_path / "gt", tmp_path / "pred").notes)
    assert "15 predicted joints without a score" in notes
    assert "1 annotated head box of size 0" in notes
    assert "000099_mpii_test.json" in notes


def test_a_validation_set_takes_seconds():
    """1,000 frames of 6 people with ignore regions; the real set has 8,000."""
    rng = np.random.default_rng(0)
    images = [
        image(i, ignore_regions_x=[[0, 50, 50, 0]], ignore_regions_y=[[0, 0, 50, 50]])
        for i in range(1000)
    ]
    truth, guess = [], []
    for im in images:
        for k in range(6):
            joints = pose(100 + 200 * k, 100)
            truth.append(person(im["id"], joints, track_id=k))
            guess.append(
                person(im["id"], joints, scores=dict.fromkeys(joints, rng.random()), track_id=k)
            )
    start = time.perf_counter()
    assert score(sequence(images, truth), sequence(images, guess)).mean == 100.0
    assert time.perf_counter() - start < 10


# Bad input ------------------------------------------------------------------------------------


def _renumber_images(truth, guess):
    for entry in guess["images"]:
        entry["id"] += 7  # mmpose #3085: the poses' image_id now leads nowhere


def _other_frames(truth, guess):
    for entry in guess["images"]:
        entry["file_name"] = entry["file_name"].replace("00000", "00009")


def _other_ids_and_frames(truth, guess):
    _other_frames(truth, guess)
    for entry in guess["images"] + guess["annotations"]:
        key = "id" if "file_name" in entry else "image_id"
        entry[key] += 7


def _a_track_twice(truth, guess):
    guess["annotations"][0]["track_id"] = 1
    guess["annotations"].append(guess["annotations"][0])


BAD = {
    "frame count": (lambda t, g: g["images"].pop() and g["annotations"].pop(),
                    r"has 1 frames, and none for 1 of 2 frames with people in .* list every frame"),
    "duplicate track id": (_a_track_twice, r"images\[0\]: track_id 1 occurs twice"),
    "renumbered images": (_renumber_images,
                          r"annotations\[0\]\.image_id 10000010000 is not the id of any entry"),
    "other frames": (_other_frames, r"image id 10000010000 is 000090.jpg, in the ground truth"),
    "other ids and frames": (_other_ids_and_frames,
                             r"neither by image id nor by file name \(for example 000000.jpg"),
    "no head box": (lambda t, g: t["annotations"][1].pop("bbox_head"),
                    r"frame 1 .* has a person with joints but no head box"),
    "short head box": (lambda t, g: t["annotations"][0].update(bbox_head=[1, 2, 3]),
                       r"annotations\[0\]\.bbox_head has 3 numbers"),
    "short head corners": (lambda t, g: t["annotations"][0].update(head_box=[1], bbox_head=None),
                           r"annotations\[0\]\.head_box has 1 numbers"),
    "short keypoints": (lambda t, g: g["annotations"][0]["keypoints"].pop(),
                        r"annotations\[0\]\.keypoints has 50 numbers, expected 51"),
    "short scores": (lambda t, g: g["annotations"][1]["scores"].pop(),
                     r"annotations\[1\]\.scores has 16 numbers, expected 17"),
    "NaN": (lambda t, g: g["annotations"][0]["keypoints"].__setitem__(3, math.nan),
            r"annotations\[0\]\.keypoints\[3\]: expected a finite number, got nan; leave out what"),
    "text": (lambda t, g: g["annotations"][0].update(scores=["a"] * 17),
             r"annotations\[0\]\.scores\[0\]: expected a number, got 'a'"),
    "two-point region": (
        lambda t, g: t["images"][0].update(ignore_regions_x=[[0, 1]], ignore_regions_y=[[0, 1]]),
        r"images\[0\]: an ignore region has 2 points"),
    "uneven region": (
        lambda t, g: t["images"][0].update(ignore_regions_x=[[0, 1, 2]], ignore_regions_y=[[0]]),
        r"images\[0\]\.ignore_regions_y\[0\]: expected 3 numbers, got 1"),
    "uneven regions": (lambda t, g: t["images"][0].update(ignore_regions_x=[[0, 1, 2]]),
                       r"ignore_regions_x: 1 polygons, but ignore_regions_y has 0"),
    "no image id": (lambda t, g: g["annotations"][0].pop("image_id"),
                    r"annotations\[0\]: missing key 'image_id'; it has"),
    "no id": (lambda t, g: g["images"][0].pop("id"), r"images\[0\]: missing key 'id'; it has"),
    "same id twice": (lambda t, g: g["images"].append(g["images"][0]), r"images\[2\].id .* twice"),
    "foreign joints": (lambda t, g: g.update(categories=[{"keypoints": ["nose", "left_eye"]}]),
                       r"categories\[0\].keypoints lacks right_ankle"),
    "no list": (lambda t, g: g.update(images=None), r"images: expected a list, got None"),
    "nobody": (lambda t, g: t["annotations"].clear(),
               r"ground truth 0.*json: no person .* nothing to score"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_sequences(case):
    truth, guess = copy.deepcopy(pair())
    BAD[case][0](truth, guess)
    with pytest.raises(ValueError, match=BAD[case][1]):
        score(truth, guess)


BAD_17 = {
    "region": (lambda a: a[0].update(ignore_regions=[{"point": [{"x": [1]}]}]),
               r"annolist\[0\]\.ignore_regions\[0\]\.point\[0\]: missing key 'y'"),
    "no annorect": (lambda a: a[0].pop("annorect"), r"annolist\[0\] has no 'annorect'"),
    "no x": (lambda a: a[1]["annorect"][0]["annopoints"][0]["point"][3].pop("x"),
             r"annolist\[1\].annorect\[0\].annopoints\[0\].point\[3\]: missing key 'x'"),
    "track": (lambda a: a[0]["annorect"].extend([{"track_id": 1}, a[0]["annorect"][0]]),
              r"track_id 0 occurs twice"),
    "two numbers": (lambda a: a[0]["annorect"][0].update(x1=[1, 2]),
                    r"annorect\[0\]\.x1: expected one value, got 2: \[1\.0, 2\.0\]"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_17)
def test_bad_annolists(case):
    truth, guess = pair()
    guess = annolist(guess)
    BAD_17[case][0](guess["annolist"])
    with pytest.raises(ValueError, match=BAD_17[case][1]):
        score(truth, guess)


def test_match_by_order_is_the_official_tools_way():
    truth, guess = pair()
    _other_frames(truth, guess)
    assert score(truth, guess, match="order").mean == 100.0
    with pytest.raises(ValueError, match="match must be 'name' or 'order'"):
        score(truth, guess, match="id")


def test_folders(tmp_path):
    truth, guess = pair()
    gt, pred = tmp_path / "gt", tmp_path / "pred"
    with pytest.raises(FileNotFoundError, match=r"ground truth: .*gt does not exist"):
        score_folders(gt, pred)
    gt.mkdir()
    pred.mkdir()
    (gt / f"._{NAME}").write_bytes(b"\0")  # what systems leave beside files is none
    with pytest.raises(FileNotFoundError, match=r"ground truth: .* has no .json files"):
        score_folders(gt, pred)
    (gt / NAME).write_text(json.dumps(truth))
    with pytest.raises(FileNotFoundError, match=r"predictions: .* has no .json files"):
        score_folders(gt, pred)
    (pred / "other.json").write_text(json.dumps(guess))
    with pytest.raises(FileNotFoundError, match=f"no file for 1 of 1 .*: {NAME}"):
        score_folders(gt, pred)
    near = NAME.upper().replace(".JSON", ".json")
    (pred / near).touch()
    with pytest.raises(FileNotFoundError, match=f"{NAME}; {near} differs from it in upper case"):
        score_folders(gt, pred)
    (pred / near).unlink()
    with pytest.raises(ValueError, match=r"two folders or two files"):
        score_folders(gt, pred / "other.json")
    assert score_folders(gt / NAME, pred / "other.json").mean == 100.0
    (pred / NAME).write_text('{"images": [')
    with pytest.raises(ValueError, match=f"{NAME}: not valid JSON at line 1, column 13"):
        score_folders(gt, pred)
    (pred / NAME).write_text('[{"bbox": [1, 2, 3, 4], "image_id": 1}]')
    with pytest.raises(ValueError, match=r"not a PoseTrack file: .* got a list"):
        score_folders(gt, pred)
    (pred / NAME).write_text('{"poses": []}')
    with pytest.raises(ValueError, match="got the keys 'poses'"):
        score_folders(gt, pred)


def test_in_memory_names():
    truth, _ = pair()
    with pytest.raises(ValueError, match="no sequences"):
        score_sequences({}, {})
    with pytest.raises(ValueError, match=f"lacks the sequences {NAME}"):
        score_sequences({NAME: truth}, {})


def test_predictions_in_shares_of_the_picture_are_refused():
    """Their AP was 0, without a word."""
    truth, guess = pair()
    for annotation in guess["annotations"]:
        for i in range(0, len(annotation["keypoints"]), 3):
            annotation["keypoints"][i] /= 640
            annotation["keypoints"][i + 1] /= 480
    with pytest.raises(ValueError, match=r"keypoints are shares of the picture, .* pixels are exp"):
        score(truth, guess)
    assert score(guess, guess).num_predictions == 2


@pytest.mark.parametrize("result", ["gt/NAME", "pred/NAME", "pred/result.json", "link.json"])
def test_a_result_does_not_replace_an_input(tmp_path, result):
    for folder, data in zip(("gt", "pred"), pair(), strict=True):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / NAME).write_text(json.dumps(data))
    (tmp_path / "link.json").symlink_to(tmp_path / "gt" / NAME)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    path = tmp_path / result.replace("NAME", NAME)
    with pytest.raises(SystemExit, match=r"--json .*: is an input, or lies among those in"):
        main(["score", str(tmp_path / "gt"), str(tmp_path / "pred"), "--json", str(path)])
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == before
