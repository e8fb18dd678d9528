"""The report of a prediction: scores by frame, worst and best poses, what was explained."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from cmpose.data.formats.posetrack import load_annotations
from cmpose.data.formats.run import Metrics
from cmpose.data.sequence import AnnotationError, Frame, Person, Sequence
from cmpose.data.transforms import crop_matrix, crop_region, warp
from cmpose.report.inputs import METRICS, ReportError, read_metrics
from cmpose.report.page import Chart, Clip, ClipFrame, Line, Report, Tile
from cmpose.viz.record import RecordError, jpeg_uri, read_record

TRACKS = 8
"""At most so many people have a curve: there are no more colours."""

TILE = (256, 192)
"""(height, width) of a tile in pixels."""

_PICTURE = re.compile(r"(.+)_(\d{6,})_(\d+)")

MEASURE = (
    "There is no ground truth, so that this is by the model's own confidence: the mean score of "
    "the pose's joints (the heatmap's maximum; what poses/*.json holds, so times the box's score "
    "with data.score=heatmap_box). A confident pose can be wrong. Every person counts once; "
    "{count} poses have scores."
)


@dataclass(eq=False)
class _Pose:
    """A predicted pose; ``score`` is the mean of its joints' scores."""

    sequence: Sequence
    frame: Frame
    person: Person
    score: float

    @property
    def track(self) -> tuple[str, int]:
        return self.sequence.file_stem, self.person.track_id

    def __str__(self) -> str:
        return f"{self.sequence.name}, frame {self.frame.index}, person {self.person.track_id}"


def is_prediction(run: Path) -> bool:
    """Whether a folder is what ``cmpose predict`` wrote."""
    if any((run / "poses").glob("[!.]*.json")):
        return True
    metrics = read_metrics(run / METRICS)
    return metrics is not None and metrics.video is not None


def prediction_report(run: Path, count: int) -> Report:
    """What the page of a prediction says; see ``cmpose.report.report.gather``."""
    metrics = read_metrics(run / METRICS) or Metrics()
    poses, people = _poses(run)
    title = metrics.video or run.resolve().name
    report = Report("Prediction", title, _lead(metrics, people))
    report.charts = _charts(poses, people)
    if not report.charts:
        report.absent["curves"] = "Nobody was found in any frame, or poses/ holds no file."
    report.absent["ap"] = (
        "A prediction comes without ground truth, so that it has no AP. Where annotations exist, "
        "cmpose score GROUND_TRUTH POSES tells it."
    )
    report.clips, clip_of = _explained(run)
    report.clips_intro = (
        "What cmpose predict --explain kept. Choose a keypoint, by its name or by a click on a "
        "picture, and move over the frames that were explained; --explain_frames names others."
    )
    report.absent["tokens"] = (
        "No record is in explain/: cmpose predict --explain writes one beside each picture, for a "
        "model with Fine Token Enhancement (model.fine is not off)."
    )
    _tiles(report, run, poses, clip_of, count)
    report.facts = _facts(run, metrics)
    return report


def _poses(run: Path) -> tuple[list[_Pose], list[tuple[int, int]]]:
    """Poses with joint scores, and (frame, people) of every frame."""
    try:
        sequences = load_annotations(run / "poses")
    except FileNotFoundError:
        return [], []
    except AnnotationError as error:
        raise ReportError(f"{error}; predict again") from error
    poses = []
    people = []
    for sequence in sequences:
        for frame in sequence.frames:
            people.append((frame.index, len(frame.people)))
            poses += [
                _Pose(sequence, frame, person, float(np.mean(person.joint_scores)))
                for person in frame.people
                if person.joint_scores is not None
            ]
    return poses, people


def _charts(poses: list[_Pose], people: list[tuple[int, int]]) -> list[Chart]:
    tracks: defaultdict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for pose in poses:
        tracks[pose.track].append((pose.frame.index, pose.score))
    if not tracks:
        return []
    longest = sorted(tracks, key=lambda track: -len(tracks[track]))[:TRACKS]
    several = len({stem for stem, _ in tracks}) > 1
    lines = [
        Line(f"{stem}, person {number}" if several else f"person {number}", sorted(tracks[key]))
        for key in sorted(longest)
        for stem, number in [key]
    ]
    note = "The mean of the joints' scores."
    if len(tracks) > TRACKS:
        note += f" The {TRACKS} people seen longest, of {len(tracks)}."
    charts = [Chart("Score by frame", "frame", lines, note=note)]
    if not several:
        counts: list[tuple[float, float]] = [(frame, count) for frame, count in sorted(people)]
        charts.append(Chart("People by frame", "frame", [Line("people", counts)]))
    return charts


