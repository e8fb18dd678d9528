"""People in a video: OpenCV's HOG detector, detections from a file, and steady track ids."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np


@dataclass(frozen=True, eq=False)
class Detection:
    """A person's box in a frame.

    Attributes:
        box: float64 [4] x, y, width, height in pixels.
        score: the detector's; 1 when a file gives none.
        track_id: identity over the video, -1 before a ``BoxTracker`` has given one.
    """

    box: np.ndarray
    score: float
    track_id: int = -1


# HOG's training windows have a margin around the person; OpenCV's own sample cuts these shares.
_LEFT, _TOP, _WIDTH, _HEIGHT = 0.10, 0.07, 0.80, 0.80
_WINDOW = (64, 128)


@functools.cache
def _hog() -> Any:
    hog = cv2.HOGDescriptor()
    weights = cv2.HOGDescriptor.getDefaultPeopleDetector()
    hog.setSVMDetector(np.asarray(weights, np.float32))
    return hog


def detect_people(
    frame: np.ndarray,
    *,
    max_side: int = 640,
    max_upscale: float = 2.0,
    min_distance: float = 0.3,
    max_overlap: float = 0.5,
    max_contained: float = 0.8,
) -> list[Detection]:
    """Upright people by histograms of oriented gradients (Dalal and Triggs, CVPR 2005).

    The weights come with OpenCV, so nothing is downloaded. The detector knows upright people of
    about 100 pixels and more in the resized frame; it misses crouching, cut-off and small ones.
    For those, give a detections file.

    Args:
        frame: uint8 [H, W, 3], RGB or BGR (gradients are the strongest channel's).
        max_side: the frame is resized so that its longer side has this many pixels,
        max_upscale: but never enlarged by more than this.
        min_distance: from the SVM's plane; boxes below it are dropped.
        max_overlap: of two boxes with a larger intersection over union the weaker is dropped.
        max_contained: likewise for the intersection over the smaller box.

    Returns:
        Boxes inside the frame, best first; the score is 1 - exp(-SVM distance).

    Raises:
        ValueError: another shape or dtype.
    """
    if frame.ndim != 3 or frame.shape[2] != 3 or frame.dtype != np.uint8:
        raise ValueError(f"frame must be uint8 [H, W, 3], got {frame.dtype} {frame.shape}")
    height, width = frame.shape[:2]
    scale = min(max_side / max(height, width), max_upscale)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    if size[0] < _WINDOW[0] or size[1] < _WINDOW[1]:
        return []
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    windows, distances = _hog().detectMultiScale(
        cv2.resize(frame, size, interpolation=interpolation),
        winStride=(8, 8),
        padding=(16, 16),
        scale=1.05,
    )
    found = []
    for (x, y, w, h), distance in zip(windows, np.ravel(distances), strict=True):
        if distance < min_distance:
            continue
        x1, y1 = max(0.0, x + _LEFT * w), max(0.0, y + _TOP * h)
        x2 = min(float(size[0]), x + (_LEFT + _WIDTH) * w)
        y2 = min(float(size[1]), y + (_TOP + _HEIGHT) * h)
        if x2 > x1 and y2 > y1:
            box = np.array([x1, y1, x2 - x1, y2 - y1]) / scale
            found.append(Detection(box, 1.0 - math.exp(-float(distance))))
    return suppress(found, max_overlap, max_contained)


def suppress(
    found: Sequence[Detection], max_overlap: float, max_contained: float
) -> list[Detection]:
    """Non-maximum suppression that also drops boxes inside better ones; best first."""
    kept: list[Detection] = []
    for detection in sorted(found, key=lambda d: -d.score):
        overlaps = [_overlap(detection.box, other.box) for other in kept]
        if all(u <= max_overlap and c <= max_contained for u, c in overlaps):
            kept.append(detection)
    return kept


class BoxTracker:
    """Links boxes from frame to frame by overlap, so that a person keeps a track id.

    Pairs are taken in order of intersection over union. A track that is not seen is kept for a
    while, and for the first frames of that shown at its last box: HOG often misses a person for
    a frame or two.
    """

    def __init__(self, *, min_overlap: float = 0.3, max_age: int = 15, hold: int = 0) -> None:
        """
        Args:
            min_overlap: intersection over union that links.
            max_age: frames after which an unseen track ends.
            hold: frames that an unseen track is still returned for, its score halved each time.
        """
        self.min_overlap = min_overlap
        self.max_age = max_age
        self.hold = hold
        self._tracks: dict[int, tuple[Detection, int]] = {}  # last sight, frames since
        self._next_id = 0

    def update(self, detections: Iterable[Detection]) -> list[Detection]:
        """The next frame's detections with track ids, and the tracks that are held.

        Detections that carry a track id keep it.
        """
        detections = list(detections)
        named = {d.track_id for d in detections if d.track_id >= 0}
        self._next_id = max([self._next_id, *(i + 1 for i in named)])
        ids = self._link(detections, named)
        seen = []
        for k, detection in enumerate(detections):
            track_id = ids.get(k, detection.track_id)
            if track_id < 0:
                track_id, self._next_id = self._next_id, self._next_id + 1
            seen.append(replace(detection, track_id=track_id))
        current = {d.track_id for d in seen}
        held = []
        for track_id, (last, age) in list(self._tracks.items()):
            if track_id in current:
                continue
            if age + 1 > self.max_age:
                del self._tracks[track_id]
                continue
            if age < self.hold:
                last = replace(last, score=last.score / 2)
                held.append(last)
            self._tracks[track_id] = (last, age + 1)
        self._tracks.update({d.track_id: (d, 0) for d in seen})
        return seen + held

    def _link(self, detections: Sequence[Detection], named: set[int]) -> dict[int, int]:
        """Detection → track id, the largest overlaps first."""
        pairs = [
            (_overlap(detection.box, last.box)[0], k, track_id)
            for k, detection in enumerate(detections)
            if detection.track_id < 0
            for track_id, (last, _) in self._tracks.items()
            if track_id not in named
        ]
        linked: dict[int, int] = {}
        for overlap, k, track_id in sorted(pairs, key=lambda p: (-p[0], p[1], p[2])):
            if overlap >= self.min_overlap and k not in linked and track_id not in linked.values():
                linked[k] = track_id
        return linked


def _overlap(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Intersection over union, and over the smaller box."""
    corner = np.minimum(a[:2] + a[2:], b[:2] + b[2:]) - np.maximum(a[:2], b[:2])
    intersection = float(np.prod(np.maximum(corner, 0.0)))
    areas = float(a[2] * a[3]), float(b[2] * b[3])
    union, smaller = sum(areas) - intersection, min(areas)
    return intersection / union if union > 0 else 0.0, intersection / smaller if smaller else 0.0


def load_video_detections(
    path: str | Path, num_frames: int | None = None, *, min_score: float = 0.0
) -> dict[int, list[Detection]]:
    """Boxes of a video from a JSON file.

    The file is a list of ``{"frame": 0, "bbox": [x, y, w, h], "score": 0.9, "track_id": 3}``, in
    any order. Frames count from 0, boxes are in pixels, ``score`` is 1 when left out, ``track_id``
    is optional (for all or for none). COCO result lists will do as well: ``image_id`` stands for
    ``frame``, and entries with a ``category_id`` other than 1 (person) are left out.

    Args:
        path: the file.
        num_frames: of the video, to check against; ``None`` does not check.
        min_score: boxes below it are left out.

    Returns:
        Frame → detections, best first; frames without any are absent.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not JSON, no list, no entries, or a broken entry; the message names it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"detections: {path} does not exist")
    try:
        entries = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(entries, list):
        raise ValueError(
            f"{path}: expected a list of {{'frame', 'bbox', 'score'}} entries, got a "
            f"{type(entries).__name__}"
        )
    if not entries:
        raise ValueError(f"{path} has no detections; leave the file out to detect people")
    detections: dict[int, list[Detection]] = {}
    with_track = 0
    used = 0
    for i, entry in enumerate(entries):
        where = f"{path}: entry {i}"
        if not isinstance(entry, Mapping):
            raise ValueError(f"{where} is {entry!r:.60}, expected an object")
        if entry.get("category_id", 1) != 1:
            continue
        frame, detection = _entry(entry, where, num_frames)
        used += 1
        with_track += detection.track_id >= 0
        if detection.score < min_score:
            continue
        people = detections.setdefault(frame, [])
        if detection.track_id >= 0 and any(d.track_id == detection.track_id for d in people):
            raise ValueError(f"{where}: track_id {detection.track_id} is twice in frame {frame}")
        people.append(detection)
    if with_track not in (0, used):
        raise ValueError(
            f"{path}: {with_track} of {used} detections have a track_id; give all of them one, "
            "or none to have them linked by overlap"
        )
    for people in detections.values():
        people.sort(key=lambda d: -d.score)
    return detections


def _entry(entry: Mapping[str, Any], where: str, num_frames: int | None) -> tuple[int, Detection]:
    key = "frame" if "frame" in entry else "image_id"
    if key not in entry:
        raise ValueError(f"{where} has no 'frame' (nor 'image_id')")
    frame = entry[key]
    if isinstance(frame, bool) or not isinstance(frame, int) or frame < 0:
        raise ValueError(f"{where}: {key} must be a frame number from 0 on, got {frame!r}")
    if num_frames is not None and frame >= num_frames:
        raise ValueError(
            f"{where}: {key} {frame} is outside the video, whose frames are 0 to {num_frames - 1}; "
            "frame numbers start at 0"
        )
    box = _finite(entry.get("bbox"), where, "bbox", "[x, y, width, height] in pixels")
    if box.shape != (4,):
        raise ValueError(
            f"{where}: bbox must be [x, y, width, height] in pixels, got {entry.get('bbox')!r:.60}"
        )
    if box[2] <= 0 or box[3] <= 0:
        raise ValueError(f"{where}: bbox {box.tolist()} has no area (x, y, width, height)")
    score = _finite(entry.get("score", 1.0), where, "score", "a number")
    if score.shape != ():
        raise ValueError(f"{where}: score must be a number, got {entry['score']!r:.60}")
    track_id = entry.get("track_id", -1)
    if isinstance(track_id, bool) or not isinstance(track_id, int):
        raise ValueError(f"{where}: track_id must be an integer, got {track_id!r}")
    return frame, Detection(box, float(score), track_id)


def _finite(value: Any, where: str, name: str, expected: str) -> np.ndarray:
    try:
        array = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        array = np.array(np.nan)
    if not np.isfinite(array).all():
        raise ValueError(f"{where}: {name} must be {expected}, got {value!r:.60}")
    return array
