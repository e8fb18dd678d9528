"""People in a video: OpenCV's HOG detector, or detections from a file."""

from __future__ import annotations

import functools
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cmpose.data.formats.boxes import EMPTY, BoxCounts, Scored, check_units, low_score
from cmpose.data.formats.reader import Count, Pixels, Whole, read_items
from cmpose.data.sequence import AnnotationError
from cmpose.data.transforms import clean_box


@dataclass(frozen=True, eq=False)
class Detection:
    """A person's box in a frame.

    Attributes:
        box: float64 [4] x, y, width, height in pixels.
        score: the detector's; 1 when a file gives none.
        track_id: identity over the video, -1 before a ``BoxTracker`` has given one.
        interpolated: nobody was detected here; the box lies between those of two other frames.
    """

    box: np.ndarray
    score: float
    track_id: int = -1
    interpolated: bool = False


HOG = "OpenCV HOG people detector"

_LEFT, _TOP, _WIDTH, _HEIGHT = 0.10, 0.07, 0.80, 0.80
"""The person's part of a detected window, which has a margin; as in OpenCV's own sample."""

_WINDOW = (64, 128)
"""(width, height) of the detector's window in pixels; it detects nobody in a smaller frame."""


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
    """Detects upright people by histograms of oriented gradients (Dalal and Triggs, CVPR 2005).

    The weights come with OpenCV, so nothing is downloaded. The detector finds people who stand
    upright and are at least about 100 pixels high in the resized frame. It misses those who
    crouch, are cut off or are small; give a file of detections for them.

    Args:
        frame: uint8 [H, W, 3], RGB or BGR: the gradient of the strongest channel counts.
        max_side: the frame is resized so that its longer side has this many pixels.
        max_upscale: the frame is enlarged at most by this factor.
        min_distance: boxes nearer to the SVM's plane are dropped.
        max_overlap: if the intersection over union of two boxes is larger, the weaker is dropped.
        max_contained: the same for the intersection over the area of the smaller box.

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
    detections = []
    for (x, y, w, h), distance in zip(windows, np.ravel(distances), strict=True):
        if distance < min_distance:
            continue
        x1, y1 = max(0.0, x + _LEFT * w), max(0.0, y + _TOP * h)
        x2 = min(float(size[0]), x + (_LEFT + _WIDTH) * w)
        y2 = min(float(size[1]), y + (_TOP + _HEIGHT) * h)
        if x2 > x1 and y2 > y1:
            box = np.array([x1, y1, x2 - x1, y2 - y1]) / scale
            detections.append(Detection(box, 1.0 - math.exp(-float(distance))))
    return suppress(detections, max_overlap, max_contained)


def suppress(
    detections: Sequence[Detection], max_overlap: float, max_contained: float
) -> list[Detection]:
    """Non-maximum suppression, which also drops boxes that lie inside better ones.

    Args:
        detections: in any order.
        max_overlap: see ``detect_people``.
        max_contained: see there.

    Returns:
        Those that are kept, best first.
    """
    kept: list[Detection] = []
    # The detector's threads return boxes in any order; sorting by the box too makes it one order.
    for detection in sorted(detections, key=lambda d: (-d.score, *d.box)):
        pairs = [overlaps(detection.box, other.box) for other in kept]
        if all(u <= max_overlap and c <= max_contained for u, c in pairs):
            kept.append(detection)
    return kept


def overlaps(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Of two boxes [4]: intersection over union, and intersection over the smaller area."""
    corner = np.minimum(a[:2] + a[2:], b[:2] + b[2:]) - np.maximum(a[:2], b[:2])
    intersection = float(np.prod(np.maximum(corner, 0.0)))
    areas = float(a[2] * a[3]), float(b[2] * b[3])
    union, smaller = sum(areas) - intersection, min(areas)
    return intersection / union if union > 0 else 0.0, intersection / smaller if smaller else 0.0


