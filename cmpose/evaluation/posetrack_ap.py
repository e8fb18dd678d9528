"""The official PoseTrack average precision of multi-person poses.

The definition is that of the PoseTrack challenge's own evaluator (``poseval``), step by step in
docs/evaluation.md. In short: a predicted joint is right when it lies within half of 0.6 × the
head box's diagonal from the joint of the person its pose was assigned to; per joint, precision
and recall over the whole set, ranked by score, give the area under the monotone precision curve.

Keypoints other than PoseTrack's 15, and people without head boxes, have no such measure. They get
the same average precision at another distance, a tenth (``BOX_THRESHOLD``) of the longer side of
the person's box, under a name of its own (``APResult.metric``).

The official tool leaves the order of equal scores to an unstable sort. Here it is: score
descending, then file name, then frame, then the order of people in the prediction file.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cmpose.data.formats.boxes import IN_SHARES, NOT_A_PERSON
from cmpose.data.formats.messages import ONLY_NEARLY, counted, nearly
from cmpose.data.formats.reader import parse_file
from cmpose.data.sequence import AnnotationError
from cmpose.data.skeleton import POSETRACK, Skeleton
from cmpose.evaluation.matching import Match, Matched, match_frames
from cmpose.evaluation.pose_files import (
    MISSING_SCORE,
    FramePoses,
    parse_poses,
    pose_document,
    skeleton_of_file,
)
from cmpose.evaluation.tally import BOX_THRESHOLD, Reference, Tally

METRICS: dict[Reference, str] = {
    "head": "PoseTrack AP, PCKh 0.5",
    "box": f"keypoint AP, PCK {BOX_THRESHOLD} of the box's longer side (not PoseTrack's AP)",
}
"""Names of the results, by the length that distances are measured in."""

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
        ap: float64 [K] percent, in the skeleton's order. A joint with predictions but without
            ground truth has NaN. A joint without either has 0, which counts in the official mean;
            but NaN when distances are measured in boxes.
        precision: float64 [K] percent, over all of a joint's predictions.
        recall: float64 [K] percent.
        num_files: sequences scored.
        num_frames: frames scored, those with at least one person in the ground truth.
        num_frames_total: frames in the files.
        num_people: people of the ground truth in the scored frames who have a joint outside the
            ignore regions.
        num_predictions: predicted people of whom the same holds.
        notes: what a reader of the numbers should know.
        skeleton: what the joints are.
        reference: the length that distances are measured in; decides the metric's name.
        matched: by what the frames of a sequence were matched → number of sequences.
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
    matched: Counter[str] = field(default_factory=Counter)

    @property
    def metric(self) -> str:
        """Name of the number."""
        return METRICS[self.reference]

    @property
    def mean(self) -> float:
        """Mean AP over the joints, NaN left out; PoseTrack's official Mean ("Total") for its 15."""
        return _mean_ignoring_nan(self.ap)

    @property
    def columns(self) -> dict[str, float]:
        """Mean APs by name: the seven columns for PoseTrack's joints, then ``Mean``."""
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
        """Mean of the seven columns, which some papers report; it is not the official Mean."""
        columns = self.columns
        return _mean_ignoring_nan(np.array([columns[name] for name in COLUMNS]))

    def to_json(self) -> dict[str, Any]:
        """``{"columns": {...}, "joints": [K names], "ap": [K]}``, NaN as ``None``.

        When it is not PoseTrack's AP, ``metric`` comes first and says what it is.
        """
        return ({} if self.reference == "head" else {"metric": self.metric}) | {
            "columns": {name: _none_if_nan(value) for name, value in self.columns.items()},
            "joints": list(self.skeleton.keypoints),
            "ap": [_none_if_nan(value) for value in self.ap],
        }

    def table(self, box_source: str | None = None) -> str:
        """The columns as text, with what was scored and where the people's boxes came from."""
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
            f"{self.metric}, in per cent (boxes: {box_source or 'not stated'})",
            header,
            values,
            mean,
            f"scored {_count(self.num_files, 'file')}, {_count(self.num_frames, 'frame')} with "
            f"people of {self.num_frames_total}, {self.num_people} annotated and "
            f"{self.num_predictions} predicted people",
            "frames matched by "
            + ", ".join(f"{by} ({_count(n, 'file')})" for by, n in self.matched.items()),
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
        reference: length that distances are measured in, see ``score_sequences``.

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
        near = nearly(missing[0], prediction_files)
        hint = f"; {near} {ONLY_NEARLY}" if near else ""
        raise FileNotFoundError(
            f"{prediction_path} has no file for {len(missing)} of {len(truth_files)} ground-truth "
            f"sequences: {_some(missing)}{hint}. Name each prediction file as its ground-truth "
            "file; a sequence of nobody still needs a file with its images"
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
        match: see ``cmpose.evaluation.matching``.
        reference: the length that distances are measured in: ``head`` is PoseTrack's, ``box`` the
            longer side of the person's box. None takes ``head`` for PoseTrack's joints and ``box``
            for others, which can have nothing else.

    Raises:
        ValueError: a sequence has no prediction; frames cannot be matched; a person's joints,
            scores, head box or track id are broken.
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


# By sequence: what messages call it, and a function that reads it, so that one is held at a time.
_Sources = dict[str, tuple[str, Callable[[], Any]]]


def _json_files(folder: Path, role: str) -> dict[str, Path]:
    files = {path.name: path for path in sorted(folder.glob("[!.]*.json"))}
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
    numbers = values[~np.isnan(values)]
    return float(numbers.mean()) if numbers.size else math.nan


# The evaluation --------------------------------------------------------------------------------


def _score(
    truth: _Sources,
    predicted: _Sources,
    match: Match,
    notes: list[str],
    reference: Reference | None,
) -> APResult:
    tally: Tally | None = None
    skeleton, total, not_people = POSETRACK, 0, 0
    matched: dict[str, Matched] = {}
    for name in sorted(truth):
        truth_source, read_truth = truth[name]
        predicted_source, read_predicted = predicted[name]
        document = pose_document(read_truth(), truth_source)
        own = skeleton_of_file(document, truth_source)
        if tally is None:
            skeleton = own
            tally = Tally(len(skeleton), _reference(skeleton, reference, truth_source))
        elif own.keypoints != skeleton.keypoints:
            raise ValueError(
                f"{truth_source}: categories[0].keypoints are {', '.join(own.keypoints)}; the "
                f"ground truth before it has {', '.join(skeleton.keypoints)}: score them apart"
            )
        truth_frames = parse_poses(document, truth_source, skeleton=skeleton)
        predicted_frames = parse_poses(
            read_predicted(), predicted_source, unique_tracks=True, skeleton=skeleton
        )
        _check_pixels(truth_frames, predicted_frames, predicted_source)
        total += len(truth_frames)
        not_people += sum(frame.not_people for frame in truth_frames + predicted_frames)
        matched[name] = match_frames(
            truth_frames, predicted_frames, match, truth_source, predicted_source
        )
        for i, real, guess in matched[name].frames:
            where = f"{truth_source}: frame {i} ({real.name or real.image_id})"
            tally.add_frame(real, guess, where)
    if tally is None or tally.frames == 0:
        raise ValueError(
            f"{_some([source for source, _ in truth.values()])}: no person is annotated in any of "
            f"the {total} frames of the ground truth: there is nothing to score"
        )
    counts = len(truth), tally.frames, total, tally.people, tally.predictions
    notes = [*notes, *_notes_of_frames(matched), *_notes(tally)]
    if not_people:
        notes.append(f"left out: {counted({NOT_A_PERSON: not_people})}")
    by = Counter(each.by for each in matched.values())
    return APResult(*tally.average_precision(), *counts, notes, skeleton, tally.reference, by)


def _check_pixels(
    truth: list[FramePoses], predicted: list[FramePoses], predicted_source: str
) -> None:
    """Raises ValueError if predictions are in shares of the picture, and the truth in pixels."""
    points, real = (
        np.concatenate([np.zeros((0, 2)), *(frame.xy.reshape(-1, 2) for frame in frames)])
        for frames in (predicted, truth)
    )
    points = points[~np.isnan(points).any(axis=1)]
    in_shares = len(points) > 1 and points.any() and (np.abs(points) <= 1.5).all()
    if in_shares and (np.abs(real) > 1.5).any():
        raise ValueError(
            f"{predicted_source}: keypoints are shares of the picture, e.g. {points[0].tolist()}, "
            f"{IN_SHARES}"
        )


def _notes_of_frames(matched: Mapping[str, Matched]) -> list[str]:
    """Which frames were not scored, for only one of the two files has them."""
    notes = []
    extra = {name: each.left_out for name, each in matched.items() if each.left_out}
    if extra:
        names = [f"{name}: {frame}" for name, frames in extra.items() for frame in frames]
        notes.append(
            f"{_count(len(names), 'predicted frame')} without ground truth not scored: "
            f"{_some(names)}"
        )
    absent = sum(each.absent for each in matched.values())
    if absent:
        notes.append(f"{_count(absent, 'frame')} of nobody in the ground truth not predicted")
    return notes


def _notes(tally: Tally) -> list[str]:
    """What a reader should know of joints that count otherwise than one may expect."""
    notes = []
    if tally.no_score:
        joints = _count(tally.no_score, "predicted joint")
        notes.append(f"{joints} without a score, ranked last ({MISSING_SCORE:g})")
    if tally.no_size:
        box = "annotated head box" if tally.reference == "head" else "annotated box"
        notes.append(f"{_count(tally.no_size, box)} of size 0: no joint of theirs can be right")
    return notes


def _reference(skeleton: Skeleton, requested: Reference | None, source: str) -> Reference:
    if requested not in (None, "head", "box"):
        raise ValueError(f"reference must be 'head' or 'box', got {requested!r}")
    if skeleton == POSETRACK:
        return requested or "head"
    if requested == "head":
        raise ValueError(
            f"reference='head': PoseTrack's AP is of its own 15 joints, {source} has "
            f"{len(skeleton)} others; use box"
        )
    return "box"
