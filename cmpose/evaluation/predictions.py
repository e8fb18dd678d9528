"""Predicted poses as PoseTrack18 files that the evaluator, and the official tool, read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from cmpose.data.formats.posetrack import write_posetrack18
from cmpose.data.sequence import Frame, Person, Sequence
from cmpose.data.skeleton import POSETRACK, Skeleton

ScoreRule = Literal["heatmap_box", "heatmap"]


class PoseRecord(Protocol):
    """Says whose pose it is; the items of ``ClipDataset.records`` have these fields.

    Attributes:
        sequence: the video; matched by its ``file_stem``.
        frame: of that video; matched by its ``image_id``.
        person: the annotated or tracked person, whose ``track_id`` the pose gets, or None.
        box: [4] x, y, width, height in image pixels that the crop was made from.
        score: of the box; 1 for ground truth.
    """

    @property
    def sequence(self) -> Sequence: ...
    @property
    def frame(self) -> Frame: ...
    @property
    def person(self) -> Person | None: ...
    @property
    def box(self) -> np.ndarray: ...
    @property
    def score(self) -> float: ...


def predicted_sequences(
    sequences: Items[Sequence],
    records: Items[PoseRecord],
    keypoints: np.ndarray,
    scores: np.ndarray,
    rule: ScoreRule = "heatmap_box",
) -> list[Sequence]:
    """The given sequences with the predicted people in their frames.

    Frames without a person stay. A joint's score is its heatmap's maximum times the box's score
    (``heatmap_box``, as in DCPose) or the maximum alone (``heatmap``, as in mmpose); joints are
    ranked by it, so that it decides the AP. A person's score is the box's score. A track_id that
    is missing, or that an earlier person of the frame has, becomes the smallest free number.

    Args:
        sequences: as loaded from the ground truth, or made for a video.
        records: R of them, in any order, which the people of a frame keep.
        keypoints: [R, K, 2] image pixels, in the order of the sequences' skeleton; they may lie
            outside the image.
        scores: [R, K] heatmap maxima.
        rule: what a joint's score is.

    Raises:
        ValueError: a wrong shape or rule, a record of an unknown sequence or frame, or a number
            that is not finite.
    """
    if rule not in ("heatmap_box", "heatmap"):
        raise ValueError(f"rule must be 'heatmap_box' or 'heatmap', got {rule!r}")
    keypoints, scores = np.asarray(keypoints, np.float64), np.asarray(scores, np.float64)
    skeleton = sequences[0].skeleton if sequences else POSETRACK
    for name, values, shape in (
        ("keypoints", keypoints, (len(records), len(skeleton), 2)),
        ("scores", scores, (len(records), len(skeleton))),
    ):
        if values.shape != shape:
            raise ValueError(
                f"{name} must have shape {shape} for {len(records)} records, got {values.shape}"
            )
    frames = {(s.file_stem, frame.image_id) for s in sequences for frame in s.frames}
    people: dict[tuple[str, int], list[Person]] = defaultdict(list)
    for record, pose, maxima in zip(records, keypoints, scores, strict=True):
        key = (record.sequence.file_stem, record.frame.image_id)
        where = f"pose in frame {record.frame.file_name} of sequence {key[0]!r}"
        if key not in frames:
            raise ValueError(f"{where}: the sequences have no such frame (image id {key[1]})")
        people[key].append(_person(record, pose, maxima, rule, skeleton, where))
    for group in people.values():
        _make_track_ids_unique(group)
    return [
        Sequence(
            name=sequence.name,
            file_stem=sequence.file_stem,
            nframes=sequence.nframes,
            skeleton=sequence.skeleton,
            frames=[
                Frame(
                    image_id=frame.image_id,
                    file_name=frame.file_name,
                    index=frame.index,
                    labeled=frame.labeled,
                    people=people.get((sequence.file_stem, frame.image_id), []),
                    width=frame.width,
                    height=frame.height,
                )
                for frame in sequence.frames
            ],
        )
        for sequence in sequences
    ]


def write_predictions(
    folder: str | Path,
    sequences: Items[Sequence],
    records: Items[PoseRecord],
    keypoints: np.ndarray,
    scores: np.ndarray,
    rule: ScoreRule = "heatmap_box",
) -> list[Path]:
    """Writes one PoseTrack18 file a sequence, named as its ground truth, whole or not at all.

    The arguments and errors are those of :func:`predicted_sequences`.

    Returns:
        The files' paths.
    """
    paths = []
    for sequence in predicted_sequences(sequences, records, keypoints, scores, rule):
        path = Path(folder) / f"{sequence.file_stem}.json"
        write_posetrack18(path, sequence)
        paths.append(path)
    return paths


def _person(
    record: PoseRecord,
    pose: np.ndarray,
    maxima: np.ndarray,
    rule: ScoreRule,
    skeleton: Skeleton,
    where: str,
) -> Person:
    wrong = np.flatnonzero(~np.isfinite(pose).all(axis=1) | ~np.isfinite(maxima))
    if wrong.size:
        joint = wrong[0]
        raise ValueError(
            f"{where}: {skeleton.keypoints[joint]} is not finite: position "
            f"{pose[joint].tolist()}, score {maxima[joint]}; look for NaN in the model's heatmaps"
        )
    box, score = np.asarray(record.box, np.float64), float(record.score)
    if not (np.isfinite(box).all() and np.isfinite(score)):
        raise ValueError(f"{where}: box {box.tolist()} or its score {score} is not finite")
    # With v = 0 a joint predicted at exactly (0, 0) would be read as not annotated.
    visible = np.ones((len(skeleton), 1))
    return Person(
        box=box,
        keypoints=np.concatenate([pose, visible], axis=1),
        track_id=-1 if record.person is None else record.person.track_id,
        score=score,
        joint_scores=maxima * score if rule == "heatmap_box" else maxima,
    )


def _make_track_ids_unique(people: list[Person]) -> None:
    used: set[int] = set()
    without_id = []
    for person in people:
        if person.track_id < 0 or person.track_id in used:
            without_id.append(person)
        else:
            used.add(person.track_id)
    free = 0
    for person in without_id:
        while free in used:
            free += 1
        person.track_id = free
        used.add(free)