class VideoDetections(Mapping[int, list[Detection]]):
    """The boxes of a file by frame. They are kept as arrays, which take about 60 bytes a box.

    Attributes:
        frames: int64 [D], sorted. Of one frame's boxes the best comes first.
        boxes: float64 [D, 4].
        scores: float64 [D].
        track_ids: int64 [D], -1 if the file has none.
        tracked: whether the file has track ids.
        counts: which of the file's entries are not among them, and why.
    """

    def __init__(
        self, frames: Any, boxes: Any, scores: Any, track_ids: Any, counts: BoxCounts
    ) -> None:
        self.counts = counts
        frames, scores = np.array(frames, np.int64), np.array(scores, np.float64)
        order = np.lexsort((-scores, frames))
        self.frames: np.ndarray = frames[order]
        self.scores: np.ndarray = scores[order]
        self.boxes = np.asarray(boxes, np.float64).reshape(-1, 4)[order]
        self.track_ids = np.asarray(track_ids, np.int64)[order]
        self.tracked = bool((self.track_ids >= 0).any())

    def _rows(self, frame: int) -> range:
        """The rows of the arrays that are of one frame."""
        first, last = np.searchsorted(self.frames, [frame, frame + 1])
        return range(int(first), int(last))

    def __getitem__(self, frame: int) -> list[Detection]:
        rows = self._rows(frame)
        if not rows:
            raise KeyError(frame)
        return [
            Detection(self.boxes[i], float(self.scores[i]), int(self.track_ids[i])) for i in rows
        ]

    def __iter__(self) -> Iterator[int]:
        return iter(np.unique(self.frames).tolist())

    def __len__(self) -> int:
        return len(np.unique(self.frames))


class VideoBox(Scored, gc=False):
    """An entry of a file of detections: a box in a frame of a video."""

    bbox: tuple[Pixels, Pixels, Pixels, Pixels]
    frame: Count | None = None
    image_id: Count | None = None
    track_id: Whole = -1


_ENTRY = (
    'an entry is {"frame": 0, "bbox": [x, y, width, height], "score": 0.9, "track_id": 3}, with '
    "frames counted from 0 and boxes in pixels"
)


def _checked_frame(entry: VideoBox, where: str) -> int:
    frame = entry.image_id if entry.frame is None else entry.frame
    if frame is None:
        raise AnnotationError(f"{where}: has no 'frame' (nor 'image_id'); {_ENTRY}")
    if entry.bbox[2] <= 0 or entry.bbox[3] <= 0:
        raise AnnotationError(f"{where}.bbox: {list(entry.bbox)} has no area; {_ENTRY}")
    return frame


