"""Poses as a table, one row a person and frame, and the angles of joints."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cmpose.data.skeleton import Skeleton
from cmpose.files import whole_file
from cmpose.predict.frame import PredictedFrame

_TRIPLES = {
    "elbow": ("shoulder", "wrist"),
    "shoulder": ("hip", "elbow"),
    "hip": ("shoulder", "knee"),
    "knee": ("hip", "ankle"),
}
"""A joint, and the joints of the same side that its angle is between."""

_COLUMNS = ("frame", "seconds", "track_id", "score", "interpolated", "x", "y", "width", "height")


def angle_joints(skeleton: Skeleton) -> dict[str, tuple[int, int, int]]:
    """The joints of each angle: its name → (one end, the joint that it is at, the other end).

    They are elbows, shoulders, hips and knees, by the keypoints' names. Of a skeleton without these
    names it is every keypoint at which two limbs meet.
    """
    index = {name: j for j, name in enumerate(skeleton.keypoints)}
    angles = {}
    for side in ("left", "right"):
        for joint, ends in _TRIPLES.items():
            first, middle, last = (index.get(f"{side}_{n}", -1) for n in (ends[0], joint, ends[1]))
            if min(first, middle, last) >= 0:
                angles[f"{side}_{joint}"] = (first, middle, last)
    if angles:
        return angles
    degree = Counter(j for limb in skeleton.limbs for j in limb)
    for j, name in enumerate(skeleton.keypoints):
        if degree[j] == 2:
            first, last = (a + b - j for a, b in skeleton.limbs if j in (a, b))
            angles[name] = (first, j, last)
    return angles


def joint_angles(
    keypoints: np.ndarray, scores: np.ndarray, skeleton: Skeleton, keypoint_score: float = 0.0
) -> dict[str, np.ndarray]:
    """Angles between the two limbs at a joint, in the picture's plane.

    Args:
        keypoints: [P, K, 2].
        scores: [P, K].
        skeleton: what the K keypoints are.
        keypoint_score: an angle of which a keypoint has a lower score is not known.

    Returns:
        Joint → degrees [P] from 0, folded, to 180, stretched; NaN where it is not known.
    """
    angles = {}
    for name, (a, b, c) in angle_joints(skeleton).items():
        u, v = keypoints[:, a] - keypoints[:, b], keypoints[:, c] - keypoints[:, b]
        cross, dot = u[:, 0] * v[:, 1] - u[:, 1] * v[:, 0], (u * v).sum(axis=1)
        known = (scores[:, [a, b, c]] >= keypoint_score).all(axis=1)
        known &= u.any(axis=1) & v.any(axis=1)
        angles[name] = np.where(known, np.degrees(np.arctan2(np.abs(cross), dot)), np.nan)
    return angles


def columns(skeleton: Skeleton) -> list[str]:
    """The table's: who and where, each keypoint's x, y and score, and the angles in degrees."""
    keypoints = [f"{name}_{value}" for name in skeleton.keypoints for value in ("x", "y", "score")]
    return [*_COLUMNS, *keypoints, *(f"{name}_angle" for name in angle_joints(skeleton))]


def rows(
    frame: PredictedFrame, number: int, seconds: float, skeleton: Skeleton, keypoint_score: float
) -> Iterator[list[Any]]:
    """A frame's rows, in the order of ``columns``.

    Args:
        frame: with its people.
        number: the frame's, for people.
        seconds: from the video's beginning.
        skeleton: what the keypoints are.
        keypoint_score: see ``joint_angles``.
    """
    for person in frame.people:
        angles = joint_angles(person.keypoints[None], person.scores[None], skeleton, keypoint_score)
        yield [
            number,
            round(seconds, 6),
            person.track_id,
            person.score,
            person.interpolated,
            *person.box.tolist(),
            *np.column_stack([person.keypoints, person.scores]).ravel().tolist(),
            *(round(float(angle[0]), 2) for angle in angles.values()),
        ]


def write_csv(path: Path, skeleton: Skeleton, table: Iterable[list[Any]]) -> None:
    """Writes ``rows`` below their ``columns``; an angle that is not known is empty.

    Raises:
        OutputError: the disk is full.
    """
    with whole_file(path) as partial, open(partial, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns(skeleton))
        for row in table:
            writer.writerow(["" if value != value else value for value in row])
