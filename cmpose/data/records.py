"""Which clips there are: one for each usable person, or detected box, of each key frame."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cmpose.config import DataConfig
from cmpose.data.formats.boxes import EMPTY
from cmpose.data.formats.detections import Detections
from cmpose.data.frames import ClipFiles
from cmpose.data.pictures import FrameError
from cmpose.data.sequence import Frame, Person, Sequence
from cmpose.data.transforms import clean_box, crop_region

GROUND_TRUTH = "ground truth"


@dataclass(frozen=True, eq=False)
class ClipRecord:
    """What one clip is made of.

    Attributes:
        sequence: the video.
        frame: the key frame.
        person: the annotated person, or None for a detection.
        box: float64 [4], the cleaned box: x, y, width, height in image pixels.
        score: the box's score; 1 for ground truth.
        box_source: ``ground truth`` or the detection file's name.
        files: T paths, the key frame's in the middle.
        picture_size: (width, height) of the frames.
    """

    sequence: Sequence
    frame: Frame
    person: Person | None
    box: np.ndarray
    score: float
    box_source: str
    files: tuple[str, ...]
    picture_size: tuple[int, int]

    @property
    def keypoints(self) -> np.ndarray:
        """The person's joints, [K, 3]; zeros (nothing annotated) for a detection."""
        if self.person is None:
            return np.zeros((len(self.sequence.skeleton), 3))
        return self.person.keypoints


class ChosenRecords(NamedTuple):
    """The result of :func:`choose_records`.

    Attributes:
        records: of the clips, in the order of sequences, frames and people.
        skipped: reason → number of annotations, detections and clips that were left out.
        notes: reason → number of clips that were kept although a support frame is not on disk.
    """

    records: list[ClipRecord]
    skipped: Counter[str]
    notes: Counter[str]


def choose_records(
    sequences: Items[Sequence],
    boxes: Detections | None,
    root: Path,
    image_size: tuple[int, int],
    num_frames: int,
    data: DataConfig,
) -> ChosenRecords:
    """Decides which clips a data set has; ``docs/data.md`` lists the reasons to leave one out.

    Args:
        sequences: annotations.
        boxes: detections that take the place of the annotated people; None keeps the people.
        root: folder that ``file_name`` is relative to.
        image_size: (H, W) of the crops.
        num_frames: T.
        data: ``box_enlarge`` and ``on_error``.

    Raises:
        FrameError: a frame that must be there is not, unless ``data.on_error`` is ``skip``.
    """
    chooser = _Chooser(boxes, ClipFiles(root, num_frames, data.on_error), image_size, data)
    records: list[ClipRecord] = []
    for sequence in sequences:
        chooser.skipped += sequence.skipped
        records += chooser.records(sequence)
    return ChosenRecords(records, chooser.skipped, chooser.notes)


class _Chooser:
    def __init__(
        self,
        boxes: Detections | None,
        files: ClipFiles,
        image_size: tuple[int, int],
        data: DataConfig,
    ) -> None:
        self.boxes, self.files, self.image_size, self.data = boxes, files, image_size, data
        self.box_source = GROUND_TRUTH if boxes is None else boxes.name
        self.skipped: Counter[str] = Counter() if boxes is None else Counter(boxes.dropped)
        self.notes: Counter[str] = Counter() if boxes is None else Counter(boxes.kept)

    def records(self, sequence: Sequence) -> Iterator[ClipRecord]:
        """The records of one sequence; what is left out or noted is counted."""
        listed = {frame.index for frame in sequence.frames}
        for frame in sequence.frames:
            people = list(self._people(sequence, frame))
            if not people:
                continue
            try:
                files, note = self.files.of(sequence, frame, listed)
                size = self.files.picture_size(frame, files[len(files) // 2])
            except FrameError as error:
                if self.data.on_error == "raise":
                    raise
                self.skipped[error.reason] += len(people)
                continue
            for person, box, score in people:
                cleaned = clean_box(box, *size)
                if cleaned is None:
                    self.skipped[EMPTY] += 1
                    continue
                if person is not None and not self._holds_a_joint(cleaned, person):
                    self.skipped["box holds none of the person's joints"] += 1
                    continue
                if note:
                    self.notes[note] += 1
                yield ClipRecord(
                    sequence, frame, person, cleaned, score, self.box_source, files, size
                )

    def _people(
        self, sequence: Sequence, frame: Frame
    ) -> Iterator[tuple[Person | None, np.ndarray, float]]:
        """Who or what is cropped in a frame: (person or None, box, score)."""
        if self.boxes is not None:
            for detection in self.boxes.boxes.get((sequence.file_stem, frame.image_id), []):
                yield None, detection.box, detection.score
            return
        for person in frame.people:
            if not frame.labeled:
                self.skipped["frame not labelled"] += 1
            elif person.num_visible == 0:
                self.skipped["person without keypoints"] += 1
            else:
                yield person, person.box, 1.0

    def _holds_a_joint(self, box: np.ndarray, person: Person) -> bool:
        """Whether the crop without augmentation shows any annotated joint.

        A file that gives a box as two corners, read as corner and size, yields boxes that have
        nothing to do with the person.
        """
        region = crop_region(box, self.image_size, self.data.box_enlarge)
        joints = person.keypoints[person.keypoints[:, 2] > 0, :2]
        return bool((np.abs(joints - region.center) <= region.size / 2).all(axis=1).any())
