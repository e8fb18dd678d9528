"""Who is in each frame of a video: told by a file, or found by the detector.

An interrupted run's frames come again with what was predicted of them, so that boxes are tracked
as if there had been no interruption, and the detector is not run on them a second time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

import numpy as np

from cmpose.data.video import VideoFrame
from cmpose.predict.clock import Clock
from cmpose.predict.detectors.box_arrays import detections_of
from cmpose.predict.detectors.detect import Detection, VideoDetections, detect_people
from cmpose.predict.frame import PredictedFrame
from cmpose.predict.options import Options

T = TypeVar("T")


class SeenFrame(NamedTuple):
    """A frame on its way to the network.

    Attributes:
        frame: its number and picture.
        detections: what the detector found in it; None where it was not run.
        earlier: what an interrupted run predicted of it.
    """

    frame: VideoFrame
    detections: list[Detection] | None
    earlier: PredictedFrame | None


def find_people(
    frames: Iterable[VideoFrame],
    earlier: Iterator[PredictedFrame],
    file: VideoDetections | None,
    options: Options,
    clock: Clock,
) -> Iterator[tuple[SeenFrame, list[Detection] | None]]:
    """Frames and who is in them: by boxes that are given, or by a detector without them.

    Args:
        frames: the video's, from the first on.
        earlier: the frames that an interrupted run has predicted, from the first on.
        file: people's boxes, or None.
        options: settled; how often the detector is run, and which of its boxes are taken.
        clock: counts the seconds of ``detect``.

    Returns:
        Frames, and their people before they are tracked, or None where nobody looked.
    """
    if file is None:
        yield from _detected(frames, earlier, options, clock)
        return
    for frame in frames:
        yield SeenFrame(frame, None, next(earlier, None)), file.get(frame.number, [])


def _detected(
    frames: Iterable[VideoFrame], earlier: Iterator[PredictedFrame], options: Options, clock: Clock
) -> Iterator[tuple[SeenFrame, list[Detection] | None]]:
    """The detector also runs in the last frame, so that nobody is lost before it."""
    assert options.detect_every is not None  # once the options are settled
    for frame, last in _with_last(frames):
        before = next(earlier, None)
        detections = None
        if before is not None:
            detections = before.detections
        elif frame.readable and (last or frame.number % options.detect_every == 0):
            with clock("detect"):
                everybody = _detect(frame, options)
            detections = [d for d in everybody if d.score >= options.min_score]
        yield SeenFrame(frame, detections, before), detections


def _detect(frame: VideoFrame, options: Options) -> list[Detection]:
    if options.detector is None:
        return detect_people(frame.picture)
    boxes = options.detector(np.ascontiguousarray(frame.picture[..., ::-1]))
    return detections_of(boxes, f"detector {options.box_source}, frame {frame.number}")


def _with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Items, each with whether it is the last."""
    iterator = iter(items)
    for item in iterator:
        for following in iterator:
            yield item, False
            item = following
        yield item, True
