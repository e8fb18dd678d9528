"""What a clip is made of: a person's box in a key frame, and the files around it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cmpose.data.sequence import Frame, Person, Sequence

GROUND_TRUTH = "ground truth"


@dataclass(frozen=True, eq=False)
class ClipRecord:
    """What one clip is made of.

    Attributes:
        sequence: the video.
        frame: the key frame.
        person: the annotated person, or None for a detection.
        box: float64 [4], the cleaned box, x, y, width, height in image pixels.
        score: of the box: 1 for ground truth.
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
