"""Results of a video of any length: frame by frame into PoseTrack18's and COCO's files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from cmpose.data.sequence import Frame, Person, Sequence
from cmpose.data.skeleton import POSETRACK, Skeleton, to_slots17
from cmpose.evaluation.predictions import ScoreRule, predicted_sequences
from cmpose.files import whole_file


class _Record(NamedTuple):
    """Whose pose it is, for ``predicted_sequences``."""

    sequence: Sequence
    frame: Frame
    person: Person | None
    box: np.ndarray
    score: float


def predicted_frame(
    frame: Frame,
    people: Iterable[Mapping[str, Any]],
    sequence: str,
    rule: ScoreRule,
    skeleton: Skeleton = POSETRACK,
) -> Frame:
    """A frame with its predicted people, by the rules of ``predicted_sequences``.

    Args:
        frame: without people.
        people: plain data: ``track_id``, ``score`` and ``box`` (x, y, width, height), ``keypoints``
            [K, 2] in image pixels and ``scores`` [K], the heatmaps' maxima.
        sequence: the video's name.
        rule: for joint scores.
        skeleton: what the K keypoints are.

    Raises:
        ValueError: a number that is not finite.
    """
    people = list(people)
    owner = Sequence(name=sequence, file_stem=sequence, frames=[frame], skeleton=skeleton)
    records = []
    for person in people:
        box = np.asarray(person["box"], np.float64)
        someone = Person(box=box, track_id=person["track_id"])
        records.append(_Record(owner, frame, someone, box, person["score"]))
    if not records:
        return frame
    keypoints = np.array([person["keypoints"] for person in people])
    scores = np.array([person["scores"] for person in people])
    [predicted] = predicted_sequences([owner], records, keypoints, scores, rule)
    return predicted.frames[0]


def write_coco_results(
    path: str | os.PathLike[str], frames: Iterable[Frame], skeleton: Skeleton = POSETRACK
) -> None:
    """Writes COCO's list of keypoint results, whole or not at all, holding one frame at a time.

    Each person is an entry: ``image_id``, ``category_id`` 1, ``bbox``, ``keypoints``, ``score``
    (the mean of the joints' scores) and ``track_id``. ``keypoints`` has x, y and score of each of
    PoseTrack18's 17 slots, (0, 0, 0) where a slot has no joint; or of each keypoint of another
    skeleton.

    Args:
        path: of the file; parent folders are made.
        frames: with predicted people.
        skeleton: what their keypoints are.
    """
    with whole_file(path, "run the same command again") as partial, open(partial, "w") as file:
        lead = "[\n"
        for frame in frames:
            for person in frame.people:
                entry = json.dumps(_coco_result(frame, person, skeleton), allow_nan=False)
                file.write(f"{lead}{entry}")
                lead = ",\n"
        file.write("[]\n" if lead == "[\n" else "\n]\n")


def _coco_result(frame: Frame, person: Person, skeleton: Skeleton) -> dict[str, Any]:
    assert person.joint_scores is not None
    scores = np.asarray(person.joint_scores, np.float64)
    pose = np.concatenate([person.keypoints[:, :2], scores[:, None]], axis=1)
    if skeleton == POSETRACK:
        pose = to_slots17(pose)
    return {
        "image_id": frame.image_id,
        "category_id": 1,
        "bbox": np.asarray(person.box, np.float64).tolist(),
        "keypoints": pose.ravel().tolist(),
        "score": float(scores.mean()),
        "track_id": person.track_id,
    }
