"""The official PoseTrack average precision of multi-person poses.

The definition is that of the PoseTrack challenge's own evaluator (``poseval``), step by step in
docs/evaluation.md. In short: a predicted joint is right when it lies within half of 0.6 × the
head box's diagonal from the joint of the person its pose was assigned to; per joint, precision
and recall over the whole set, ranked by score, give the area under the monotone precision curve.

Keypoints other than PoseTrack's 15, and people without head boxes, have no such measure. They get
the same average precision at another distance, :data:`BOX_THRESHOLD` of the longer side of the
person's box, under a name of its own (``APResult.metric``).

The official tool leaves the order of equal scores to an unstable sort. Here it is: score
descending, then file name, then frame, then the person's place in the prediction file.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import shapely

from cmpose.data.formats.reader import parse_file
from cmpose.data.sequence import AnnotationError
from cmpose.data.skeleton import POSETRACK, Skeleton
from cmpose.evaluation.pose_files import (
    MISSING_SCORE,
    FramePoses,
    Match,
    match_frames,
    parse_poses,
    pose_document,
    skeleton_of_file,
)

THRESHOLD = 0.5
"""A joint is right within this many head sizes."""

BOX_THRESHOLD = 0.1
"""Where there are no head sizes: within this share of the longer side of the person's box."""

Reference = Literal["head", "box"]

METRICS: dict[Reference, str] = {
    "head": "PoseTrack AP, PCKh 0.5",
    "box": f"keypoint AP, PCK {BOX_THRESHOLD} of the box's longer side (not PoseTrack's AP)",
}
"""What results are called, by the length that distances are measured in."""

COLUMNS: dict[str, tuple[str, ...]] = {
    "Head": ("head_top", "head_bottom", "nose"),
    "Shoulder": ("right_shoulder", "left_shoulder"),
    "Elbow": ("right_elbow", "left_elbow"),
    "Wrist": ("right_wrist", "left_wrist"),
    "Hip": ("right_hip", "left_hip"),
    "Knee": ("right_knee", "left_knee"),
    "Ankle": ("right_ankle", "left_ankle"),
}
"""The columns of PoseTrack's tables, each the mean of its joints."""


