"""Annotations of a rendered frame: which joints a person who labels it could tell."""

from __future__ import annotations

from typing import Any

import numpy as np

from cmpose.data.sequence import Frame, Person, box_of_keypoints
from cmpose.data.skeleton import JOINTS, LIMBS, NUM_JOINTS

MIN_JOINTS = 3
"""A person with fewer joints that show becomes an ignore region."""

FIRST_OCCLUDER = 200
"""Owner numbers of occluders start here; people count from 1."""

_NEIGHBOURS = [[b if a == j else a for a, b in LIMBS if j in (a, b)] for j in range(NUM_JOINTS)]


def annotate(
    frame: Frame,
    owners_of_pixels: np.ndarray,
    drawn: dict[int, dict[str, np.ndarray]],
    order: list[int],
    motions: list[str],
) -> dict[str, Any]:
    """Fills in a frame's people and ignore regions.

    Args:
        frame: the frame, with its size.
        owners_of_pixels: uint8 [H, W]; who or what each pixel shows.
        drawn: owner number of each person → what ``Actor.draw`` returned.
        order: all owner numbers, far to near.
        motions: of the people, by owner number minus 1.

    Returns:
        What happened to the people: who was hidden by what (``docs/rendered.md``).
    """
    height, width = owners_of_pixels.shape
    people: list[dict[str, Any]] = []
    by_thing = by_person = 0
    for owner, flat in sorted(drawn.items()):
        points = np.round(np.stack([flat[name] for name in JOINTS]), 3)
        inside = ((points >= 0) & (points <= [width - 1, height - 1])).all(1)
        nearer = order[order.index(owner) + 1 :]
        hidden = np.zeros(NUM_JOINTS, bool)
        for j in np.flatnonzero(inside):
            top = int(owners_of_pixels[int(points[j, 1] + 0.5), int(points[j, 0] + 0.5)])
            if top in nearer:
                hidden[j] = True
                by_thing += top >= FIRST_OCCLUDER
                by_person += top < FIRST_OCCLUDER
        visible = inside & ~hidden
        # A hidden joint can be told from a neighbour that shows; if none does, it cannot.
        inferable = np.array([visible[_NEIGHBOURS[j]].any() for j in range(NUM_JOINTS)])
        annotated = visible | (inside & hidden & inferable)
        if visible.sum() < MIN_JOINTS:
            _ignore(frame, points, (height, width))
            continue
        keypoints = np.concatenate([points, annotated[:, None]], 1) * annotated[:, None]
        frame.people.append(
            Person(
                box=box_of_keypoints(keypoints, 1.3, 0),
                keypoints=keypoints,
                head_box=np.round(flat["head_box"], 3),
                track_id=owner - 1,
            )
        )
        people.append(
            {
                "track_id": owner - 1,
                "motion": motions[owner - 1],
                "occluded_joints": [JOINTS[j] for j in np.flatnonzero(hidden)],
            }
        )
    return {
        "occluder": bool(by_thing),
        "crossing": bool(by_person),
        "occluded_joints": int(by_thing + by_person),
        "people": people,
    }


def _ignore(frame: Frame, points: np.ndarray, size: tuple[int, int]) -> None:
    """Covers what shows of a person nobody could annotate by an ignore rectangle."""
    last = np.array(size)[::-1] - 1
    edge = 0.1 * float(np.ptp(points[:, 1]))
    low = np.round(np.clip(points.min(0) - edge, 0, last), 1)
    high = np.round(np.clip(points.max(0) + edge, 0, last), 1)
    if (high - low > 1).all():
        corners = [low, [high[0], low[1]], high, [low[0], high[1]]]
        frame.ignore_regions.append(np.array(corners))
