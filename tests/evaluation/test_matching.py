"""Which predicted frame is scored against which frame of the ground truth.

The person of frame i stands 50 i pixels to the right, so that AP is 100 only if every frame is
matched with its own prediction.
"""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from cmpose.data.formats.posetrack import load_annotations
from cmpose.evaluation.posetrack_ap import score_folders
from tests.evaluation.test_posetrack_ap import annolist, person, pose, score, sequence
from tests.shared_data import shared_data


def video(names, numbers, ids=None, *, predicted=False, **extra):
    """A sequence of the frames ``numbers``, with the file names and image ids given."""
    images, people = [], []
    for k, (name, i) in enumerate(zip(names, numbers, strict=True)):
        images.append({"id": k if ids is None else ids[k], "file_name": name} | extra)
        scores = dict.fromkeys(range(15), 0.5 + i / 100) if predicted else None
        people.append(person(images[-1]["id"], pose(100 + 50 * i), scores=scores))
    return sequence(images, people)


def names(numbers, form="walk/{:06d}.jpg"):
    return [form.format(i) for i in numbers]


TRUTH = video(names([2, 5, 6], "images/val/walk/{:06d}.jpg"), [2, 5, 6], [900, 901, 902])


@pytest.mark.parametrize(
    ("form", "by"),
    [
        ("walk/{:06d}.jpg", "file name"),
        ("elsewhere/{:06d}.jpg", "file name"),
        (r"C:\data\walk\{:06d}.jpg", "file name"),
        ("walk/{:06d}.png", "file name without extension"),
        ("walk/{:d}.jpg", "file name by number, without zeros and extension"),
        (r"D:\walk\{:08d}.JPG", "file name by number, without zeros and extension"),
        ("w/F\u00d6_{:06d}.JPG", "file name in any case, by number, without zeros and extension"),
    ],
)
def test_a_video_of_which_some_frames_are_labelled(form, by):
    guess = video(names(range(8), form), range(8), predicted=True)
    truth = TRUTH
    if "F" in form:  # composed in one file, decomposed in the other, as macOS writes names
        truth = video(names([2, 5, 6], "walk/fo\u0308_{:06d}.jpg"), [2, 5, 6], [900, 901, 902])
    result = score(truth, guess)
    assert result.mean == 100.0
    assert (result.num_frames, result.num_predictions) == (3, 3), "the rest is no false positive"
    assert f"frames matched by {by} (1 file)" in result.table()
    [note] = result.notes
    assert note.startswith("5 predicted frames without ground truth not scored: 000001_mpii_test")
    whole = score(truth, video(names([2, 5, 6], form), [2, 5, 6], predicted=True))
    assert whole.mean == 100.0
    assert not whole.notes


def test_numbers_of_thousands_of_digits_are_compared_as_text():
    long = ["1" * 5000 + f"{i}.jpg" for i in (2, 5, 6)]
    guess = video([f"00{name[:-4]}.png" for name in long], [2, 5, 6], predicted=True)
    assert score(video(long, [2, 5, 6], [7, 8, 9]), guess).mean == 100.0


def test_ids_decide_where_names_agree_but_for_zeros_and_extension():
    guess = video(names([6, 2, 5], "{}.png"), [6, 2, 5], ["902", "900", "901"], predicted=True)
    result = score(TRUTH, guess)
    assert (result.mean, dict(result.matched)) == (100.0, {"image id": 1})
    nameless = video([""] * 3, [6, 2, 5], [902, 900, 901], predicted=True)
    assert score(TRUTH, nameless).mean == 100.0


def test_ids_that_are_of_other_frames_by_chance_give_way_to_names():
    """A labelling tool counts its pictures from 1, ``cmpose predict`` all frames from 0."""
    truth = video(names([2, 5, 6]), [2, 5, 6], [1, 2, 3])
    result = score(truth, video(names(range(8)), range(8), predicted=True))
    assert (result.mean, dict(result.matched)) == (100.0, {"file name": 1})


def test_an_annolist_is_matched_by_name():
    guess = video(names(range(8)), range(8), predicted=True)
    assert score(annolist(TRUTH), annolist(guess)).mean == 100.0


def test_two_names_that_may_be_meant_are_refused():
    truth = video(["walk/01.jpeg"], [1])
    guess = video(["walk/1.jpg", "walk/0001.jpg"], [1, 1], [7, 8], predicted=True)
    message = r"01\.jpeg of the ground truth .* may be walk/1\.jpg or walk/0001\.jpg; write"
    with pytest.raises(ValueError, match=message):
        score(truth, guess)
    guess["images"][1]["file_name"] = "walk/01.png"
    assert score(truth, guess).mean == 100.0, "the strictest comparison that works decides"


def test_names_of_any_length_are_cut_in_messages():
    truth = video([f"walk/{'9' * 3000}1.jpg", "walk/2.jpg"], [1, 2], [7, 8])
    guess = video(["walk/3.jpg", f"walk/{'8' * 3000}.jpg"], [1, 2], [7, 8], predicted=True)
    for a, b in ((truth, guess), (guess, truth)):
        with pytest.raises(ValueError, match=r"\.{3}[98]{70}") as refused:
            score(a, b)
        assert len(str(refused.value)) < 800


