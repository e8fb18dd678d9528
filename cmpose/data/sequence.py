"""What every PoseTrack reader returns: sequences of frames of people.

Coordinates are image pixels with the origin at the centre of the top-left pixel, as in the
annotation files. A pose has the K keypoints of its sequence's skeleton, by default PoseTrack's 15.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from cmpose.data.formats.messages import short
from cmpose.data.skeleton import NUM_JOINTS, POSETRACK, Skeleton


class AnnotationError(ValueError):
    """A broken annotation or detection file; the message names file, field and value."""


@dataclass(eq=False)
class Person:
    """One person in one frame.

    Attributes:
        box: float64 [4], x, y, width, height in pixels; it may leave the image.
        keypoints: float64 [K, 3], x, y in pixels and v: 1 annotated, 0 not.
        head_box: float64 [4], x, y, width, height of the head, or None.
        track_id: identity within the sequence; -1 when the file gives none.
        score: of the person, for detections and predictions; None in ground truth.
        joint_scores: float64 [K] for predictions, or None.
        person_id: PoseTrack21's identity across sequences, or None.
    """

    box: np.ndarray
    keypoints: np.ndarray = field(default_factory=lambda: np.zeros((NUM_JOINTS, 3)))
    head_box: np.ndarray | None = None
    track_id: int = -1
    score: float | None = None
    joint_scores: np.ndarray | None = None
    person_id: int | None = None

    @property
    def num_visible(self) -> int:
        """Number of annotated joints."""
        return int((self.keypoints[:, 2] > 0).sum())


@dataclass(eq=False)
class Frame:
    """One frame that the annotation file lists.

    Attributes:
        image_id: the file's id; made up as documented in ``docs/data.md`` for an annolist.
        file_name: path relative to the data set's root, with forward slashes.
        index: frame number, read from the file name (first frame 0 in PoseTrack18 and 21, 1 in
            PoseTrack17).
        labeled: people's keypoints were annotated in this frame (there may be no people).
        ignore_regions: polygons, each float64 [n, 2] of x, y.
        people: the annotated people.
        width: of the image in pixels, when the file says.
        height: likewise.
        extra: further fields of the file's image entry, kept and written back.
    """

    image_id: int
    file_name: str
    index: int
    labeled: bool = True
    ignore_regions: list[np.ndarray] = field(default_factory=list)
    people: list[Person] = field(default_factory=list)
    width: int | None = None
    height: int | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(eq=False)
class Sequence:
    """One video.

    Attributes:
        name: the folder of its frames, e.g. ``012834_mpii_test``.
        file_stem: name of its annotation file without ``.json``; ground truth and predictions are
            matched by it. In a merged file, the folder's name (which is PoseTrack18's file name).
        frames: in the file's order.
        nframes: frames the video has according to the file, listed or not; None when not said.
        source: the file it was read from, for messages.
        skipped: reason → number of annotations left out while reading.
        skeleton: what the people's keypoints are.
    """

    name: str
    file_stem: str
    frames: list[Frame]
    nframes: int | None = None
    source: str = ""
    skipped: Counter[str] = field(default_factory=Counter)
    skeleton: Skeleton = POSETRACK


def split_frame_name(file_name: str) -> tuple[str, str, str] | None:
    """``a/b/pre000123post.jpg`` → (``pre``, ``000123``, ``post.jpg``); None without digits.

    The frame number is the last run of digits in the name, extension aside.
    """
    path = PurePosixPath(file_name)
    match = re.fullmatch(r"(.*?)(\d+)(\D*)", path.stem)
    if match is None:
        return None
    return match[1], match[2], match[3] + path.suffix


def frame_number(file_name: str, where: str) -> int:
    """The frame number in a file name. Raises AnnotationError when there is none."""
    parts = split_frame_name(file_name)
    if parts is None or "\0" in file_name:
        raise AnnotationError(
            f"{where}: {short(file_name)} holds no frame number; name frames by number, "
            "e.g. 000000.jpg, so that their neighbours can be found"
        )
    if len(parts[1]) > 18:
        raise AnnotationError(
            f"{where}: {short(file_name)} has a frame number of {len(parts[1])} digits; at most 18 "
            "can be counted"
        )
    return int(parts[1])


def box_of_keypoints(keypoints: np.ndarray, enlarge: float, margin: float) -> np.ndarray:
    """Box around the annotated joints.

    Args:
        keypoints: [K, 3] with at least one v > 0.
        enlarge: factor about the box's centre: 1.3 is PoseTrack18's, 1.2 DetectAndTrack's for
            PoseTrack17.
        margin: added to the extents before enlarging: 0 for PoseTrack18, 1 for PoseTrack17.

    Returns:
        float64 [4], x, y, width, height; it may leave the image.
    """
    points = keypoints[keypoints[:, 2] > 0, :2]
    low, high = points.min(axis=0), points.max(axis=0)
    size = high - low + margin
    center = low + size / 2
    return np.concatenate([center - enlarge * size / 2, enlarge * size])
