"""Poses in one line: ``cmpose.load(model).predict(video)``.

``cmpose predict`` is this with files: it loads a model, predicts a video, and saves.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cmpose.config import Config
from cmpose.data.skeleton import Skeleton
from cmpose.data.video import Source, VideoInfo, open_video
from cmpose.predict.clock import Clock
from cmpose.predict.detectors.box_arrays import BoxArrays, Boxes, Detector
from cmpose.predict.detectors.named import named_detector
from cmpose.predict.drawing import draw_frame
from cmpose.predict.frame import PredictedFrame
from cmpose.predict.one_euro import KeypointSmoother
from cmpose.predict.options import Options, Output, settle
from cmpose.predict.people import find_people
from cmpose.predict.predict import predict_video
from cmpose.predict.predictor import Predictor
from cmpose.predict.stream import PoseStream
from cmpose.predict.table import columns, joint_angles, rows
from cmpose.predict.window import DesktopWindow

if TYPE_CHECKING:
    from pandas import DataFrame


def load(model: str | Path, device: str = "auto") -> PoseModel:
    """A trained model, ready to predict.

    Args:
        model: a training run's folder, one of its checkpoints, a model's folder, or the name of a
            model that comes with the package.
        device: ``auto`` (a GPU if there is one), ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        CheckpointError: no usable model there.
        ValueError: no such device.
    """
    return PoseModel(Predictor.load(model, device))


class PoseModel:
    """A trained model.

    Attributes:
        predictor: the network and the device that it runs on.
    """

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor

    @property
    def skeleton(self) -> Skeleton:
        """What its keypoints are: ``skeleton.keypoints`` has their names, in order."""
        return self.predictor.model.skeleton

    @property
    def config(self) -> Config:
        """The recipe that it was trained with."""
        return self.predictor.config

    # Many parameters: each is an option of its own, the first two are enough for most.
    def predict(
        self,
        source: Source,
        *,
        boxes: str | Path | Boxes | np.ndarray | None = None,
        detector: str | Detector | None = None,
        min_score: float = Options.min_score,
        detect_every: int | None = None,
        bridge: int | None = None,
        smooth: int | None = None,
        smooth_keypoints: float = Options.smooth_keypoints,
        keypoint_score: float = Options.keypoint_score,
        batch_size: int = Options.batch_size,
        max_frames: int | None = None,
        fps: float | None = None,
        on_error: Literal["raise", "skip"] = "raise",
    ) -> Prediction:
        """Poses of the people in a video, a picture or a camera; nothing runs yet.

        Args:
            source: a video's file; a picture; a folder or a pattern of pictures; a list of
                pictures' paths, which are the frames of a video in this order; a camera's number;
                a stream's address; uint8 RGB frames [T, H, W, 3], or one [H, W, 3].
            boxes: whose poses. A file (``docs/predict.md``); or for each frame an array [P, 4] of
                x1, y1, x2, y2 in pixels, [P, 5] with a score, [P, 6] with a track id as well: in a
                list from the first frame on, or in a dict by frames' numbers.
            detector: finds people, where there are no ``boxes``: ``"rtdetr"`` or ``"FILE.onnx"``
                (``docs/predict.md``), or what is called with a picture, uint8 RGB [H, W, 3], and
                returns an array as above. Without it OpenCV's HOG detector looks for people; it
                misses many.
            min_score: boxes with a lower score are ignored.
            detect_every: the detector is run in every Nth frame; None is 3.
            bridge: how many frames in a row a person may be missing and still gets boxes between
                those before and after; None is 10, or 0 for boxes with track ids.
            smooth: boxes are averaged over so many frames before and after; None is 2, or 0 for
                boxes with track ids.
            smooth_keypoints: strength of the One-Euro filter, which lets keypoints at rest hold
                still; 0 leaves them as they are predicted, 1 is usual, more is smoother.
            keypoint_score: keypoints of a lower score are not drawn, and have no angles.
            batch_size: how many people, of several frames, go through the network at once.
            max_frames: ends after so many frames.
            fps: frames a second of a drawn video, in place of the source's.
            on_error: ``skip`` goes on past unreadable pictures.

        Raises:
            ValueError: an option that cannot be, or boxes of another form; it names the first.
        """
        if isinstance(detector, str):
            detector = named_detector(detector, self.predictor.device)
        options = Options(
            detections=(
                boxes if boxes is None or isinstance(boxes, str | Path) else BoxArrays(boxes)
            ),
            detector=detector,
            min_score=min_score,
            detect_every=detect_every,
            bridge=bridge,
            smooth=smooth,
            smooth_keypoints=smooth_keypoints,
            keypoint_score=keypoint_score,
            batch_size=batch_size,
            max_frames=max_frames,
            fps=fps,
            on_error=on_error,
        )
        options.check()
        return Prediction(self.predictor, source, options)


@dataclass(frozen=True, eq=False)
class PoseFrame:
    """A frame and the poses of its P people.

    Attributes:
        number: from 0, or that of the picture's name where pictures are numbered.
        seconds: from the video's beginning, by its frames a second.
        picture: uint8 [H, W, 3], RGB.
        keypoints: float64 [P, K, 2], x, y in pixels of the picture.
        scores: float64 [P, K], the heatmaps' maxima.
        boxes: float64 [P, 4], x1, y1, x2, y2: the first and the last pixels, inside the picture.
        box_scores: float64 [P], the detector's.
        ids: int64 [P], of the people over the video.
        readable: False where the picture before stands in for one that could not be read.
    """

    number: int
    seconds: float
    picture: np.ndarray
    keypoints: np.ndarray
    scores: np.ndarray
    boxes: np.ndarray
    box_scores: np.ndarray
    ids: np.ndarray
    readable: bool
    _predicted: PredictedFrame
    _skeleton: Skeleton
    _keypoint_score: float

    @classmethod
    def of(
        cls, frame: PredictedFrame, info: VideoInfo, skeleton: Skeleton, keypoint_score: float
    ) -> PoseFrame:
        """From what the stream of poses gives."""
        number = info.number(frame.number)
        people, count = frame.people, len(skeleton.keypoints)
        boxes = np.array([person.box for person in people], np.float64).reshape(-1, 4)
        keypoints = np.array([person.keypoints for person in people], np.float64)
        scores = np.array([person.scores for person in people], np.float64)
        return cls(
            number,
            number / info.fps,
            frame.picture[..., ::-1],
            keypoints.reshape(-1, count, 2),
            scores.reshape(-1, count),
            np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]]),
            np.array([person.score for person in people], np.float64),
            np.array([person.track_id for person in people], np.int64),
            frame.readable,
            frame,
            skeleton,
            keypoint_score,
        )

    @property
    def angles(self) -> dict[str, np.ndarray]:
        """Joint → degrees [P]; see ``cmpose.predict.table.joint_angles``."""
        return joint_angles(self.keypoints, self.scores, self._skeleton, self._keypoint_score)

    def plot(self) -> np.ndarray:
        """The picture with skeletons, boxes, ids and a colour key: uint8 [H, W, 3], RGB."""
        drawn = draw_frame(self._predicted, self._skeleton, self._keypoint_score)
        return np.ascontiguousarray(drawn[..., ::-1])


class Prediction:
    """The poses of a video: iterate over its frames, or save what ``cmpose predict`` writes.

    Frames come in order and in constant memory, a few at a time: a person's box is smoothed and
    bridged with frames behind it (``bridge + smooth`` of them), the network sees frames on both
    sides, and people wait until they fill a batch. On a camera ``detect_every=1, bridge=0,
    smooth=0, batch_size=1`` waits least. Each iteration begins anew.
    """

    def __init__(self, predictor: Predictor, source: Source, options: Options) -> None:
        """
        Args:
            predictor: the model.
            source: what ``open_video`` opens.
            options: checked.
        """
        self.predictor, self.source, self.options = predictor, source, options

    def __iter__(self) -> Iterator[PoseFrame]:
        """The frames with their poses; what a user should know of the video is a warning.

        Raises:
            VideoError: a video that cannot be read.
            ValueError: boxes that do not fit the video.
        """
        skeleton, clock = self.predictor.model.skeleton, Clock()
        with open_video(self.source, fps=self.options.fps, on_error=self.options.on_error) as video:
            boxes, options = settle(self.options, video.info)
            warned = _warn(video.info.notes, ())
            frames = islice(video.frames(), options.max_frames)
            people = find_people(frames, iter(()), boxes, options, clock)
            smoothed = KeypointSmoother(options.smooth_keypoints, video.info.fps)
            for group in PoseStream(self.predictor, video.info, options, clock).groups(people):
                for frame in map(smoothed, group):
                    yield PoseFrame.of(frame, video.info, skeleton, options.keypoint_score)
            _warn((video.info.cut_off, *video.info.notes), warned)

    def save(
        self,
        out: str | Path,
        *,
        outputs: Sequence[Output] = Options.outputs,
        explain: bool = False,
        explain_frames: Sequence[int] = (),
        overwrite: bool = False,
        progress: bool = True,
        show: bool = False,
    ) -> dict[str, Any]:
        """Writes what ``cmpose predict`` writes; a run that was interrupted goes on.

        Args:
            out: the folder: see ``predict_video``.
            outputs: which of video, poses (PoseTrack18's format), coco (COCO's results), csv.
            explain: also pictures of heatmaps, causal tokens and clusters, of three frames.
            explain_frames: of these frames instead.
            overwrite: throws away what an earlier run left for this video.
            progress: shows a progress bar, and prints a summary.
            show: shows the drawn frames in a window; who closes it stops the prediction.

        Returns:
            What ``metrics.json`` holds.

        Raises:
            See ``predict_video``.
        """
        options = replace(
            self.options,
            outputs=tuple(outputs),
            explain=explain,
            explain_frames=tuple(explain_frames),
        )
        return predict_video(
            self.source,
            self.predictor,
            out,
            overwrite=overwrite,
            progress=progress,
            show=show,
            **vars(options),
        )

    def to_pandas(self) -> DataFrame:
        """All poses as a table, of the columns of ``csv/NAME.csv``: a row a person and frame.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "pandas: is not installed: pip install pandas; or save(out, outputs=['csv']), "
                "which needs none"
            ) from error
        skeleton, score = self.predictor.model.skeleton, self.options.keypoint_score
        table = [
            row
            for frame in self
            for row in rows(frame._predicted, frame.number, frame.seconds, skeleton, score)
        ]
        return pandas.DataFrame(table, columns=columns(skeleton))

    def show(self) -> None:
        """Shows the drawn frames in a window as they are predicted, until it is closed.

        Raises:
            WindowError: there is no display.
        """
        with DesktopWindow(f"{self.source}: poses") as window:
            count = 0
            for frame in self:
                window.show(frame.plot())
                count += 1
                if window.closed:
                    return
            if count == 1:  # a picture alone would be gone at once
                window.wait()


def _warn(notes: Sequence[str], warned: Sequence[str]) -> tuple[str, ...]:
    """Warns of each note that was not said yet; returns those that were."""
    for note in notes:
        if note and note not in warned:
            warnings.warn(note, stacklevel=3)
    return tuple(notes)
