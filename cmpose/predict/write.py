"""What ``cmpose predict`` writes of each frame that was predicted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np

from cmpose.data.video import VideoInfo
from cmpose.data.video_writer import VideoWriter, part_of, video_writer
from cmpose.files import whole_file, writing
from cmpose.predict.clock import Clock
from cmpose.predict.drawing import Explainer, draw_frame
from cmpose.predict.frame import PredictedFrame
from cmpose.predict.journal import Journal
from cmpose.predict.one_euro import KeypointSmoother
from cmpose.predict.options import Options
from cmpose.predict.outputs import drawn_file
from cmpose.predict.predictor import Predictor
from cmpose.predict.results import Totals
from cmpose.predict.window import DesktopWindow

_QUALITY = {".jpg": cv2.IMWRITE_JPEG_QUALITY, ".webp": cv2.IMWRITE_WEBP_QUALITY}


class PictureWriter:
    """Writes the one drawn frame of a picture, in the format that its name says."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, picture: np.ndarray) -> None:
        """Writes a frame, uint8 [H, W, 3] BGR, whole or not at all.

        Raises:
            OutputError: the disk is full.
        """
        ending = self.path.suffix.replace("jpeg", "jpg")
        quality = [_QUALITY[ending], 95] if ending in _QUALITY else []
        encoded, data = cv2.imencode(ending, picture, quality)
        assert encoded
        with whole_file(self.path) as partial:
            partial.write_bytes(data.tobytes())


class FrameWriter:
    """Explains predicted frames, notes them in the journal, counts and draws them.

    Attributes:
        totals: of all frames so far.
        explainer: what is explained.
        to_draw: whether the video with skeletons is to be drawn; an earlier run may have done it.
    """

    def __init__(
        self,
        predictor: Predictor,
        info: VideoInfo,
        out: Path,
        journal: Journal,
        options: Options,
        clock: Clock,
        window: DesktopWindow | None = None,
    ) -> None:
        """
        Args:
            predictor: the model that frames are predicted by.
            info: the video's.
            out: the output folder.
            journal: with the frames that an interrupted run has predicted.
            options: settled.
            clock: counts the seconds of ``explain``, ``journal``, ``draw`` and ``encode``.
            window: shows the drawn frames.
        """
        self.info, self.journal, self.clock = info, journal, clock
        self.skeleton = predictor.model.skeleton
        self.keypoint_score = options.keypoint_score
        self.totals = Totals(self.keypoint_score)
        self.explainer = Explainer(predictor, info, out, options)
        self._smoothed = KeypointSmoother(options.smooth_keypoints, info.fps)
        self.path, self.window = drawn_file(out, info), window
        self.to_draw = "video" in options.outputs and not (journal.ended and self.path.exists())
        self._start = journal.done
        self._video: VideoWriter | PictureWriter | None = None

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Opens the video that is to be drawn, and gives it its name when all frames are in it.

        Raises:
            VideoError: FFmpeg cannot write it.
            OutputError: the disk is full.
        """
        if not self.to_draw:
            yield
            return
        if not self.journal.ended:
            with writing(self.path):
                self.path.unlink(missing_ok=True)  # of a run that was thrown away
        if self.info.picture:
            self._video = PictureWriter(self.path)
            yield
            return
        size = self.info.width, self.info.height
        with video_writer(self.path, size, self.info.fps) as self._video:
            yield

    def write(self, group: Sequence[PredictedFrame]) -> None:
        """Frames that were predicted together, or one that the journal has already.

        Raises:
            OutputError: the disk is full; of ``group`` all or nothing is in the journal then.
        """
        if group[0].number >= self._start:
            with self.clock("explain"):
                group = [replace(f, explained=self.explainer.explain(f)) for f in group]
            with self.clock("journal"):
                self.journal.append(group)
        for frame in group:
            self.count(frame)
            # The window does not show a frame that was not decoded, as an earlier run predicted it.
            if self._video is None and (self.window is None or not frame.picture.size):
                continue
            with self.clock("draw"):
                picture = draw_frame(self._smoothed(frame), self.skeleton, self.keypoint_score)
            if self._video is not None:
                with self.clock("encode"):
                    self._video.write(picture)
            if self.window is not None:
                self.window.show(picture[..., ::-1])

    def count(self, frame: PredictedFrame) -> None:
        """A frame that is in the journal; nothing is drawn."""
        self.totals.add(frame)
        self.explainer.due(frame)  # so that it is not explained again

    def drawn_so_far(self) -> str:
        """For people: where the part of the video lies that is drawn."""
        if not isinstance(self._video, VideoWriter):
            return ""
        return f"; what is drawn of the video is in {part_of(self.path)}"
