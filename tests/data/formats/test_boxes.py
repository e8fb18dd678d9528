"""Files of people's boxes mean the same to every command that reads one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from cmpose.convert.boxes import OwnBoxes
from cmpose.convert.report import ConvertReport
from cmpose.convert.sources import Draft
from cmpose.data.formats.boxes import EMPTY, FROM_ZERO, NOT_A_PERSON
from cmpose.data.formats.detections import load_detections
from cmpose.data.sequence import AnnotationError, Frame, Sequence
from cmpose.predict.detectors.detect import load_video_detections
from tests.shared_data import shared_data

SIZE = (426, 240)
PERSON = [150, 60, 60, 150]


def frames() -> list[Frame]:
    return [
        Frame(image_id=i, file_name=f"a/{i:06}.jpg", index=i, width=SIZE[0], height=SIZE[1])
        for i in range(3)
    ]


def predict(path: Path):
    detections = load_video_detections(path, 3, size=SIZE, min_score=0.2)
    counts = detections.counts
    return len(detections.frames) - counts.left_out[EMPTY], +counts.left_out, +counts.kept


def evaluate(path: Path):
    detections = load_detections(path, [Sequence("a", "a", frames())])
    return sum(map(len, detections.boxes.values())), detections.dropped, detections.kept


def convert(path: Path):
    report = ConvertReport()
    own = OwnBoxes(path, report)
    used = sum(
        len(own.of(Draft(f.file_name, "", f.image_id), f, Path(f.file_name))) for f in frames()
    )
    own.check()

    def counts(kinds):
        return {k.removeprefix("box of --boxes: "): len(cases) for k, cases in kinds.items()}

    return used, counts(report.left_out), counts(report.warnings)


READERS = pytest.mark.parametrize("read", [predict, evaluate, convert])


def entries(*categories, **fields):
    """A box in frame 0 for each category; ``...`` gives none."""
    box = {"image_id": 0, "bbox": PERSON, "score": 0.9} | fields
    return [box | ({} if c is ... else {"category_id": c}) for c in categories]


def written(tmp_path: Path, boxes) -> Path:
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(boxes))
    return path


@READERS
@pytest.mark.parametrize(
    ("categories", "used", "left_out", "kept"),
    [
        ((1, "1", "person", " Person", None, ...), 6, {}, {}),
        ((0, "0", 0), 3, {}, {FROM_ZERO: 3}),
        ((0, 2, ...), 2, {NOT_A_PERSON: 1}, {FROM_ZERO: 1}),
        ((1, 2, "car", "person"), 2, {NOT_A_PERSON: 2}, {}),
    ],
)
def test_who_is_a_person(tmp_path, read, categories, used, left_out, kept):
    counts = read(written(tmp_path, entries(*categories)))
    assert counts == (used, left_out, kept)


@READERS
@pytest.mark.parametrize(
    ("classes", "used", "left_out"),
    [
        ([{"label": "Person "}, {"label": "dog"}], 1, {"not a person (label)": 1}),
        ([{"category": "person"}, {"category": "car"}], 1, {"not a person (category)": 1}),
        ([{"class": "person"}, {"class": 1}, {"class": 2}], 2, {"not a person (class)": 1}),
        ([{"class_name": "person"}, {"class_name": "cat"}], 1, {"not a person (class_name)": 1}),
        # The name says what the number means.
        ([{"category_id": 15, "category_name": "person"}], 1, {}),
        (
            [{"category_id": 1, "label": "dog"}, {"category_id": 1, "label": None}],
            1,
            {"not a person (label)": 1},
        ),
        # A name of the person beside the class, and what is neither a text nor a number.
        ([{"class": "person", "label": "Ann"}, {"label": {"a": 1}}, {"label": " "}], 3, {}),
    ],
)
def test_a_class_in_another_key_is_judged(tmp_path, read, classes, used, left_out):
    counts = read(written(tmp_path, [entries(...)[0] | each for each in classes]))
    assert counts == (used, left_out, {})


@READERS
def test_when_a_class_in_another_key_leaves_nobody(tmp_path, read):
    message = (
        r"nobody is left of its 1 boxes: 1 × not a person \(label 'dog'\); a person's label is 1 "
        r'or "person"'
    )
    with pytest.raises(AnnotationError, match=message):
        read(written(tmp_path, [entries(...)[0] | {"label": "dog"}]))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"image_id": 2}, "image_id"),
        ({"frame": 2}, "frame"),
        ({"image_id": 1, "frame": 0}, "frame"),
    ],
)
def test_an_entry_that_names_two_pictures_is_refused(tmp_path, more, named):
    """Of which one, cannot be told; where all agree it is taken."""

    def used(entry) -> int:
        own = OwnBoxes(written(tmp_path, [entry]), ConvertReport())
        return len(own.of(draft, frame, Path(frame.file_name)))

    frame = frames()[1]
    draft = Draft(frame.file_name, "", 1, named_number=1)
    box = {"bbox": PERSON, "score": 0.9, "image_name": "a\\000001.jpg"}
    assert used(box | dict.fromkeys(more, 1)) == 1
    message = rf"\[0\]: image_name is 'a/000001\.jpg', but {named} is \d, and in the source .* is 1"
    with pytest.raises(AnnotationError, match=message):
        used(box | more)


def test_an_entry_of_two_frames_of_a_data_set_is_refused(tmp_path):
    box = entries(1)[0] | {"image_id": 1}
    assert evaluate(written(tmp_path, [box | {"image_name": "x/a/000001.jpg"}]))[0] == 1
    message = r"\[0\]: image_id 1 is a/000001\.jpg, but image_name is 'a/000002\.jpg'; leave out"
    with pytest.raises(AnnotationError, match=message):
        evaluate(written(tmp_path, [box | {"image_name": "a/000002.jpg"}]))


@pytest.mark.parametrize("read", [evaluate, convert])
def test_a_name_that_is_nearly_a_pictures_is_refused(tmp_path, read):
    """Else its boxes would be left out, as another picture's."""
    entry = {"bbox": PERSON, "score": 0.9, "image_name": "a/000000.jpg"}
    path = written(tmp_path, [entry, entry | {"image_name": "A/000001.JPG"}])
    message = r"\[1\]: image_name 'A/000001\.JPG': 'a/000001\.jpg' of the .* differs from it in"
    with pytest.raises(AnnotationError, match=message):
        read(path)


