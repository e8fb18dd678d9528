"""Who is in each frame of a video: told by a file, or found by the detector.

An interrupted run's frames come again with what was predicted of them, so that boxes are tracked
as if there had been no interruption, and the detector is not run on them a second time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

from cmpose.data.video import Shot
from cmpose.predict.clock import Clock
from cmpose.predict.detect import Detection, VideoDetections, detect_people
from cmpose.predict.frame import PredictedFrame
from cmpose.predict.options import Options

T = TypeVar("T")


class SeenFrame(NamedTuple):
    """A frame on its way to the network.

    Attributes:
        shot: its number and picture.
        detections: what the detector found in it; None where it was not run.
        earlier: what an interrupted run predicted of it.
    """

    shot: Shot
    detections: list[Detection] | None
    earlier: PredictedFrame | None


def find_people(
    shots: Iterable[Shot],
    earlier: Iterator[PredictedFrame],
    file: VideoDetections | None,
    options: Options,
    clock: Clock,
) -> Iterator[tuple[SeenFrame, list[Detection] | None]]:
    """Frames and who is in them: by a detection file, or by OpenCV's HOG detector without one.

    Args:
        shots: the video from its first frame on.
        earlier: the frames that an interrupted run has predicted, from the first on.
        file: people's boxes, or None.
        options: settled; how often the detector is run, and which of its boxes are taken.
        clock: counts the seconds of ``detect``.

    Returns:
        Frames, and their people before they are tracked, or None where nobody looked.
    """
    if file is None:
        yield from _detected(shots, earlier, options, clock)
        return
    for shot in shots:
        yield SeenFrame(shot, None, next(earlier, None)), file.get(shot.number, [])


def _detected(
    shots: Iterable[Shot], earlier: Iterator[PredictedFrame], options: Options, clock: Clock
) -> Iterator[tuple[SeenFrame, list[Detection] | None]]:
    """The detector also runs in the last frame, so that nobody is lost before it."""
    for shot, last in _with_last(shots):
        before = next(earlier, None)
        detections = None
        if before is not None:
            detections = before.detections
        elif shot.readable and (last or shot.number % options.detect_every == 0):
            with clock("detect"):
                everybody = detect_people(shot.picture)
            detections = [d for d in everybody if d.score >= options.min_score]
        yield SeenFrame(shot, detections, before), detections


def _with_last(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Items, each with whether it is the last."""
    iterator = iter(items)
    for item in iterator:
        for following in iterator:
            yield item, False
            item = following
        yield item, True
