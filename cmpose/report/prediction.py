"""The report of a prediction: scores by frame, worst and best poses, what was explained."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from itertools import islice
from pathlib import Path

import cv2
import numpy as np

from cmpose.data.formats.posetrack import load_annotations
from cmpose.data.formats.run import Metrics
from cmpose.data.sequence import AnnotationError, Frame, Person, Sequence
from cmpose.data.transforms import crop_matrix, crop_region, warp
from cmpose.data.video import VideoError, open_video
from cmpose.predict.journal import FINISHED
from cmpose.report.inputs import METRICS, ReportError, read_metrics
from cmpose.report.page import Chart, Clip, ClipFrame, Line, Report, Thumbnail
from cmpose.viz.record import RecordError, jpeg_uri, read_record

TRACKS = 8
"""At most so many people have a curve: there are no more colours."""

TILE = (256, 192)
"""(height, width) of a tile in pixels."""

LARGE = 1280
"""The longer side of a whole frame is at most so many pixels."""

SOURCES = 12
"""A page shows at most so many videos."""

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
    def track(self) -> int:
        return self.person.track_id

    def __str__(self) -> str:
        return f"frame {self.frame.index}, person {self.person.track_id}"


def is_prediction(run: Path) -> bool:
    """Whether a folder is what ``cmpose predict`` wrote, or holds such folders."""
    return _is_output(run) or bool(_folders(run))


def _is_output(folder: Path) -> bool:
    if any((folder / "poses").glob("[!.]*.json")):
        return True
    metrics = read_metrics(folder / METRICS)
    return metrics is not None and metrics.video is not None


def _folders(run: Path) -> list[Path]:
    """The folders in a folder that ``cmpose predict`` wrote, each for a video."""
    return [path for path in sorted(run.glob("[!.]*/")) if _is_output(path)]


def prediction_report(run: Path, count: int) -> Report:
    """What the page of a prediction says; see ``cmpose.report.report.gather``."""
    sources: list[tuple[Path, str]] = []
    for folder in [run] if _is_output(run) else _folders(run):
        videos = _videos(folder)
        sources += [(folder, name) for name in videos] or [(folder, "")]
    if len(sources) == 1:
        return _of_video(*sources[0], count)
    report = Report("Predictions", run.resolve().name, "", sources_are="Video")
    for folder, name in sources[:SOURCES]:
        part = _of_video(folder, name, count)
        if folder != run:
            part.title = f"{folder.name}: {part.title}"
        report.sources.append(part)
    report.lead = f"{len(sources)} videos. Choose one; everything below is of it."
    if len(sources) > SOURCES:
        report.lead = (
            f"The first {SOURCES} of {len(sources)} videos. Choose one; everything below is of it. "
            "The others can be predicted into folders of their own."
        )
    return report


def _videos(folder: Path) -> list[str]:
    """The names of all videos that were predicted into a folder."""
    poses = {path.stem for path in (folder / "poses").glob("[!.]*.json")}
    return sorted(poses | {path.parent.name for path in (folder / "journal").glob(f"*/{FINISHED}")})


def _metrics(folder: Path, name: str) -> Metrics:
    """Of a video: ``metrics.json`` has those of the last one that was predicted."""
    last = read_metrics(folder / METRICS)
    if last is not None and (not last.video or Path(last.video).stem == name or not name):
        return last
    own = read_metrics(folder / "journal" / name / FINISHED)
    return own or (last if last is not None and len(_videos(folder)) < 2 else None) or Metrics()


def _of_video(folder: Path, name: str, count: int) -> Report:
    """What a page says of one video; ``name`` is empty where there is none."""
    metrics = _metrics(folder, name)
    poses, people = _poses(folder, name)
    title = metrics.video or name or folder.resolve().name
    report = Report("Prediction", title, _lead(metrics, people))
    report.charts = _charts(poses, people)
    if not poses:
        report.absent["curves"] = "Nobody was found in any frame, or poses/ holds no file."
    report.clips, clip_of = _explained(folder, name)
    report.clips_intro = (
        "What cmpose predict --explain kept. Choose a keypoint, by its name or by a click on a "
        "picture, and move over the frames that were explained; --explain-frames names others."
    )
    report.absent["tokens"] = (
        "No record is in explain/: cmpose predict --explain writes one beside each picture, for a "
        "model with Fine Token Enhancement (model.fine is not off)."
    )
    _tiles(report, lambda chosen: _pictures(folder, name, chosen), poses, clip_of, count)
    report.facts = _facts(folder, metrics)
    return report


def _poses(folder: Path, name: str) -> tuple[list[_Pose], list[tuple[int, int]]]:
    """A video's poses with joint scores, and (frame, people) of every frame."""
    try:
        sequences = load_annotations(folder / "poses" / f"{name}.json")
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
    """Scores and people by frame; of one picture there is no curve."""
    tracks: defaultdict[int, list[tuple[float, float]]] = defaultdict(list)
    for pose in poses:
        tracks[pose.track].append((pose.frame.index, pose.score))
    if not tracks or len(people) < 2:
        return []
    longest = sorted(tracks, key=lambda track: -len(tracks[track]))[:TRACKS]
    lines = [Line(f"person {track}", sorted(tracks[track])) for track in sorted(longest)]
    note = "The mean of the joints' scores."
    if len(tracks) > TRACKS:
        note += f" The {TRACKS} people seen longest, of {len(tracks)}."
    counts: list[tuple[float, float]] = [(frame, count) for frame, count in sorted(people)]
    return [
        Chart("Score by frame", "frame", lines, note=note),
        Chart("People by frame", "frame", [Line("people", counts)]),
    ]