def _explained(run: Path) -> tuple[list[Clip], dict[tuple[str, int], int]]:
    """Records in explain/, those of one person together; and (name, track id) → their index."""
    clips: dict[tuple[str, int], Clip] = {}
    for path in sorted((run / "explain").glob("[!.]*.json")):
        try:
            record = read_record(path)
        except RecordError as error:
            raise ReportError(str(error)) from error
        named = _PICTURE.fullmatch(path.stem)
        key = (named[1], int(named[3])) if named else (path.stem, -1)
        name = f"{named[1]}, person {named[3]}" if named else path.stem
        label = f"frame {int(named[2])}" if named else path.stem
        clips.setdefault(key, Clip(name, [])).frames.append(ClipFrame(label, record))
    for clip in clips.values():
        clip.start = len(clip.frames) // 2
    return list(clips.values()), {key: index for index, key in enumerate(clips)}


def _tiles(
    report: Report,
    run: Path,
    poses: list[_Pose],
    clip_of: dict[tuple[str, int], int],
    count: int,
) -> None:
    """Pictures are cut out of the video with skeletons: the video itself may be elsewhere."""
    if not poses:
        report.absent["clips"] = "There is no pose with scores to rank."
        return
    tracks: defaultdict[tuple[str, int], list[_Pose]] = defaultdict(list)
    for pose in poses:
        tracks[pose.track].append(pose)
    by_worst = sorted(tracks.values(), key=lambda track: min(pose.score for pose in track))
    worst = by_worst[: min(count, -(-len(by_worst) // 2))]
    rest = sorted(by_worst[len(worst) :], key=lambda track: -max(pose.score for pose in track))
    chosen = [
        [min(track, key=lambda pose: pose.score) for track in worst],
        [max(track, key=lambda pose: pose.score) for track in rest[:count]],
    ]
    pictures = _cut_out(run, [pose for group in chosen for pose in group])
    for group, tiles in zip(chosen, (report.worst, report.best), strict=True):
        for pose in group:
            if pose in pictures:
                alt = f"{pose}: predicted pose, mean joint score {pose.score:.2f}"
                clip = clip_of.get(pose.track)
                heading = f"score {pose.score:.2f}"
                tiles.append(Tile(jpeg_uri(pictures[pose]), alt, heading, str(pose), clip))
    report.measure = MEASURE.format(count=len(poses))
    report.groups = ("Lowest score", "Highest score")
    if not report.worst:
        report.best = []
        worst_of_all = chosen[0][0]
        report.absent["clips"] = (
            "Pictures of poses are cut out of NAME_poses.mp4, which is not here or cannot be "
            f"read. The lowest mean joint score is {worst_of_all.score:.2f}: {worst_of_all}."
        )


def _cut_out(run: Path, poses: list[_Pose]) -> dict[_Pose, np.ndarray]:
    """RGB pictures of the poses' boxes; poses whose frame cannot be read are left out."""
    pictures = {}
    videos: defaultdict[str, defaultdict[int, list[_Pose]]] = defaultdict(lambda: defaultdict(list))
    for pose in poses:
        # A video is decoded from its start: the order of frames counts, not a time stamp.
        number = pose.sequence.frames.index(pose.frame)
        videos[pose.sequence.name][number].append(pose)
    for name, poses_of in videos.items():
        capture = cv2.VideoCapture(str(run / f"{name}_poses.mp4"))
        for number in range(max(poses_of) + 1):
            if not capture.grab():
                break
            if number not in poses_of:
                continue
            decoded, picture = capture.retrieve()
            if not decoded:
                break
            for pose in poses_of[number]:
                matrix = crop_matrix(crop_region(pose.person.box, TILE), TILE)
                pictures[pose] = np.ascontiguousarray(warp(picture, matrix, TILE)[..., ::-1])
        capture.release()
    return pictures


def _lead(metrics: Metrics, people: list[tuple[int, int]]) -> str:
    poses = sum(count for _, count in people) if metrics.people is None else metrics.people
    frames = len(people) if metrics.frames is None else metrics.frames
    return f"{poses} poses in {frames} frames (boxes: {metrics.box_source})."


def _facts(run: Path, metrics: Metrics) -> list[tuple[str, str]]:
    facts = [("Folder", str(run))]
    if metrics.video is not None:
        facts += [("Video", metrics.video), ("Boxes", metrics.box_source)]
    for name, value in (
        ("Frames", metrics.frames),
        ("Poses", metrics.people),
        ("Seconds", metrics.seconds),
        ("Frames a second", metrics.frames_per_second),
    ):
        if value is not None:
            facts.append((name, f"{value:.1f}" if isinstance(value, float) else str(value)))
    parts = metrics.seconds_by_part or {}
    return facts + [(f"Seconds: {name}", f"{value:.1f}") for name, value in parts.items()]