def load_video_detections(
    path: str | Path,
    num_frames: int | None = None,
    *,
    numbers: tuple[int, ...] = (),
    size: tuple[int, int] | None = None,
    min_score: float = 0.0,
) -> VideoDetections:
    """Reads the boxes of a video from a JSON file, piece by piece.

    The file is a list of ``{"frame": 0, "bbox": [x, y, w, h], "score": 0.9, "track_id": 3}``, in
    any order. Frames count from 0, boxes are in pixels. ``confidence`` and ``conf`` are read as
    ``score``; without any of them it is 1. ``track_id`` is optional: all entries have one, or none.
    A list of COCO results works too: ``image_id`` is the frame then. ``BoxCounts.reason_against``
    says who is a person.

    Args:
        path: the file.
        num_frames: of the video; if given, no entry may be of a later frame.
        numbers: of the video's frames, ascending, where they do not count from 0; no entry may be
            of another frame then.
        size: (width, height) of the video; if given, most boxes must have their centre in it.
        min_score: boxes with a lower score are left out.

    Returns:
        Frame, by its position in the video, → its detections, best first. Frames without any are
        absent.

    Raises:
        FileNotFoundError: no such file.
        AnnotationError: not JSON, no list, or a broken entry; the message names it. Or all entries
            are left out, or boxes are not in pixels.
        ValueError: there are no entries; a track id is twice in a frame; only some entries have
            one; entries are of frames that the video does not have; more than a tenth of the
            boxes have their centre outside of it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"detections: {path} does not exist")
    frames, track_ids, values = array("q"), array("q"), array("d")
    counts = BoxCounts(path, "--min_score")
    people = with_track = 0
    count = -1
    for count, entry in enumerate(read_items(path, VideoBox, AnnotationError, _ENTRY)):
        if counts.reason_against(entry, f"[{count}]"):
            continue
        frame = _checked_frame(entry, f"{path}: [{count}]")
        people += 1
        with_track += entry.track_id >= 0
        score = entry.score_said()
        score = 1.0 if score is None else score
        if score < min_score:
            counts.left_out[low_score(min_score)] += 1
            continue
        frames.append(frame)
        track_ids.append(entry.track_id)
        values.extend((*entry.bbox, score))
        # A box outside of the picture has no pose, but stays here so that its track goes on.
        if size is not None and clean_box(np.array(entry.bbox), *size) is None:
            counts.left_out[EMPTY] += 1
    if count < 0:
        raise ValueError(f"{path} has no detections; leave the file out to detect people")
    if with_track not in (0, people):
        raise ValueError(
            f"{path}: {with_track} of {people} detections have a track_id; give all of them one, "
            "or none to have them linked by overlap"
        )
    table = np.array(values).reshape(-1, 5)
    check_units(path, table[:, :4], None if size is None else np.array(size))
    counts.check_somebody(len(table) - counts.left_out[EMPTY], count + 1)
    detections = VideoDetections(frames, table[:, :4], table[:, 4], track_ids, counts)
    check_boxes(detections, path, num_frames, numbers, size)
    return detections


def check_boxes(
    detections: VideoDetections,
    path: Path,
    num_frames: int | None,
    numbers: tuple[int, ...],
    size: tuple[int, int] | None,
) -> None:
    """Checks boxes against their video, and counts their frames by position.

    Args:
        detections: with the frames' numbers, which become positions.
        path: what messages begin with.
        num_frames: see ``load_video_detections``.
        numbers: see there.
        size: see there.

    Raises:
        ValueError: a track id is twice in a frame; entries are of frames that the video does not
            have; more than a tenth of the boxes have their centre outside of it.
    """
    _check_track_ids(detections, path)
    _check_frames(detections, path, num_frames, numbers)
    if size is not None:
        _check_centers(detections, path, size)
    if numbers:
        detections.frames = np.searchsorted(np.array(numbers, np.int64), detections.frames)


def _check_track_ids(detections: VideoDetections, path: Path) -> None:
    order = np.lexsort((detections.track_ids, detections.frames))
    frames, ids = detections.frames[order], detections.track_ids[order]
    twice = (frames[1:] == frames[:-1]) & (ids[1:] == ids[:-1]) & (ids[1:] >= 0)
    if twice.any():
        i = int(np.argmax(twice))
        raise ValueError(f"{path}: track_id {ids[i]} is twice in frame {frames[i]}")


def _check_frames(
    detections: VideoDetections, path: Path, num_frames: int | None, numbers: tuple[int, ...]
) -> None:
    beyond: np.ndarray = np.zeros(len(detections.frames), bool)
    frames = ""
    if numbers:
        beyond = ~np.isin(detections.frames, numbers)
        frames = f"{numbers[0]} to {numbers[-1]}, numbered as their names are"
    elif num_frames is not None:
        beyond = detections.frames >= num_frames
        frames = f"0 to {num_frames - 1}, counted from 0"
    if beyond.any():
        some = ", ".join(map(str, np.unique(detections.frames[beyond])[:3].tolist()))
        raise ValueError(
            f"{path}: {beyond.sum()} of {len(detections.frames)} detections are of frames that the "
            f"video does not have, e.g. {some}; its frames are {frames}"
        )


def _check_centers(detections: VideoDetections, path: Path, size: tuple[int, int]) -> None:
    centers = detections.boxes[:, :2] + detections.boxes[:, 2:] / 2
    outside: np.ndarray = np.any((centers < 0) | (centers > np.array(size)), axis=1)
    if outside.sum() > len(outside) / 10:
        i = int(np.argmax(outside))
        bbox, frame = detections.boxes[i].round(1).tolist(), detections.frames[i]
        raise ValueError(
            f"{path}: {outside.sum()} of {len(outside)} boxes have their centre outside of the "
            f"video's {size[0]}×{size[1]} pixels, e.g. bbox {bbox} in frame {frame}; were they "
            "found in a video of another size?"
        )