@dataclass
class APResult:
    """Average precision of a set of sequences.

    Attributes:
        ap: float64 [K] percent, in the skeleton's order. NaN: the joint has predictions but no
            ground truth. 0 when it has neither, which the official mean counts; NaN then too when
            distances are in boxes.
        precision: float64 [K] percent, over all of a joint's predictions.
        recall: float64 [K] percent.
        num_files: sequences scored.
        num_frames: frames scored, those with at least one person in the ground truth.
        num_frames_total: frames in the files.
        num_people: people of the ground truth in the scored frames who have a joint outside the
            ignore regions.
        num_predictions: predicted people there, likewise.
        notes: things a reader of the number should know.
        skeleton: what the joints are.
        reference: the length that distances are measured in; decides the metric's name.
    """

    ap: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    num_files: int
    num_frames: int
    num_frames_total: int
    num_people: int
    num_predictions: int
    notes: list[str] = field(default_factory=list)
    skeleton: Skeleton = POSETRACK
    reference: Reference = "head"

    @property
    def metric(self) -> str:
        """What the number is to be called."""
        return METRICS[self.reference]

    @property
    def mean(self) -> float:
        """Over the joints, NaN left out: of PoseTrack's 15 the official Mean ("Total")."""
        return _mean_ignoring_nan(self.ap)

    @property
    def columns(self) -> dict[str, float]:
        """``Mean`` over the joints; of PoseTrack's before it the seven columns of its tables."""
        if self.skeleton != POSETRACK:
            return {"Mean": self.mean}
        named = dict(zip(self.skeleton.keypoints, self.ap, strict=True))
        columns = {
            column: float(np.mean([named[joint] for joint in joints]))
            for column, joints in COLUMNS.items()
        }
        return {**columns, "Mean": self.mean}

    @property
    def seven_column_mean(self) -> float:
        """Mean of the seven columns, as some papers report; not the official Mean."""
        columns = self.columns
        return _mean_ignoring_nan(np.array([columns[name] for name in COLUMNS]))

    def to_json(self) -> dict[str, Any]:
        """``{"columns": {...}, "joints": [K names], "ap": [K]}``, NaN as ``None``.

        When it is not PoseTrack's AP, ``metric`` says first what it is.
        """
        return ({} if self.reference == "head" else {"metric": self.metric}) | {
            "columns": {name: _none_if_nan(value) for name, value in self.columns.items()},
            "joints": list(self.skeleton.keypoints),
            "ap": [_none_if_nan(value) for value in self.ap],
        }

    def table(self, box_source: str | None = None) -> str:
        """The columns as text, with what was scored and whose boxes the poses came from."""
        columns = self.columns
        if self.skeleton != POSETRACK:
            columns = dict(zip(self.skeleton.keypoints, self.ap, strict=True)) | columns
        header = " ".join(f"{name:>8}" for name in columns)
        values = " ".join(f"{value:{max(8, len(name))}.2f}" for name, value in columns.items())
        mean = f"Mean is over the {len(self.ap)} keypoints"
        if self.reference == "head":
            mean = (
                f"Mean is over the 15 joints (official); the mean of the 7 columns is "
                f"{self.seven_column_mean:.2f}"
            )
        lines = [
            f"{self.metric} (boxes: {box_source or 'not stated'})",
            header,
            values,
            mean,
            f"scored {_count(self.num_files, 'file')}, {_count(self.num_frames, 'frame')} with "
            f"people of {self.num_frames_total}, {self.num_people} annotated and "
            f"{self.num_predictions} predicted people",
        ]
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def score_folders(
    ground_truth: str | Path,
    predictions: str | Path,
    *,
    match: Match = "name",
    reference: Reference | None = None,
) -> APResult:
    """Scores a folder of predictions against a folder of ground truth.

    Files are matched by name; both folders may mix PoseTrack17 and PoseTrack18/21 files. Two
    single files may be given instead.

    Args:
        ground_truth: folder of JSON files, one a sequence.
        predictions: folder with a file of the same name for each. Further files are left out and
            noted in the result.
        match: how frames are matched, see ``score_sequences``.
        reference: likewise.

    Raises:
        FileNotFoundError: a folder does not exist, has no JSON, or lacks a sequence's file.
        ValueError: a file is no JSON or no PoseTrack file, or see ``score_sequences``.
    """
    truth_path, prediction_path = Path(ground_truth), Path(predictions)
    for role, path in (("ground truth", truth_path), ("predictions", prediction_path)):
        if not path.exists():
            raise FileNotFoundError(f"{role}: {path} does not exist")
    if truth_path.is_dir() != prediction_path.is_dir():
        raise ValueError(
            f"give two folders or two files; {truth_path} is a "
            f"{'folder' if truth_path.is_dir() else 'file'} and {prediction_path} is not"
        )
    if truth_path.is_file():
        name = truth_path.name
        return _score(
            _files({name: truth_path}), _files({name: prediction_path}), match, [], reference
        )

    truth_files = _json_files(truth_path, "ground truth")
    prediction_files = _json_files(prediction_path, "predictions")
    missing = sorted(set(truth_files) - set(prediction_files))
    if missing:
        raise FileNotFoundError(
            f"{prediction_path} has no file for {len(missing)} of {len(truth_files)} ground-truth "
            f"sequences: {_some(missing)}. Name each prediction file as its ground-truth file; a "
            "sequence of nobody still needs a file with its images"
        )
    notes = []
    extra = sorted(set(prediction_files) - set(truth_files))
    if extra:
        notes.append(
            f"{_count(len(extra), 'prediction file')} without ground truth not scored: "
            f"{_some(extra)}"
        )
    used = {name: prediction_files[name] for name in truth_files}
    return _score(_files(truth_files), _files(used), match, notes, reference)


def score_sequences(
    ground_truth: Mapping[str, Any],
    predictions: Mapping[str, Any],
    *,
    match: Match = "name",
    reference: Reference | None = None,
) -> APResult:
    """Scores parsed JSON objects.

    Args:
        ground_truth: sequence name → PoseTrack17 or 18/21 object.
        predictions: the same names → objects.
        match: ``name`` pairs the frames of a sequence by image id or, where those differ, by file
            name; ``order`` pairs the i-th with the i-th, as the official tool does.
        reference: the length that distances are measured in: ``head`` is PoseTrack's, ``box`` the
            longer side of the person's box. None takes ``head`` for PoseTrack's joints and ``box``
            for others, for which there is no other.

    Raises:
        ValueError: a sequence has no prediction; the number of frames differs; frames cannot be
            matched; a person's joints, scores, head box or track id are broken.
    """
    if not ground_truth:
        raise ValueError("ground_truth has no sequences")
    missing = sorted(set(ground_truth) - set(predictions))
    if missing:
        raise ValueError(f"predictions lacks the sequences {_some(missing)}")

    def sources(role: str, data: Mapping[str, Any]) -> _Sources:
        return {
            name: (f"{role} {name}", functools.partial(data.get, name)) for name in ground_truth
        }

    truth, predicted = sources("ground truth", ground_truth), sources("predictions", predictions)
    return _score(truth, predicted, match, [], reference)


