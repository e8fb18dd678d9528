"""Keypoints: names, orders, left-right pairs and limbs; PoseTrack's, and those of a file.

A pose of PoseTrack has the 15 joints of the official order (PoseTrack17 ids, the order of the
evaluator). PoseTrack18 and 21 files have 17 slots, of which 3 and 4 (the ears) are never annotated;
``to_slots17`` adapts at the edge. A file whose category has ``flip_pairs``
describes keypoints of its own, any K ≥ 1 of them, in its own order: a :class:`Skeleton`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

Side = Literal["left", "right", "middle"]

JOINTS: tuple[str, ...] = (
    "right_ankle",
    "right_knee",
    "right_hip",
    "left_hip",
    "left_knee",
    "left_ankle",
    "right_wrist",
    "right_elbow",
    "right_shoulder",
    "left_shoulder",
    "left_elbow",
    "left_wrist",
    "head_bottom",
    "nose",
    "head_top",
)
"""The 15 joints in the official order; ``head_bottom`` is the neck."""

NUM_JOINTS = len(JOINTS)

SLOTS17: tuple[str, ...] = (
    "nose",
    "head_bottom",
    "head_top",
    "left_ear",
    "right_ear",
    "left_shoulder",
    "right_shoulder",
    "left_elbow",
    "right_elbow",
    "left_wrist",
    "right_wrist",
    "left_hip",
    "right_hip",
    "left_knee",
    "right_knee",
    "left_ankle",
    "right_ankle",
)
"""The slots of PoseTrack18 and 21 files (COCO's order with the eyes' slots re-used)."""

SLOT_OF_JOINT: tuple[int, ...] = tuple(SLOTS17.index(name) for name in JOINTS)
"""``SLOT_OF_JOINT[j]`` is the slot in a 17-slot file that holds joint ``j``."""

FLIP_PAIRS: tuple[tuple[int, int], ...] = ((0, 5), (1, 4), (2, 3), (6, 11), (7, 10), (8, 9))
"""Pairs of joints that swap when a picture is mirrored."""

LIMBS: tuple[tuple[int, int], ...] = (
    (0, 1),
    (1, 2),
    (2, 3),
    (3, 4),
    (4, 5),
    (2, 8),
    (3, 9),
    (8, 9),
    (6, 7),
    (7, 8),
    (9, 10),
    (10, 11),
    (8, 12),
    (9, 12),
    (12, 13),
    (13, 14),
)
"""Joint pairs that drawings connect."""

UPPER_BODY: tuple[int, ...] = (6, 7, 8, 9, 10, 11, 12, 13, 14)
LOWER_BODY: tuple[int, ...] = (0, 1, 2, 3, 4, 5)

CATEGORY = {
    "supercategory": "person",
    "id": 1,
    "name": "person",
    "keypoints": list(SLOTS17),
    "skeleton": [
        [16, 14],
        [14, 12],
        [17, 15],
        [15, 13],
        [12, 13],
        [6, 12],
        [7, 13],
        [6, 7],
        [6, 8],
        [7, 9],
        [8, 10],
        [9, 11],
        [2, 3],
        [1, 2],
        [1, 3],
        [2, 4],
        [3, 5],
        [4, 6],
        [5, 7],
    ],
}
"""The ``categories`` entry of a PoseTrack18 file."""

_SIDE_WORDS: dict[str, Side] = {"left": "left", "l": "left", "right": "right", "r": "right"}
_LOWER_WORDS = {"hip", "knee", "ankle", "foot", "heel", "toe", "thigh", "shin", "leg"}


@dataclass(frozen=True)
class Skeleton:
    """The K keypoints of a data set; keypoints are meant by their index.

    Attributes:
        keypoints: their names, all different.
        limbs: pairs that drawings connect.
        flip_pairs: pairs that swap when a picture is mirrored; the others stay.
        upper_body: what a half-body crop may show; without both halves there are none.
        lower_body: likewise.
    """

    keypoints: tuple[str, ...]
    limbs: tuple[tuple[int, int], ...] = ()
    flip_pairs: tuple[tuple[int, int], ...] = ()
    upper_body: tuple[int, ...] = ()
    lower_body: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.keypoints)

    @cached_property
    def flip_permutation(self) -> tuple[int, ...]:
        """``flipped[j] = pose[flip_permutation[j]]``."""
        permutation = list(range(len(self)))
        for a, b in self.flip_pairs:
            permutation[a], permutation[b] = b, a
        return tuple(permutation)

    @cached_property
    def sides(self) -> tuple[Side, ...]:
        """Of the body, as the names say it; ``middle`` where they do not."""
        return tuple(side_and_rest(name)[0] for name in self.keypoints)

    @cached_property
    def unpaired(self) -> tuple[str, ...]:
        """Names of a side that no flip pair has: a mirrored picture would teach them wrongly."""
        paired = {j for pair in self.flip_pairs for j in pair}
        return tuple(
            name
            for j, (name, side) in enumerate(zip(self.keypoints, self.sides, strict=True))
            if side != "middle" and j not in paired
        )

    def category(self) -> dict[str, Any]:
        """The entry of ``categories`` that :mod:`cmpose.data.formats.skeleton` reads back."""

        def named(indices: Sequence[int]) -> list[str]:
            return [self.keypoints[j] for j in indices]

        return {
            "supercategory": "person",
            "id": 1,
            "name": "person",
            "keypoints": list(self.keypoints),
            "skeleton": [[a + 1, b + 1] for a, b in self.limbs],
            "flip_pairs": [named(pair) for pair in self.flip_pairs],
            "upper_body": named(self.upper_body),
            "lower_body": named(self.lower_body),
        }


POSETRACK = Skeleton(JOINTS, LIMBS, FLIP_PAIRS, UPPER_BODY, LOWER_BODY)
"""The default: PoseTrack's 15 joints."""

FLIP_PERMUTATION = POSETRACK.flip_permutation
"""``flipped[j] = pose[FLIP_PERMUTATION[j]]``, of PoseTrack's joints."""


def default_skeleton(num_keypoints: int) -> Skeleton:
    """PoseTrack's for 15 keypoints, else nameless ones that mirroring and drawings leave alone."""
    if num_keypoints == NUM_JOINTS:
        return POSETRACK
    return Skeleton(tuple(f"keypoint_{j}" for j in range(1, num_keypoints + 1)))


def is_lower(name: str) -> bool:
    """Whether a keypoint is of the lower body, as its name says it."""
    return bool(_LOWER_WORDS & set(_words(name)))


def _words(name: str) -> list[str]:
    """``left_knee``, ``LKnee``, ``knee-l`` → their words in lower case."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return [word for word in re.split(r"[^A-Za-z0-9]+", parted.lower()) if word]


def side_and_rest(name: str) -> tuple[Side, tuple[str, ...]]:
    """A name's side, and its words with the side's left open."""
    words = _words(name)
    for position, word in enumerate(words):
        if word in _SIDE_WORDS:
            return _SIDE_WORDS[word], (*words[:position], "", *words[position + 1 :])
    return "middle", tuple(words)


def to_slots17(values: np.ndarray) -> np.ndarray:
    """[..., 15, C] in ``JOINTS`` order → [..., 17, C] in ``SLOTS17`` order, ears zero."""
    values = np.asarray(values)
    slots = np.zeros((*values.shape[:-2], len(SLOTS17), values.shape[-1]), values.dtype)
    slots[..., list(SLOT_OF_JOINT), :] = values
    return slots
