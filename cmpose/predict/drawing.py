"""Predicted frames as pictures: skeletons, boxes, track ids, and a picture of what was seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cmpose.data.skeleton import Skeleton
from cmpose.data.video import VideoInfo
from cmpose.predict.frame import PredictedFrame
from cmpose.predict.options import Options
from cmpose.predict.predictor import Predictor
from cmpose.viz.draw import draw_key, draw_skeleton


def draw_frame(frame: PredictedFrame, skeleton: Skeleton, keypoint_score: float) -> np.ndarray:
    """A copy of the frame's picture, uint8 [H, W, 3] BGR, with its people and a colour key.

    Keypoints of a score below ``keypoint_score``, and their limbs, are left out.
    """
    picture = frame.picture.copy()
    for person in frame.people:
        draw_skeleton(
            picture,
            person.keypoints,
            person.scores,
            min_score=keypoint_score,
            box=person.box,
            track_id=person.track_id,
            order="bgr",
            skeleton=skeleton,
        )
    return draw_key(picture, order="bgr", skeleton=skeleton)


class Explainer:
    """Writes pictures of what poses were read from, in the frames that were asked for.

    Attributes:
        pending: frames that are still to be explained. Nobody is in them so far.
    """

    def __init__(self, predictor: Predictor, info: VideoInfo, out: Path, options: Options) -> None:
        """
        Args:
            predictor: the model that the poses are from.
            info: the video's.
            out: the output folder.
            options: settled; with ``explain`` a frame without people is made up for by the next
                one with people, else only the frames that were named are explained.
        """
        self.predictor, self.info, self.out = predictor, info, out
        self.pending = list(options.explain_frames)
        self._only_named = not options.explain

    def due(self, frame: PredictedFrame) -> bool:
        """Whether a frame is to be explained; the frames that it stands for are done then."""
        number = frame.number
        due = [n for n in self.pending if n == number or (n < number and not self._only_named)]
        if due and frame.people:
            self.pending = [n for n in self.pending if n not in due]
            return True
        return False

    def explain(self, frame: PredictedFrame) -> list[str]:
        """Writes a picture and a record of each person if the frame is due.

        Returns:
            The pictures' paths below the output folder.
        """
        if not self.due(frame):
            return []
        written = []
        for person, (poses, row) in zip(frame.people, frame.rows, strict=True):
            number, track_id = self.info.number(frame.number), person.track_id
            title = f"{self.info.name}, frame {number}, person {track_id}"
            path = self.out / "explain" / f"{self.info.name}_{number:06d}_{track_id}.png"
            self.predictor.explain(frame.picture, poses, row, title, path)
            written.append(str(path.relative_to(self.out)))
        return written