@READERS
@pytest.mark.parametrize("value", [1e308, -1e10])
def test_boxes_beyond_any_picture_are_refused(tmp_path, read, value):
    """Sums of such numbers are infinite."""
    with pytest.raises(AnnotationError, match=r"\[0\]\.bbox\[2\]: expected a number of pixels,"):
        read(written(tmp_path, [entries(1)[0] | {"bbox": [1, 2, value, 4]}]))


@READERS
@pytest.mark.parametrize("categories", [(0, 1), ("person", 3, 0)])
def test_ids_from_0_and_from_1_in_one_file_are_refused(tmp_path, read, categories):
    message = r"boxes\.json: \[\d\]\.category_id: 0, but \[\d\]\.category_id: .*either may be the p"
    with pytest.raises(AnnotationError, match=message):
        read(written(tmp_path, entries(*categories)))


@READERS
def test_when_nobody_is_left_the_reasons_are_named(tmp_path, read):
    message = (
        r"boxes\.json: nobody is left of its 3 boxes: 3 × not a person \(category_id 3, 'car'\); "
        r"a person's category_id is 1 or \"person\""
    )
    with pytest.raises(AnnotationError, match=message):
        read(written(tmp_path, entries(3, "car", 3)))


@pytest.mark.parametrize(
    ("read", "option"), [(predict, "--min_score"), (evaluate, "data.box_score_threshold")]
)
def test_scores_that_leave_nobody(tmp_path, read, option):
    message = f"nobody is left of its 2 boxes: 2 × score below 0.2; {option} sets the least score"
    with pytest.raises(AnnotationError, match=message):
        read(written(tmp_path, entries(1, 1, score=0.1)))


@READERS
@pytest.mark.parametrize(
    "shares", [[0.35, 0.25, 0.14, 0.62], [0, 0, 1, 1], [-0.01, 0.4, 1.02, 0.5]]
)
def test_shares_of_the_picture_are_refused(tmp_path, read, shares):
    message = r"boxes\.json: boxes are shares of the picture, e\.g\. bbox \[.*and pixels are expec"
    with pytest.raises(AnnotationError, match=message):
        read(written(tmp_path, entries(1, ..., bbox=shares)))


@pytest.mark.parametrize("read", [predict, convert])
def test_single_boxes_without_an_area_worth_the_name_are_counted(tmp_path, read):
    boxes = entries(1) + entries(1, 1, bbox=[0.3, 0.3, 0.5, 0.4]) + entries(1, bbox=[500, 9, 9, 9])
    used, left_out, _ = read(written(tmp_path, boxes * 3 + entries(*[1] * 30)))
    assert used == 33
    assert sum(left_out.values()) == 9
    assert any(EMPTY in reason for reason in left_out)


@READERS
def test_two_corners_are_refused(tmp_path, read):
    corners = entries(1, bbox=[150, 60, 210, 210]) + entries(1, bbox=[10, 10, 90, 80])
    message = (
        r"boxes\.json: 1 of 2 boxes leave the picture, but all lie in it as two corners, e\.g\. "
        r"bbox \[150\.0, 60\.0, 210\.0, 210\.0\] in 426×240 pixels: write x, y, width, height"
    )
    with pytest.raises(AnnotationError, match=message):
        read(written(tmp_path, corners))
    # A person who is cut off by the border, and one whose box cannot be two corners.
    cut_off = entries(1, bbox=[150, 60, 60, 190]) + entries(1, bbox=[300, 100, 140, 100])
    assert read(written(tmp_path, cut_off))[0] == 2


@pytest.mark.shared_data
def test_boxes_as_they_were_reported():
    folder = shared_data("reports", "category_0")
    assert evaluate(folder / "boxes.json") == (2, {}, {FROM_ZERO: 2})
    for read in (predict, evaluate, convert):
        assert read(folder / "boxes_name.json")[0] == 1
    box = load_video_detections(folder / "boxes.json")[0][0].box
    np.testing.assert_array_equal(box, PERSON)