def test_folders_tell_merged_sequences_apart():
    truth = video(["x/a/1.jpg", "x/b/1.jpg"], [1, 2], [70, 71])
    guess = video(["b/1.jpg", "c/1.jpg", "a/1.jpg"], [2, 9, 1], predicted=True)
    result = score(truth, guess)
    assert (result.mean, dict(result.matched)) == (100.0, {"file name and folder": 1})


def test_frames_of_nobody_need_no_prediction_and_those_with_people_do():
    truth = copy.deepcopy(TRUTH)
    truth["images"] += [{"id": 910, "file_name": "walk/000009.jpg"}]
    guess = video(names([2, 5, 6]), [2, 5, 6], predicted=True)
    result = score(truth, guess)
    assert (result.mean, result.num_frames_total) == (100.0, 4)
    assert result.notes == ["1 frame of nobody in the ground truth not predicted"]
    guess["images"].pop()
    guess["annotations"].pop()
    message = r"has 2 frames, and none for 1 of 3 frames with people in .*, e\.g\. 000006\.jpg; "
    with pytest.raises(ValueError, match=message):
        score(truth, guess)


def converted(numbers, nframes):
    """Ground truth that ``cmpose convert`` numbered from 0: every second frame of the source."""
    truth = video(names(numbers, "images/train/walk/{:06d}.jpg"), [2 * n for n in numbers], [7, 8])
    for image, n in zip(truth["images"], numbers, strict=True):
        image |= {"source": f"walk/{2 * n:06d}.jpg", "nframes": nframes}
    return truth


def test_frames_that_a_conversion_numbered_anew_are_matched_by_their_own_numbers():
    truth = converted([2, 3], 5)
    source = video(names(range(10)), range(10), predicted=True)
    result = score(truth, source)
    assert (result.mean, dict(result.matched)) == (100.0, {"file name in the source": 1})
    data_set = video(names(range(5)), range(0, 10, 2), predicted=True)
    result = score(truth, data_set)
    assert (result.mean, dict(result.matched)) == (100.0, {"file name": 1})
    itself = video([i["file_name"] for i in truth["images"]], [4, 6], [7, 8], predicted=True)
    result = score(truth, itself)
    assert (result.mean, dict(result.matched)) == (100.0, {"image id": 1})
    message = r"numbered anew when it was converted \(000001\.jpg was walk/000002\.jpg\), and which"
    with pytest.raises(ValueError, match=message):  # either the first of all, or of every second
        score(converted([1, 2], 5), video(names(range(5))[:-1], range(4), predicted=True))


def test_frames_counted_from_1_by_the_source():
    truth = video(names([0, 1], "images/train/walk/{:06d}.jpg"), [1, 2], [7, 8])
    for k, image in enumerate(truth["images"]):
        image |= {"source": f"walk/{k + 1:06d}.jpg", "nframes": 4}
    guess = video(names(range(1, 5)), range(1, 5), predicted=True)
    assert score(truth, guess).mean == 100.0


@pytest.mark.parametrize("track", [-1, 0, None])
def test_track_ids_of_one_value_are_none(track):
    """AP does not need them; trackers of a single frame, and exporters, leave all at -1 or 0."""
    truth = video(names([2]), [2], [5])
    truth["annotations"].append(person(5, pose(400)))
    guess = copy.deepcopy(truth)
    for k, entry in enumerate(guess["annotations"]):
        entry |= {"track_id": track, "scores": [0.5 + k / 10] * 17}
    assert score(truth, guess).mean == 100.0
    if track is not None:
        assert score(truth, annolist(guess)).mean == 100.0


def test_other_things_than_people_are_left_out_and_counted():
    truth = copy.deepcopy(TRUTH)
    truth["categories"] = [{"id": 3, "name": "car"}, *truth["categories"]]
    car = {"image_id": 900, "category_id": 3, "bbox": [1, 2, 3, 4]}
    truth["annotations"] += [car, car]
    result = score(truth, video(names([2, 5, 6]), [2, 5, 6], predicted=True))
    assert (result.mean, result.num_people) == (100.0, 3)
    assert result.notes == ["left out: 2 × not a person (category_id)"]


@pytest.mark.shared_data
def test_the_report_of_a_video_with_some_labels(tmp_path):
    """The same numbers as of predictions that hold the labelled frames alone."""
    folder = shared_data("reports", "score_superset")
    result = score_folders(folder / "gt", folder / "pred")
    [truth] = load_annotations(folder / "gt")
    [path] = (folder / "pred").glob("*.json")
    guess = json.loads(path.read_text())
    labelled = {frame.file_name[-10:] for frame in truth.frames}
    guess["images"] = [i for i in guess["images"] if i["file_name"][-10:] in labelled]
    ids = {image["id"] for image in guess["images"]}
    guess["annotations"] = [a for a in guess["annotations"] if a["image_id"] in ids]
    (tmp_path / path.name).write_text(json.dumps(guess))
    np.testing.assert_array_equal(result.ap, score_folders(folder / "gt", tmp_path).ap)
    assert "4 predicted frames without ground truth not scored" in result.notes[0]
