"""Results on clean, occluded and defocused frames, against a case worked by hand."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from cmpose.data.formats.posetrack import load_annotations, write_posetrack18
from cmpose.data.sequence import Frame, Person, Sequence
from cmpose.evaluation.posetrack_ap import score_folders
from cmpose.evaluation.predictions import write_predictions
from cmpose.evaluation.subsets import (
    SUBSETS,
    frames_by_subset,
    joint_errors,
    subset_results,
    subsets_of,
)

RECORDS = [
    {"occluded_joints": 0, "defocus_sigma": 0.0},
    {"occluded_joints": 2, "defocus_sigma": 0.0},
    {"occluded_joints": 0, "defocus_sigma": 1.5},
    {"occluded_joints": 1, "defocus_sigma": 0.5},
]
HEAD = np.array([0.0, 0.0, 30.0, 40.0])  # diagonal 50: distances are in 30 pixels, near is 15


@dataclass
class Record:
    sequence: Sequence
    frame: Frame
    person: Person | None
    box: np.ndarray
    score: float = 1.0


def frame_of(number, record):
    points = np.zeros((15, 3))
    points[:, 0], points[:, 1], points[:, 2] = 100 + 20 * np.arange(15), 100, 1
    person = Person(np.array([90.0, 50, 300, 100]), points, head_box=HEAD.copy(), track_id=0)
    extra = {} if record is None else {"cmpose": record}
    name = f"images/val/000001_mpii_test/{number:06d}.jpg"
    return Frame(10_000_010_000 + number, name, number, people=[person], extra=extra)


def written(tmp_path, records, offsets):
    """One person a frame, predicted ``offset`` pixels off in every joint: results."""
    name = "000001_mpii_test"
    sequence = Sequence(name, name, [frame_of(i, record) for i, record in enumerate(records)])
    truth, predictions = tmp_path / "truth", tmp_path / "predictions"
    write_posetrack18(truth / f"{name}.json", sequence)
    sequences = load_annotations(truth, tmp_path)
    people = [Record(sequences[0], f, f.people[0], f.people[0].box) for f in sequences[0].frames]
    keypoints = np.stack(
        [p.person.keypoints[:, :2] + [0.0, off] for p, off in zip(people, offsets, strict=True)]
    )
    write_predictions(predictions, sequences, people, keypoints, np.ones((len(people), 15)))
    ap = score_folders(truth, predictions).mean
    return subset_results(sequences, people, keypoints, truth, predictions, ap)


def test_what_a_frame_belongs_to():
    subsets = [sorted(subsets_of(frame_of(0, record))) for record in RECORDS]
    assert subsets == [
        ["all", "clean"],
        ["all", "occluded"],
        ["all", "defocused"],
        ["all", "defocused", "occluded"],
    ]
    assert subsets_of(frame_of(0, None)) == {"all"}


def test_ap_pckh_and_error_of_each_subset(tmp_path):
    """The clean and the doubly bad frame are right, the occluded and the defocused one wrong."""
    results = written(tmp_path, RECORDS, offsets=[3.0, 60.0, 90.0, 6.0])
    assert list(results) == list(SUBSETS)
    # One joint a frame and equal scores, ranked by frame. All: right, wrong, wrong, right of 4:
    # recall 1/4 at precision 1, then 2/4 at precision 2/4 = 25 + 12.5.
    # Occluded (frames 1, 3): wrong, right: recall 1/2 at precision 1/2. Defocused the same.
    assert {name: values["ap"] for name, values in results.items()} == pytest.approx(
        {"all": 37.5, "clean": 100.0, "occluded": 25.0, "defocused": 25.0}
    )
    assert {name: values["pckh"] for name, values in results.items()} == pytest.approx(
        {"all": 50.0, "clean": 100.0, "occluded": 50.0, "defocused": 50.0}
    )
    assert {name: values["error"] for name, values in results.items()} == pytest.approx(
        {"all": 33 / 30, "clean": 3 / 30, "occluded": 33 / 30, "defocused": 48 / 30}
    )
    assert [values["frames"] for values in results.values()] == [4, 1, 2, 2]
    assert [values["joints"] for values in results.values()] == [60, 15, 30, 30]


def test_data_without_records_has_one_subset(tmp_path):
    results = written(tmp_path, [None, None], offsets=[3.0, 60.0])
    assert list(results) == ["all"]
    assert results["all"]["ap"] == pytest.approx(50.0)


def test_a_subset_without_people_has_no_ap(tmp_path):
    sequence = Sequence("s", "s", [frame_of(0, RECORDS[0]), frame_of(1, RECORDS[1])])
    sequence.frames[1].people = []
    assert frames_by_subset([sequence]).keys() == {"all", "clean", "occluded"}
    write_posetrack18(tmp_path / "s.json", sequence)
    write_posetrack18(tmp_path / "p" / "s.json", sequence)
    person = sequence.frames[0].people[0]
    people = [Record(sequence, sequence.frames[0], person, person.box)]
    pose = person.keypoints[None, :, :2]
    result = subset_results([sequence], people, pose, tmp_path, tmp_path / "p", 100.0)
    assert result["occluded"] == {"ap": None, "pckh": None, "error": None, "frames": 0, "joints": 0}
    assert result["clean"]["ap"] == pytest.approx(100.0)


def test_errors_leave_out_unannotated_joints_and_detections():
    frame = frame_of(0, None)
    person = frame.people[0]
    person.keypoints[3:] = 0
    sequence = Sequence("s", "s", [frame])
    pose = person.keypoints[:, :2] + [9.0, 12.0]
    records = [Record(sequence, frame, p, person.box) for p in (person, None)]
    own, detected = joint_errors(records, np.stack([pose, pose]))
    assert own == pytest.approx([0.5, 0.5, 0.5])
    assert detected.size == 0
