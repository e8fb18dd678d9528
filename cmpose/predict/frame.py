"""What is predicted of one frame of a video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cmpose.predict.detectors.detect import Detection
from cmpose.predict.predictor import Poses


class PredictedPerson(NamedTuple):
    """A person's pose in a frame.

    Pixels are rounded to four decimals and scores to six, which is what the journal keeps: a frame
    that is read back from it equals the one that was written.

    Attributes:
        track_id: identity over the video.
        score: the box's.
        box: float64 [4] x, y, width, height in pixels, inside the picture.
        keypoints: float64 [K, 2] x, y in image pixels.
        scores: float64 [K], the heatmaps' maxima.
        interpolated: the box lies between two detected ones; nobody was detected here.
    """

    track_id: int
    score: float
    box: np.ndarray
    keypoints: np.ndarray
    scores: np.ndarray
    interpolated: bool = False


@dataclass(frozen=True, eq=False)
class PredictedFrame:
    """A frame and the poses of its people.

    Attributes:
        number: from 0.
        picture: uint8 [H, W, 3], BGR; empty in a frame of the journal.
        people: in the order of their boxes.
        readable: False where the picture before stands in for one that could not be read.
        detections: what the detector found here, linked to nobody yet; None where it was not run.
        rows: for each person the batch of poses that the network gave, and the person's row in
            it; empty in a frame of the journal.
        explained: pictures of what these poses were read from, below the output folder.
    """

    number: int
    picture: np.ndarray
    people: list[PredictedPerson]
    readable: bool = True
    detections: list[Detection] | None = None
    rows: Sequence[tuple[Poses, int]] = ()
    explained: Sequence[str] = ()
