"""From a network's output to people's boxes."""

from __future__ import annotations

import numpy as np

from cmpose.predict.detectors.detect import Detection, suppress

_LEAST_SCORE, _MOST = 0.05, 100
"""Boxes of a lower score are left out, and of more boxes than that the weakest."""

_MAX_OVERLAP = 0.65
"""Of two boxes that overlap more, the weaker one is the same person again."""


def person_rows(boxes: np.ndarray, scores: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The boxes of people in a picture, best first, each person once.

    Args:
        boxes: [N, 4], x1, y1, x2, y2 in pixels of the picture.
        scores: [N], that each is a person.
        size: (width, height) of the picture.

    Returns:
        float64 [P, 5]: x1, y1, x2, y2 inside the picture, and the score.
    """
    boxes, scores = np.asarray(boxes, np.float64), np.asarray(scores, np.float64)
    boxes = np.clip(boxes, 0, np.array([*size, *size], np.float64))
    sides = boxes[:, 2:] - boxes[:, :2]
    usable = np.isfinite(boxes).all(axis=1) & (sides > 0).all(axis=1) & (scores >= _LEAST_SCORE)
    best = [i for i in np.argsort(-scores, kind="stable") if usable[i]][:_MOST]
    candidates = [
        Detection(np.concatenate([boxes[i, :2], sides[i]]), float(scores[i])) for i in best
    ]
    people = suppress(candidates, _MAX_OVERLAP, 1.0)
    rows = [[*d.box[:2], *(d.box[:2] + d.box[2:]), min(1.0, d.score)] for d in people]
    return np.array(rows, np.float64).reshape(-1, 5)


def corners(boxes: np.ndarray) -> np.ndarray:
    """Centre x, y, width and height [N, 4] → x1, y1, x2, y2."""
    return np.hstack([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2])


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))
