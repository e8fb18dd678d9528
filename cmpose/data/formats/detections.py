"""Person boxes from a detection file, in DCPose's or mmpose's keys."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import numpy as np

from cmpose.data.formats.boxes import BoxCounts, Scored, check_units, low_score
from cmpose.data.formats.coco import box_of
from cmpose.data.formats.messages import ONLY_NEARLY, folded, short
from cmpose.data.formats.reader import Pixels, Whole, convert, read
from cmpose.data.sequence import AnnotationError, Sequence


class DetectionEntry(Scored, gc=False):
    """An entry of a detection file: DCPose's have ``image_name``, mmpose's ``image_id``."""

    bbox: list[Pixels]
    image_id: Whole | None = None
    image_name: str | None = None


@dataclass(frozen=True, eq=False)
class ScoredBox:
    """A detected person: box float64 [4] (x, y, width, height, pixels) and score."""

    box: np.ndarray
    score: float


@dataclass(eq=False)
class Detections:
    """Boxes of a detection file, by frame.

    Attributes:
        name: the file's name; results name it as their box source.
        boxes: (sequence's file_stem, frame's image_id) → detections, in the file's order.
        dropped: reason → number of detections left out.
        kept: reason → number of detections that are used and that a user should know of.
    """

    name: str
    boxes: dict[tuple[str, int], list[ScoredBox]]
    dropped: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)


def load_detections(
    path: str | os.PathLike[str],
    sequences: Iterable[Sequence],
    threshold: float = 0.2,
    *,
    on_error: Literal["raise", "skip"] = "raise",
) -> Detections:
    """Reads a list of detections and finds their frames.

    An entry has ``bbox`` (x, y, w, h), ``score`` (or ``confidence``, or ``conf``), and ``image_id``
    (mmpose) or ``image_name`` (DCPose: the annotation's ``file_name``; if no name matches whole,
    the folder and the file's name decide); both must lead to one frame.
    ``BoxCounts.reason_against`` says who is a person.

    Args:
        path: the JSON file.
        sequences: the annotations whose frames the boxes belong to.
        threshold: detections with a lower score are dropped.
        on_error: ``skip`` drops and counts broken entries instead of raising.

    Raises:
        FileNotFoundError: no such file.
        AnnotationError: a broken entry, named by its index in the file; no detection at all
            belongs to a known frame, or all that do are left out; or they are not in pixels.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such detection file (data.boxes)")
    entries = read(path, list[Any], AnnotationError)
    if not entries:
        raise AnnotationError(f"{path}: holds no detections")
    index = _FrameIndex(sequences)
    counts = BoxCounts(path, "data.box_score_threshold")
    boxes: dict[tuple[str, int], list[ScoredBox]] = {}
    sized: list[tuple[np.ndarray, tuple[float, float]]] = []  # boxes, and their pictures' sizes
    matched = used = 0
    stranger: int | str | None = None
    for number, unchecked in enumerate(entries):
        where = f"{path}: [{number}]"
        try:
            entry = convert(unchecked, DetectionEntry, str(path), AnnotationError, f"[{number}]")
            box, score = box_of(entry.bbox, f"{where}.bbox"), entry.score_said()
            if score is None:
                raise AnnotationError(f"{where}: missing key 'score' (or 'confidence', 'conf')")
            key = index.find(entry, where)
        except AnnotationError:
            if on_error == "raise":
                raise
            counts.left_out["broken detection"] += 1
            continue
        if key is None:
            stranger = stranger or (entry.image_name if entry.image_id is None else entry.image_id)
            counts.left_out["frame not in the annotations"] += 1
            continue
        matched += 1
        if counts.reason_against(entry, f"[{number}]"):
            continue
        sized.append((box, index.sizes[key]))
        if score < threshold:
            counts.left_out[low_score(threshold)] += 1
        else:
            used += 1
            boxes.setdefault(key, []).append(ScoredBox(box, score))
    if not matched:
        raise AnnotationError(
            f"{path}: none of the {len(entries)} detections belongs to a frame of the "
            f"annotations: the file has e.g. {short(stranger)}, the annotations {index.example()}"
        )
    if sized:
        check_units(path, *map(np.array, zip(*sized, strict=True)))
    counts.check_somebody(used, len(entries))
    return Detections(path.name, boxes, +counts.left_out, +counts.kept)


class _FrameIndex:
    """Finds a frame by image id, file name, or the last two parts of a file name."""

    def __init__(self, sequences: Iterable[Sequence]) -> None:
        self.by_id: dict[int, list[tuple[str, int]]] = {}
        self.by_name: dict[str, list[tuple[str, int]]] = {}
        self.by_tail: dict[tuple[str, ...], list[tuple[str, int]]] = {}
        self.folded: dict[tuple[str, ...], str] = {}
        self.names: dict[tuple[str, int], str] = {}
        self.sizes: dict[tuple[str, int], tuple[float, float]] = {}
        for sequence in sequences:
            for frame in sequence.frames:
                key = (sequence.file_stem, frame.image_id)
                self.names[key] = frame.file_name
                self.sizes[key] = (frame.width or math.nan, frame.height or math.nan)
                self.by_id.setdefault(frame.image_id, []).append(key)
                self.by_name.setdefault(frame.file_name, []).append(key)
                self.by_tail.setdefault(_tail(frame.file_name), []).append(key)

    def find(self, entry: DetectionEntry, where: str) -> tuple[str, int] | None:
        name = (entry.image_name or "").replace("\\", "/")
        named = self.by_name.get(name) or self.by_tail.get(_tail(name), []) if name else []
        if entry.image_id is None and not name:
            raise AnnotationError(
                f"{where}: has neither 'image_id' nor 'image_name', which tell its frame"
            )
        if entry.image_id is None and not named:
            self._refuse_nearly(name, where)
        keys = named if entry.image_id is None else self.by_id.get(entry.image_id, [])
        if entry.image_id is not None and keys and named:
            if not set(keys) & set(named):
                raise AnnotationError(
                    f"{where}: image_id {entry.image_id} is {self.names[keys[0]]}, but image_name "
                    f"is {short(name)}; leave out the one that is wrong"
                )
            keys = [key for key in keys if key in named]
        if len(keys) > 1:
            shown = name if entry.image_id is None else entry.image_id
            raise AnnotationError(
                f"{where}: {short(shown)} is the name of {len(keys)} frames, e.g. "
                f"{self.names[keys[0]]} and {self.names[keys[1]]}; use the full file_name"
            )
        return keys[0] if keys else None

    def _refuse_nearly(self, name: str, where: str) -> None:
        """Raises AnnotationError for a name that differs from a frame's by its case or so alone."""
        if not self.folded:
            self.folded = {_tail(folded(each)): each for each in self.by_name}
        if near := self.folded.get(_tail(folded(name))):
            raise AnnotationError(
                f"{where}: image_name {short(name)}: {short(near)} of the annotations {ONLY_NEARLY}"
            )

    def example(self) -> str:
        for (_, image_id), name in self.names.items():
            return f"image_id {image_id}, image_name {name!r}"
        return "hold no frames"


def _tail(name: str) -> tuple[str, ...]:
    return PurePosixPath(name).parts[-2:]
