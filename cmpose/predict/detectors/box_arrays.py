"""People's boxes from the caller: arrays for each frame, or a detector of their own."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cmpose.data.formats.boxes import EMPTY, BoxCounts, check_units, low_score
from cmpose.data.formats.messages import short
from cmpose.data.transforms import clean_box
from cmpose.predict.detectors.detect import Detection, VideoDetections, check_boxes

Boxes = Sequence[Any] | Mapping[int, Any]
"""For each frame, by its number, an array [P, 4], [P, 5] or [P, 6]; see ``box_rows``."""

Detector = Callable[[np.ndarray], Any]
"""Gives the boxes, as ``box_rows`` takes them, in a picture, uint8 RGB [H, W, 3]."""

_DEFAULTS = np.array([np.nan, np.nan, np.nan, np.nan, 1.0, -1.0])
"""A column's value where it is left out, which the first four never are."""

_COLUMNS = "x1, y1, x2, y2 in pixels, then a score, then a track id; the last two may be left out"


def box_rows(boxes: Any, where: str) -> np.ndarray:
    """Checks the boxes of a frame.

    Args:
        boxes: [P, 4], [P, 5] or [P, 6], an array, a tensor or lists: x1, y1, x2, y2 in pixels, a
            score (else 1), a track id (else none, or -1). Empty, or None, is nobody.
        where: what messages begin with, such as ``boxes[3]``.

    Returns:
        float64 [P, 6], all columns there.

    Raises:
        ValueError: another shape, a number that is not finite, a box without area, a track id that
            is no whole number, or one that is there twice.
    """
    if boxes is None:
        return np.zeros((0, 6))
    if hasattr(boxes, "detach"):  # a tensor of torch's, on any device
        boxes = boxes.detach().cpu().double().numpy()
    try:
        table = np.asarray(boxes, np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: {short(boxes)} are no boxes; a row is {_COLUMNS}") from None
    if not table.size:
        return np.zeros((0, 6))
    if table.ndim != 2 or not 4 <= table.shape[1] <= 6:
        raise ValueError(f"{where}: has the shape {list(table.shape)}; a row is {_COLUMNS}")
    if not np.isfinite(table).all():
        row = int(np.argmin(np.isfinite(table).all(axis=1)))
        raise ValueError(f"{where}, row {row}: {table[row].tolist()} is not finite")
    flat = (table[:, 2:4] <= table[:, :2]).any(axis=1)
    if flat.any():
        row = int(np.argmax(flat))
        raise ValueError(
            f"{where}, row {row}: {table[row].tolist()} has no area; a row is {_COLUMNS} (not x, "
            "y, width, height)"
        )
    rows = np.hstack([table, np.tile(_DEFAULTS[table.shape[1] :], (len(table), 1))])
    ids = rows[:, 5]
    if (ids != np.round(ids)).any() or (np.abs(ids) >= 2**53).any():
        raise ValueError(f"{where}: track ids {ids.tolist()}: must be whole numbers")
    named = ids[ids >= 0]
    if len(np.unique(named)) < len(named):
        raise ValueError(f"{where}: track ids {ids.tolist()}: one is there twice")
    return rows


def detections_of(boxes: Any, where: str) -> list[Detection]:
    """The boxes of a frame, as ``box_rows`` takes them, best first."""
    rows = box_rows(boxes, where)
    order = np.argsort(-rows[:, 4], kind="stable")
    return [
        Detection(np.array([x1, y1, x2 - x1, y2 - y1]), float(score), max(-1, int(track)))
        for x1, y1, x2, y2, score, track in rows[order]
    ]


class BoxArrays:
    """The boxes of a video's frames, checked when they are given.

    Attributes:
        rows: float64 [D, 6], see ``box_rows``.
        frames: int64 [D], the number of each row's frame, or its position.
    """

    def __init__(self, boxes: Boxes | np.ndarray) -> None:
        """
        Args:
            boxes: for each frame its boxes: a sequence from the first frame on, or a mapping from
                frames' numbers. One array [P, 4 to 6] is of the first frame.

        Raises:
            ValueError: see ``box_rows``; a frame's number that is no whole number of 0 or more.
        """
        if getattr(boxes, "ndim", 0) == 2:
            boxes = [boxes]
        self._by_position = not isinstance(boxes, Mapping)
        if not isinstance(boxes, Mapping):
            boxes = dict(enumerate(boxes))
        for frame in boxes:
            if isinstance(frame, bool) or not isinstance(frame, int | np.integer) or frame < 0:
                raise ValueError(f"boxes: {short(frame)}: a frame's number is 0 or more")
        parts = {int(f): box_rows(rows, f"boxes[{f}]") for f, rows in sorted(boxes.items())}
        self.rows = np.concatenate([np.zeros((0, 6)), *parts.values()])
        self.frames = np.repeat(np.array([*parts], np.int64), [len(p) for p in parts.values()])

    def digest(self) -> str:
        """By which other boxes can be told apart."""
        content = self.frames.tobytes() + self.rows.tobytes()
        return hashlib.sha256(content).hexdigest()[:16]

    def detections(
        self,
        num_frames: int | None,
        *,
        numbers: tuple[int, ...],
        size: tuple[int, int],
        min_score: float,
    ) -> VideoDetections:
        """The boxes that are used: as ``load_video_detections`` does it with a file's.

        Raises:
            ValueError: no box, boxes of frames that are not there, track ids for some alone, or
                boxes outside of the picture or in other units.
        """
        name = Path("boxes")
        if not len(self.rows):
            raise ValueError("boxes: none in any frame; leave them out to have people detected")
        tracked = int((self.rows[:, 5] >= 0).sum())
        if tracked not in (0, len(self.rows)):
            raise ValueError(
                f"boxes: {tracked} of {len(self.rows)} have a track id; give all of them one, or "
                "none to have them linked by overlap"
            )
        counts = BoxCounts(name, "min_score")
        enough = self.rows[:, 4] >= min_score
        counts.left_out[low_score(min_score)] += int((~enough).sum())
        frames, rows = self.frames[enough], self.rows[enough]
        boxes = np.hstack([rows[:, :2], rows[:, 2:4] - rows[:, :2]])
        counts.left_out[EMPTY] += sum(clean_box(box, *size) is None for box in boxes)
        check_units(name, boxes, np.array(size))
        counts.check_somebody(len(boxes) - counts.left_out[EMPTY], len(self.rows))
        ids = np.maximum(rows[:, 5], -1).astype(np.int64)
        detections = VideoDetections(frames, boxes, rows[:, 4], ids, counts)
        check_boxes(detections, name, num_frames, () if self._by_position else numbers, size)
        return detections
