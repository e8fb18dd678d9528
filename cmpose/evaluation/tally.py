"""Which predicted joints are right, frame by frame, and the average precision that follows."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import shapely

from cmpose.evaluation.pose_files import MISSING_SCORE, FramePoses

THRESHOLD = 0.5
"""A joint is right within this many head sizes."""

BOX_THRESHOLD = 0.1
"""Without head sizes a joint is right within this share of the longer side of the person's box."""

Reference = Literal["head", "box"]


class Tally:
    """Counts people and joints, and collects every predicted joint's score and whether it is right.

    Args:
        num_keypoints: K.
        reference: the length that distances are measured in.

    Attributes:
        frames: frames with annotated people.
        people: annotated people with a joint outside the ignore regions.
        predictions: predicted people of whom the same holds.
        no_score: predicted joints without a score.
        no_size: annotated people whose head box or box has size 0.
    """

    def __init__(self, num_keypoints: int, reference: Reference) -> None:
        self.reference = reference
        self.frames = self.people = self.predictions = self.no_score = self.no_size = 0
        self._annotated = np.zeros(num_keypoints, np.int64)
        self._scores: list[np.ndarray] = []  # each [P, K], NaN where a joint is not predicted
        self._right: list[np.ndarray] = []

    def add_frame(self, real: FramePoses, guess: FramePoses, where: str) -> None:
        """Takes in a frame; one without annotated people is left out.

        Args:
            real: its annotated people.
            guess: its predicted people.
            where: names the frame in messages.

        Raises:
            ValueError: an annotated person lacks the box that distances are measured in.
        """
        if real.annotated == 0:
            return
        self.frames += 1
        regions = real.ignore_regions
        real, guess = _outside(real, regions), _outside(guess, regions)
        lengths = real.head_size if self.reference == "head" else real.box_size
        if np.isnan(lengths).any():
            missing = (
                "head box (bbox_head; x1, y1, x2, y2 in PoseTrack17); the AP's distances are in "
                "head sizes. --reference box measures in boxes"
                if self.reference == "head"
                else "box (bbox: x, y, w, h); the distances are in shares of it"
            )
            raise ValueError(f"{where} has a person with joints but no {missing}")
        self.people += len(real.xy)
        self.predictions += len(guess.xy)
        self.no_size += int((lengths == 0).sum())
        predicted = ~np.isnan(guess.xy[..., 0])
        self.no_score += int(((guess.scores == MISSING_SCORE) & predicted).sum())
        annotated = ~np.isnan(real.xy[..., 0])  # [G, K]
        self._annotated += annotated.sum(axis=0)
        if len(guess.xy):
            self._right.append(self._right_joints(real.xy, guess.xy, lengths))
            self._scores.append(np.where(predicted, guess.scores, np.nan))

    def _right_joints(self, real: np.ndarray, guess: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Assigns predicted to annotated people, and says which joints are right.

        Args:
            real: [G, K, 2] annotated joints, NaN where there is none.
            guess: [P, K, 2] predicted joints, likewise.
            lengths: [G] what distances are measured in.

        Returns:
            bool [P, K].
        """
        right = np.zeros(guess.shape[:2], bool)
        if not len(real):
            return right
        threshold = THRESHOLD if self.reference == "head" else BOX_THRESHOLD
        offset = guess[:, None] - real[None]  # NaN unless both joints exist
        pixels = np.sqrt(np.square(offset).sum(axis=-1))
        with np.errstate(divide="ignore", invalid="ignore"):
            near = pixels / lengths[None, :, None] <= threshold  # [P, G, K]
        annotated = ~np.isnan(real[..., 0])
        pck = near.sum(axis=2) / annotated.sum(axis=1)
        best_person = pck.argmax(axis=1)
        only_best = np.zeros_like(pck)
        rows = np.arange(len(guess))
        only_best[rows, best_person] = pck[rows, best_person]
        assigned = only_best.argmax(axis=0)  # of each annotated person: its prediction
        for g in np.flatnonzero(only_best.max(axis=0) > 0):
            right[assigned[g]] = near[assigned[g], g]
        return right

    def average_precision(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """AP, precision and recall of each joint, each float64 [K] in percent."""
        count = len(self._annotated)
        scores = np.concatenate([np.empty((0, count)), *self._scores])
        right = np.concatenate([np.empty((0, count), bool), *self._right])
        ap, precision, recall = np.zeros((3, count))
        if self.reference == "box":
            ap[self._annotated == 0] = math.nan
        for j in range(count):
            predicted = ~np.isnan(scores[:, j])
            if predicted.any():
                ap[j], precision[j], recall[j] = _area_under_curve(
                    scores[predicted, j], right[predicted, j], int(self._annotated[j])
                )
        return 100 * ap, 100 * precision, 100 * recall


def _area_under_curve(
    scores: np.ndarray, right: np.ndarray, annotated: int
) -> tuple[float, float, float]:
    """AP over all recall changes (VOC 2010), and the last precision and recall."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(right[order])
    precision = hits / np.arange(1, len(hits) + 1)
    if annotated == 0:
        return math.nan, float(precision[-1]), math.nan
    recall = hits / annotated
    envelope = np.maximum.accumulate(np.append(precision, 0.0)[::-1])[::-1]
    edges = np.concatenate([[0.0], recall, [1.0]])
    ap = float(np.sum(np.diff(edges) * envelope))
    return ap, float(precision[-1]), float(recall[-1])


def _outside(frame: FramePoses, regions: list[np.ndarray]) -> FramePoses:
    """Without the joints inside a region (its border is outside), and people who have none left."""
    xy = frame.xy
    if regions and len(xy):
        present = ~np.isnan(xy[..., 0])
        points = shapely.points(xy[present])
        inside = np.zeros(len(points), bool)
        for region in regions:
            inside |= shapely.contains(shapely.Polygon(region), points)
        xy = xy.copy()
        xy[present] = np.where(inside[:, None], np.nan, xy[present])
    has_joints = ~np.isnan(xy[..., 0]).all(axis=1)
    return FramePoses(
        frame.name,
        frame.image_id,
        xy[has_joints],
        frame.scores[has_joints],
        frame.head_size[has_joints],
        frame.box_size[has_joints],
        frame.annotated,
        frame.ignore_regions,
    )