# What to call a sequence in messages, and how to get it: a data set's files one at a time.
_Sources = dict[str, tuple[str, Callable[[], Any]]]


def _json_files(folder: Path, role: str) -> dict[str, Path]:
    files = {path.name: path for path in sorted(folder.glob("*.json"))}
    if not files:
        raise FileNotFoundError(f"{role}: {folder} has no .json files")
    return files


def _files(files: Mapping[str, Path]) -> _Sources:
    return {
        name: (str(path), functools.partial(parse_file, path, AnnotationError))
        for name, path in files.items()
    }


def _some(names: list[str], limit: int = 5) -> str:
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else float(value)


def _mean_ignoring_nan(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else math.nan


# The evaluation --------------------------------------------------------------------------------


class _Tally:
    """Scores and labels of every predicted joint, and counts of annotated joints."""

    def __init__(self, num_keypoints: int, reference: Reference) -> None:
        self.scores: list[np.ndarray] = []  # each [P, K], NaN where a joint is not predicted
        self.right: list[np.ndarray] = []
        self.annotated = np.zeros(num_keypoints, np.int64)
        self.reference = reference

    def average_precision(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        count = len(self.annotated)
        scores = np.concatenate([np.empty((0, count)), *self.scores])
        right = np.concatenate([np.empty((0, count), bool), *self.right])
        ap, precision, recall = np.zeros((3, count))
        if self.reference == "box":
            ap[self.annotated == 0] = math.nan
        for j in range(count):
            predicted = ~np.isnan(scores[:, j])
            if predicted.any():
                ap[j], precision[j], recall[j] = _area_under_curve(
                    scores[predicted, j], right[predicted, j], int(self.annotated[j])
                )
        return 100 * ap, 100 * precision, 100 * recall


def _area_under_curve(
    scores: np.ndarray, right: np.ndarray, annotated: int
) -> tuple[float, float, float]:
    """AP over all recall changes (VOC 2010), and the last precision and recall."""
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(right[order])
    precision = hits / np.arange(1, len(hits) + 1)
    if annotated == 0:
        return math.nan, float(precision[-1]), math.nan
    recall = hits / annotated
    envelope = np.maximum.accumulate(np.append(precision, 0.0)[::-1])[::-1]
    edges = np.concatenate([[0.0], recall, [1.0]])
    ap = float(np.sum(np.diff(edges) * envelope))
    return ap, float(precision[-1]), float(recall[-1])


def _score(
    truth: _Sources,
    predicted: _Sources,
    match: Match,
    notes: list[str],
    reference: Reference | None,
) -> APResult:
    skeleton: Skeleton | None = None
    frames = total = people = predictions = no_score = flat = 0
    for name in sorted(truth):
        truth_source, read_truth = truth[name]
        predicted_source, read_predicted = predicted[name]
        document = pose_document(read_truth(), truth_source)
        own = skeleton_of_file(document, truth_source)
        if skeleton is None:
            skeleton = own
            reference = _reference(skeleton, reference, truth_source)
            tally = _Tally(len(skeleton), reference)
        elif own.keypoints != skeleton.keypoints:
            raise ValueError(
                f"{truth_source}: categories[0].keypoints are {', '.join(own.keypoints)}; the "
                f"ground truth before it has {', '.join(skeleton.keypoints)}: score them apart"
            )
        truth_frames = parse_poses(document, truth_source, skeleton=skeleton)
        predicted_frames = parse_poses(
            read_predicted(), predicted_source, unique_tracks=True, skeleton=skeleton
        )
        total += len(truth_frames)
        pairs = match_frames(truth_frames, predicted_frames, match, truth_source, predicted_source)
        for i, (real, guess) in enumerate(pairs):
            if real.annotated == 0:
                continue
            frames += 1
            regions = real.ignore_regions
            real, guess = _outside(real, regions), _outside(guess, regions)
            lengths = real.head_size if reference == "head" else real.box_size
            if reference == "box" and np.isnan(lengths).any():
                raise ValueError(
                    f"{truth_source}: frame {i} ({real.name or real.image_id}) has a person with "
                    "joints but no box (bbox: x, y, w, h); the distances are in shares of it"
                )
            if np.isnan(lengths).any():
                raise ValueError(
                    f"{truth_source}: frame {i} ({real.name or real.image_id}) has a person with "
                    "joints but no head box (bbox_head; x1, y1, x2, y2 in PoseTrack17); the AP's "
                    "distances are in head sizes. --reference box measures in boxes"
                )
            people += len(real.xy)
            predictions += len(guess.xy)
            flat += int((lengths == 0).sum())
            no_score += int(((guess.scores == MISSING_SCORE) & ~np.isnan(guess.xy[..., 0])).sum())
            _tally_frame(tally, real, guess)
    if frames == 0:
        raise ValueError(
            f"no person is annotated in any of the {total} frames of the ground truth: "
            "there is nothing to score"
        )
    if no_score:
        notes = notes + [
            f"{_count(no_score, 'predicted joint')} without a score, ranked last "
            f"({MISSING_SCORE:g})"
        ]
    if flat:
        of = "head " if reference == "head" else ""
        notes = notes + [
            f"{_count(flat, f'annotated {of}box')} of size 0: no joint of theirs can be right"
        ]
    assert skeleton is not None
    assert reference is not None
    ap, precision, recall = tally.average_precision()
    counts = len(truth), frames, total, people, predictions
    return APResult(ap, precision, recall, *counts, notes, skeleton, reference)


def _reference(skeleton: Skeleton, asked: Reference | None, source: str) -> Reference:
    if asked not in (None, "head", "box"):
        raise ValueError(f"reference must be 'head' or 'box', got {asked!r}")
    if skeleton == POSETRACK:
        return asked or "head"
    if asked == "head":
        raise ValueError(
            f"reference='head': PoseTrack's AP is of its own 15 joints, {source} has "
            f"{len(skeleton)} others; use box"
        )
    return "box"


def _outside(frame: FramePoses, regions: list[np.ndarray]) -> FramePoses:
    """Drops joints inside a region, its border excluded, and people without any (left)."""
    xy = frame.xy
    if regions and len(xy):
        present = ~np.isnan(xy[..., 0])
        points = shapely.points(xy[present])
        inside = np.zeros(len(points), bool)
        for region in regions:
            inside |= shapely.contains(shapely.Polygon(region), points)
        xy = xy.copy()
        xy[present] = np.where(inside[:, None], np.nan, xy[present])
    kept = ~np.isnan(xy[..., 0]).all(axis=1)
    return FramePoses(
        frame.name,
        frame.image_id,
        xy[kept],
        frame.scores[kept],
        frame.head_size[kept],
        frame.box_size[kept],
        frame.annotated,
        frame.ignore_regions,
    )


def _tally_frame(tally: _Tally, real: FramePoses, guess: FramePoses) -> None:
    """Assigns predicted to annotated people and files every predicted joint as right or wrong."""
    annotated = ~np.isnan(real.xy[..., 0])  # [G, K]
    tally.annotated += annotated.sum(axis=0)
    heads = tally.reference == "head"
    lengths, threshold = (real.head_size, THRESHOLD) if heads else (real.box_size, BOX_THRESHOLD)
    people, persons = len(guess.xy), len(real.xy)
    if people == 0:
        return
    right = np.zeros(guess.xy.shape[:2], bool)
    if persons:
        offset = guess.xy[:, None] - real.xy[None]  # NaN unless both joints exist
        pixels = np.sqrt(np.square(offset).sum(axis=-1))
        with np.errstate(divide="ignore", invalid="ignore"):
            match = pixels / lengths[None, :, None] <= threshold  # [P, G, K]
        pck = match.sum(axis=2) / annotated.sum(axis=1)
        best_person = pck.argmax(axis=1)
        only_best = np.zeros_like(pck)
        rows = np.arange(people)
        only_best[rows, best_person] = pck[rows, best_person]
        taken = only_best.argmax(axis=0)  # of each annotated person: its prediction
        for g in np.flatnonzero(only_best.max(axis=0) > 0):
            right[taken[g]] = match[taken[g], g]
    tally.scores.append(np.where(np.isnan(guess.xy[..., 0]), np.nan, guess.scores))
    tally.right.append(right)