def _explained(folder: Path, name: str) -> tuple[list[Clip], dict[int, int]]:
    """A video's records in explain/, those of one person together; track id → their index."""
    clips: dict[int, Clip] = {}
    for path in sorted((folder / "explain").glob("[!.]*.json")):
        named = _PICTURE.fullmatch(path.stem)
        if named is None or named[1] != name:
            continue
        try:
            record = read_record(path)
        except RecordError as error:
            raise ReportError(str(error)) from error
        clip = clips.setdefault(int(named[3]), Clip(f"person {named[3]}", []))
        clip.frames.append(ClipFrame(f"frame {int(named[2])}", record))
    for clip in clips.values():
        clip.start = len(clip.frames) // 2
    return list(clips.values()), {track: index for index, track in enumerate(clips)}


def _tiles(
    report: Report,
    pictures_of: Callable[[list[_Pose]], dict[_Pose, tuple[str, str]]],
    poses: list[_Pose],
    clip_of: dict[int, int],
    count: int,
) -> None:
    """Pictures are cut out of what was drawn: the video itself may be elsewhere."""
    if not poses:
        report.absent["clips"] = "There is no pose with scores to rank."
        return
    tracks: defaultdict[int, list[_Pose]] = defaultdict(list)
    for pose in poses:
        tracks[pose.track].append(pose)
    by_worst = sorted(tracks.values(), key=lambda track: min(pose.score for pose in track))
    worst = by_worst[: min(count, -(-len(by_worst) // 2))]
    rest = sorted(by_worst[len(worst) :], key=lambda track: -max(pose.score for pose in track))
    chosen = [
        [min(track, key=lambda pose: pose.score) for track in worst],
        [max(track, key=lambda pose: pose.score) for track in rest[:count]],
    ]
    pictures = pictures_of([pose for group in chosen for pose in group])
    for group, tiles in zip(chosen, (report.worst, report.best), strict=True):
        for pose in group:
            if pose in pictures:
                cut, large = pictures[pose]
                clip = clip_of.get(pose.track)
                explained = clip is not None and _start_at(report.clips[clip], pose.frame.index)
                alt = f"{pose}: predicted pose, mean joint score {pose.score:.2f}"
                heading = f"score {pose.score:.2f}"
                tiles.append(Thumbnail(cut, alt, heading, str(pose), clip, explained, large))
    report.measure = MEASURE.format(count=len(poses))
    report.groups = ("Lowest score", "Highest score")
    if not report.worst:
        report.worst, report.best = report.best, []
    if not report.worst:
        worst_of_all = chosen[0][0]
        report.absent["clips"] = (
            "Pictures of poses are cut out of NAME_poses.mp4, which is not here or cannot be "
            f"read. The lowest mean joint score is {worst_of_all.score:.2f}: {worst_of_all}."
        )


def _start_at(clip: Clip, frame: int) -> bool:
    """Lets a clip start with a frame, if that was explained."""
    labels = [each.label for each in clip.frames]
    if f"frame {frame}" not in labels:
        return False
    clip.start = labels.index(f"frame {frame}")
    return True


def _pictures(folder: Path, name: str, poses: list[_Pose]) -> dict[_Pose, tuple[str, str]]:
    """Of each pose the person and the whole frame, as data URIs, where they can be read."""
    poses_of_frame: defaultdict[int, list[_Pose]] = defaultdict(list)
    for pose in poses:
        # A video is decoded from its start: the order of frames counts, not a time stamp.
        poses_of_frame[pose.sequence.frames.index(pose.frame)].append(pose)
    pictures: dict[_Pose, tuple[str, str]] = {}
    for number, picture in _drawn(folder, name, max(poses_of_frame) + 1):
        for pose in poses_of_frame[number]:
            matrix = crop_matrix(crop_region(pose.person.box, TILE), TILE)
            cut = np.ascontiguousarray(warp(picture, matrix, TILE)[..., ::-1])
            shrink = min(1.0, LARGE / max(picture.shape[:2]))
            size = [max(1, round(side * shrink)) for side in picture.shape[1::-1]]
            whole = cv2.resize(picture, size, interpolation=cv2.INTER_AREA)
            pictures[pose] = jpeg_uri(cut), jpeg_uri(np.ascontiguousarray(whole[..., ::-1]))
    return pictures


def _drawn(folder: Path, name: str, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """The first frames of a video with skeletons (BGR), until one cannot be read."""
    paths = sorted(folder.glob(f"{escape(name)}_poses.*"))
    if not paths:
        return
    with suppress(VideoError), open_video(paths[0]) as video:
        for frame in islice(video.frames(), count):
            yield frame.number, frame.picture


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
    if metrics.keypoints_not_drawn:
        facts.append(
            (
                "Keypoints not drawn",
                f"{metrics.keypoints_not_drawn} of {metrics.keypoints}, their scores are below "
                f"{metrics.keypoint_score or 0:g}",
            )
        )
    parts = metrics.seconds_by_part or {}
    return facts + [(f"Seconds: {name}", f"{value:.1f}") for name, value in parts.items()]
