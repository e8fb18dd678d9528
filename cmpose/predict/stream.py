"""From a video's frames to poses: the frames, group by group, in order and in constant memory.

Frames pass through a line of generators, each of which holds a few of them: decoding, people
(``cmpose.predict.people``), ``steady_boxes``, windows of T frames, and groups whose people fill a
batch of the network. What is done with a predicted frame (a journal, pictures, a drawn video) is
its receiver's affair.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cmpose.data.transforms import clean_box
from cmpose.data.video import VideoFrame, VideoInfo
from cmpose.predict.clock import Clock
from cmpose.predict.detectors.detect import Detection
from cmpose.predict.frame import PredictedFrame, PredictedPerson
from cmpose.predict.options import Options
from cmpose.predict.people import SeenFrame
from cmpose.predict.predictor import Poses, Predictor, windows
from cmpose.predict.track import steady_boxes

_GROUP_FRAMES, _GROUP_BYTES = 64, 128 << 20
"""At most so many frames, and bytes of them, wait for a batch to fill."""


class _CroppedFrame(NamedTuple):
    """A frame whose people wait for their batch.

    ``boxes`` are inside the picture; ``clips`` [P, T, 3, H, W] and ``matrices`` [P, 2, 3] are the
    network's input for them, None and empty where there is nobody.
    """

    seen: SeenFrame
    people: list[Detection]
    boxes: list[np.ndarray]
    clips: Tensor | None
    matrices: np.ndarray


class PoseStream:
    """Predicts the frames of one video, in order."""

    def __init__(
        self, predictor: Predictor, info: VideoInfo, options: Options, clock: Clock
    ) -> None:
        """
        Args:
            predictor: the model.
            info: the video's.
            options: settled, that is without open defaults.
            clock: counts the seconds of ``crop`` and ``model``.
        """
        self.predictor, self.info, self.options, self.clock = predictor, info, options, clock
        frame_bytes = 3 * info.width * info.height
        self.most_frames = min(_GROUP_FRAMES, max(1, _GROUP_BYTES // frame_bytes))

    def groups(
        self, looked_at: Iterable[tuple[SeenFrame, list[Detection] | None]]
    ) -> Iterator[list[PredictedFrame]]:
        """Predicted frames, those together whose people went through the network together.

        Args:
            looked_at: frames in order and who is in them, None where nobody looked: what the
                functions of ``cmpose.predict.people`` give.

        Returns:
            Every frame once. A frame that an interrupted run has predicted is a group of its own,
            as it was then, now with its picture.

        Raises:
            ValueError: a pose that is not finite.
        """
        bridge, smooth = self.options.bridge, self.options.smooth
        assert bridge is not None
        assert smooth is not None
        num_frames = self.predictor.config.model.num_frames
        group: list[_CroppedFrame] = []
        steady = steady_boxes(looked_at, bridge=bridge, smooth=smooth)
        for window in windows(steady, num_frames):
            seen, people = window[num_frames // 2]
            if seen.earlier is not None:
                yield [replace(seen.earlier, picture=seen.frame.picture)]
                continue
            cropped = self._crop([item.frame for item, _ in window], seen, people)
            count = sum(len(frame.boxes) for frame in group) + len(cropped.boxes)
            if group and (count > self.options.batch_size or len(group) >= self.most_frames):
                yield self._predict(group)
                group = []
            group.append(cropped)
        if group:
            yield self._predict(group)

    def _crop(
        self, window: list[VideoFrame], seen: SeenFrame, people: list[Detection]
    ) -> _CroppedFrame:
        """Cuts out the people whose box lies in the picture; nobody in an unreadable one."""
        inside, boxes = [], []
        for detection in people if seen.frame.readable else ():
            box = clean_box(detection.box, self.info.width, self.info.height)
            if box is not None:
                inside.append(detection)
                boxes.append(box)
        if not boxes:
            return _CroppedFrame(seen, [], [], None, np.zeros((0, 2, 3)))
        with self.clock("crop"):
            clips, matrices = self.predictor.crops(window, boxes)
        return _CroppedFrame(seen, inside, boxes, clips, matrices)

    def _predict(self, group: list[_CroppedFrame]) -> list[PredictedFrame]:
        rows = iter(self._rows(group))
        return [_predicted_frame(frame, list(islice(rows, len(frame.boxes)))) for frame in group]

    def _rows(self, group: list[_CroppedFrame]) -> list[tuple[Poses, int]]:
        """For every person of a group the batch that they are in, and their row in it."""
        clips_of_frames = [frame.clips for frame in group if frame.clips is not None]
        if not clips_of_frames:
            return []
        # A frame with more people than a batch is alone in its group, and takes several batches.
        clips = torch.cat(clips_of_frames)
        matrices = np.concatenate([frame.matrices for frame in group])
        batches = -(-len(clips) // self.options.batch_size)
        rows = []
        for part in np.array_split(np.arange(len(clips)), batches):
            batch = slice(int(part[0]), int(part[-1]) + 1)
            with self.clock("model"):
                poses = self.predictor.poses(clips[batch], matrices[batch])
            rows += [(poses, row) for row in range(len(part))]
        return rows


def _predicted_frame(cropped: _CroppedFrame, rows: list[tuple[Poses, int]]) -> PredictedFrame:
    frame, detections, _ = cropped.seen
    people = []
    for detection, box, (poses, row) in zip(cropped.people, cropped.boxes, rows, strict=True):
        keypoints, scores = poses.keypoints[row], poses.scores[row]
        people.append(
            PredictedPerson(
                track_id=detection.track_id,
                score=round(float(detection.score), 6),
                box=np.round(box, 4),
                keypoints=np.round(np.asarray(keypoints, np.float64), 4),
                scores=np.round(np.asarray(scores, np.float64), 6),
                interpolated=detection.interpolated,
            )
        )
    return PredictedFrame(frame.number, frame.picture, people, frame.readable, detections, rows)
