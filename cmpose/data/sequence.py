"""What every PoseTrack reader returns: sequences of frames of people, and how fields are checked.

Coordinates are image pixels with the origin at the centre of the top-left pixel, as in the
annotation files. A pose has the K keypoints of its sequence's skeleton, by default PoseTrack's 15.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

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
    if parts is None:
        raise AnnotationError(
            f"{where}: {file_name!r} holds no frame number; name frames by number, "
            "e.g. 000000.jpg, so that their neighbours can be found"
        )
    return int(parts[1])


def read_json(path: Path) -> Any:
    """Parses a JSON file. Raises AnnotationError naming the file and the place of the fault."""
    try:
        return json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise AnnotationError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}"
        ) from error
    except UnicodeDecodeError as error:
        raise AnnotationError(f"{path}: not a text file: {error}") from error


# --- checks of single fields; ``where`` is "file: path.of.the.field" ---------------------------


def require(entry: Any, key: str, where: str) -> Any:
    """``entry[key]``. Raises AnnotationError when ``entry`` is no object or lacks the key."""
    if not isinstance(entry, Mapping):
        raise AnnotationError(f"{where}: expected an object, got {short(entry)}")
    if key not in entry:
        raise AnnotationError(f"{where}: missing key {key!r}; it has {sorted(map(str, entry))}")
    return entry[key]


def guarded(
    read: Callable[..., Person], sequence: Sequence, skip: bool, *arguments: Any
) -> Person | None:
    """``read(*arguments)``; with ``skip``, None and a count where the annotation is broken."""
    try:
        return read(*arguments)
    except AnnotationError:
        if not skip:
            raise
        sequence.skipped["broken annotation"] += 1
        return None


def as_list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise AnnotationError(f"{where}: expected a list, got {short(value)}")
    return value


def as_int(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != int_or_nan(value):
        raise AnnotationError(f"{where}: expected an integer, got {short(value)}")
    return int(value)


def int_or_nan(value: float) -> float:
    return float(int(value)) if math.isfinite(value) else math.nan


def as_text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise AnnotationError(f"{where}: expected a non-empty string, got {short(value)}")
    return value


def as_flag(value: Any, where: str) -> bool:
    if value not in (True, False, 0, 1):
        raise AnnotationError(f"{where}: expected true or false, got {short(value)}")
    return bool(value)


def as_floats(value: Any, length: int, where: str) -> np.ndarray:
    """A list of ``length`` finite numbers → float64 [length]."""
    values = as_list(value, where)
    if len(values) != length:
        raise AnnotationError(f"{where}: expected {length} numbers, got {len(values)}")
    for position, number in enumerate(values):
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise AnnotationError(f"{where}[{position}]: expected a number, got {short(number)}")
        if not math.isfinite(number):
            raise AnnotationError(f"{where}[{position}]: expected a finite number, got {number}")
    return np.array(values, dtype=np.float64)


def as_box(value: Any, where: str) -> np.ndarray:
    """x, y, width, height with sizes ≥ 0 → float64 [4]."""
    box = as_floats(value, 4, where)
    if box[2] < 0 or box[3] < 0:
        raise AnnotationError(
            f"{where}: negative size in [x, y, width, height] = {box.tolist()}; "
            "corners (x1, y1, x2, y2) must be converted to sizes"
        )
    return box


def as_image_size(entry: Mapping[str, Any], where: str) -> tuple[int | None, int | None]:
    """(width, height) of an image entry, both None when it does not say."""
    sizes = []
    for key in ("width", "height"):
        size = None
        if entry.get(key) is not None:
            size = as_int(entry[key], f"{where}.{key}")
            if size <= 0:
                raise AnnotationError(f"{where}.{key}: expected a positive size, got {size}")
        sizes.append(size)
    return sizes[0], sizes[1]


def short(value: Any) -> str:
    """``repr`` cut to a length that fits in a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


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
