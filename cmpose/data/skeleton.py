"""PoseTrack's joints: names, orders, left-right pairs and limbs.

Inside cmpose a pose has the 15 joints of the official PoseTrack order (PoseTrack17 ids, the
order of the evaluator). PoseTrack18 and 21 files have 17 slots, of which 3 and 4 (the ears) are
never annotated; ``to_slots17`` and ``from_slots17`` adapt at the edge.
"""

from __future__ import annotations

import numpy as np

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


def _flip_permutation() -> tuple[int, ...]:
    permutation = list(range(NUM_JOINTS))
    for a, b in FLIP_PAIRS:
        permutation[a], permutation[b] = b, a
    return tuple(permutation)


FLIP_PERMUTATION = _flip_permutation()
"""``flipped[j] = pose[FLIP_PERMUTATION[j]]``."""

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


def to_slots17(values: np.ndarray) -> np.ndarray:
    """[..., 15, C] in ``JOINTS`` order → [..., 17, C] in ``SLOTS17`` order, ears zero."""
    values = np.asarray(values)
    slots = np.zeros((*values.shape[:-2], len(SLOTS17), values.shape[-1]), values.dtype)
    slots[..., list(SLOT_OF_JOINT), :] = values
    return slots


def from_slots17(slots: np.ndarray) -> np.ndarray:
    """[..., 17, C] in ``SLOTS17`` order → [..., 15, C] in ``JOINTS`` order (ears dropped)."""
    return np.asarray(slots)[..., list(SLOT_OF_JOINT), :]
