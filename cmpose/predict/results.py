"""Makes the results of ``cmpose predict`` from its journal: counts, files, and a summary."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from cmpose.config import Config
from cmpose.data.formats.messages import counted
from cmpose.data.formats.posetrack18 import write_posetrack18_frames
from cmpose.data.sequence import Frame
from cmpose.data.skeleton import Skeleton
from cmpose.data.video import Video, VideoInfo
from cmpose.evaluation.pose_stream import predicted_frame, write_coco_results
from cmpose.files import InUse, claim_file, write_metrics, writing
from cmpose.predict.clock import Clock
from cmpose.predict.detectors.detect import HOG, VideoDetections
from cmpose.predict.frame import PredictedFrame
from cmpose.predict.journal import Journal
from cmpose.predict.one_euro import KeypointSmoother
from cmpose.predict.options import Options
from cmpose.predict.table import rows, write_csv


class Totals:
    """What predicted frames add up to.

    Attributes:
        counts: frames, people, tracks and boxes, by their names in ``metrics.json``.
        pictures: paths of explaining pictures below the output folder.
    """

    def __init__(self, keypoint_score: float) -> None:
        """
        Args:
            keypoint_score: keypoints of a lower score count as not drawn.
        """
        self.keypoint_score = keypoint_score
        self.counts: Counter[str] = Counter(
            frames_unreadable=0,
            frames_without_people=0,
            people=0,
            tracks=0,
            boxes_interpolated=0,
            keypoints=0,
            keypoints_not_drawn=0,
        )
        self.pictures: list[str] = []
        # All track ids below the number have been met, and those of the set: ids that are given
        # one after the other take no memory.
        self._below, self._above = 0, set[int]()

    def add(self, frame: PredictedFrame) -> None:
        """Counts a frame."""
        people, counts = frame.people, self.counts
        counts["people"] += len(people)
        counts["frames_without_people"] += not people
        counts["boxes_interpolated"] += sum(person.interpolated for person in people)
        for person in people:
            counts["keypoints"] += len(person.scores)
            counts["keypoints_not_drawn"] += int((person.scores < self.keypoint_score).sum())
        counts["frames_unreadable"] += not frame.readable
        self._above.update(p.track_id for p in people if p.track_id >= self._below)
        while self._below in self._above:
            self._above.remove(self._below)
            self._below += 1
        counts["tracks"] = self._below + len(self._above)
        self.pictures += frame.explained


def write_results(
    out: Path,
    video: Video,
    journal: Journal,
    options: Options,
    config: Config,
    skeleton: Skeleton,
) -> None:
    """Writes ``poses/NAME.json``, ``coco/NAME.json`` and ``csv/NAME.csv``, as ``outputs`` says."""
    info = video.info

    def smoothed() -> Iterator[PredictedFrame]:
        return map(KeypointSmoother(options.smooth_keypoints, info.fps), journal.frames())

    def frames() -> Iterator[Frame]:
        for predicted in smoothed():
            position = predicted.number
            source = video.frame_source(position)
            frame = Frame(
                image_id=info.number(position),
                file_name=video.frame_name(position),
                index=info.number(position),
                width=info.width,
                height=info.height,
            )
            people = [person._asdict() for person in predicted.people]
            frame = predicted_frame(frame, people, info.name, config.data.score, skeleton)
            frame.extra = {"source": source} if source else {}
            yield frame

    if "poses" in options.outputs:
        path = out / "poses" / f"{info.name}.json"
        with writing(path):
            write_posetrack18_frames(path, info.name, frames, journal.done, skeleton)
    if "coco" in options.outputs:
        path = out / "coco" / f"{info.name}.json"
        with writing(path):
            write_coco_results(path, frames(), skeleton)
    if "csv" in options.outputs:
        table = (
            row
            for frame in smoothed()
            for number in (info.number(frame.number),)
            for row in rows(frame, number, number / info.fps, skeleton, options.keypoint_score)
        )
        write_csv(out / "csv" / f"{info.name}.csv", skeleton, table)


def metrics_of(
    video: VideoInfo,
    options: Options,
    frames: int,
    start: int,
    totals: Totals,
    boxes: VideoDetections | None,
    clock: Clock,
) -> dict[str, Any]:
    """What ``metrics.json`` holds.

    Args:
        video: what was predicted.
        options: how.
        frames: of the video that were predicted, by this run or an interrupted one.
        start: those by an interrupted one.
        totals: of all frames.
        boxes: of the detection file.
        clock: of this run.
    """
    parts = clock.seconds
    seconds = clock.since_start()
    return {
        "video": Path(video.source).name,
        "fps": video.fps,
        "notes": [note for note in (video.cut_off, *video.notes) if note],
        "box_source": options.box_source,
        "frames": frames,
        "frames_missing": video.missing,
        **totals.counts,
        "keypoint_score": options.keypoint_score,
        **({} if boxes is None else _uses_of(boxes, frames)),
        "resumed_at_frame": start,
        "seconds": seconds,
        "frames_per_second": (frames - start) / seconds,
        "seconds_by_part": dict(parts) | {"rest": seconds - sum(parts.values())},
        "explained": totals.pictures,
    }


def _uses_of(boxes: VideoDetections, frames: int) -> dict[str, dict[str, int]]:
    """How many entries of a detection file are not used, by reason, and what is said of others."""
    behind = Counter({"frame behind the last one predicted": int((boxes.frames >= frames).sum())})
    return {
        "boxes_left_out": dict(+(boxes.counts.left_out + behind)),
        "boxes_kept": dict(+boxes.counts.kept),
    }


def check_somebody(m: dict[str, Any], out: str) -> None:
    """Raises ValueError for metrics that count no people: why, and what to do."""
    if m["people"]:
        return
    if "boxes_left_out" not in m:
        other = ", or --detector rtdetr" if m["box_source"] == HOG else ""
        raise ValueError(
            f"{m['video']}: nobody was found: give --detections FILE{other}, or lower --min_score; "
            f"what there is without people is written to {out}"
        )
    raise ValueError(
        f"{m['box_source']}: nobody is in the {m['frames']} frames that were predicted; left out: "
        f"{counted(m.get('boxes_left_out', {}))}; give boxes of these frames; what there is "
        f"without people is written to {out}"
    )


def write_last_metrics(out: Path, metrics: dict[str, Any]) -> None:
    """Writes ``metrics.json``, which is the last video's.

    Processes that predict several videos into one folder wait for one another here.
    """
    while True:
        with suppress(InUse), claim_file(out / "metrics.json", "predict", "--out"):
            write_metrics(out, metrics)
            return
        time.sleep(0.01)


def summary(m: dict[str, Any], out: Path, unexplained: list[int]) -> str:
    """A few sentences for people: what was predicted, and where it lies.

    Args:
        m: the metrics.
        out: the output folder.
        unexplained: frames that were to be explained, but have nobody in them.
    """
    lines = [
        f"{m['people']} poses of {m['tracks']} tracks in {m['frames']} frames, "
        f"{m['frames_without_people']} of them without people; boxes: {m['box_source']}; "
        f"{m['frames_per_second']:.1f} frames/s; written to {out}"
    ]
    for key in ("boxes_left_out", "boxes_kept"):
        if m.get(key):
            outcome = key.removeprefix("boxes_").replace("_", " ")
            lines.append(f"note: {m['box_source']}: {outcome}: {counted(m[key])}")
    if m["frames_unreadable"]:
        lines.append(f"note: {m['frames_unreadable']} pictures were unreadable, and skipped")
    if m.get("keypoints_not_drawn"):
        lines.append(
            f"note: {m['keypoints_not_drawn']} of {m['keypoints']} keypoints have a score below "
            f"--keypoint-score {m['keypoint_score']:g} and are not drawn; the files have them"
        )
    if unexplained:
        lines.append(f"not explained, for want of people: frames {unexplained}")
    return "\n".join(lines)
