"""Annotated people beside the poses predicted for them: how far off, worst and best."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from cmpose.data.sequence import Frame, Person, Sequence
from cmpose.data.skeleton import POSETRACK
from cmpose.evaluation.tally import BOX_THRESHOLD, THRESHOLD, Reference

HEAD = 0.6
"""The head's size is this share of the diagonal of its box, as in the AP."""


class Unit(NamedTuple):
    """What errors are measured in: several of it, what it is, and what lacks it, for people."""

    name: str
    definition: str
    lacking: str


UNITS: dict[Reference, Unit] = {
    "head": Unit(
        "head sizes",
        f"{HEAD} × the diagonal of the head box; the AP lets {THRESHOLD} pass",
        "without a head box",
    ),
    "box": Unit(
        "box lengths",
        f"the longer side of the person's box; the AP lets {BOX_THRESHOLD} pass",
        "without a box",
    ),
}
"""By the length that the AP of the same annotations divides distances by."""


def reference_of(truth: list[Sequence]) -> Reference:
    """Whether errors are in head sizes, which other keypoints than PoseTrack's do not have."""
    people = (p for sequence in truth for frame in sequence.frames for p in frame.people)
    own = any(sequence.skeleton != POSETRACK for sequence in truth)
    return "box" if own or not any(p.head_box is not None for p in people) else "head"


@dataclass(eq=False)
class Sample:
    """An annotated person in a frame, the pose predicted for them, and how far off it is.

    Attributes:
        sequence: that the frame is of.
        frame: that the person is in.
        person: as annotated.
        pose: as predicted; None if there is no prediction.
        error: mean distance over the annotated joints, divided by ``unit``; None where it is not
            known.
        unit: the head's size, or the box's, in image pixels; None without one.
    """

    sequence: Sequence
    frame: Frame
    person: Person
    pose: Person | None
    error: float | None
    unit: float | None


@dataclass
class Samples:
    """All samples of a data set.

    Attributes:
        tracks: those of one person together, in order of frames.
        reference: what errors are divided by.
        predicted: whether there are predictions at all.
        unpredicted: people without a predicted pose.
        unmeasured: people with a predicted pose, but without a head box, or a box.
    """

    tracks: list[list[Sample]] = field(default_factory=list)
    reference: Reference = "head"
    predicted: bool = True
    unpredicted: int = 0
    unmeasured: int = 0

    @property
    def unit(self) -> Unit:
        """What errors are measured in."""
        return UNITS[self.reference]

    @property
    def ranked(self) -> bool:
        """Whether any error is known."""
        return self.measured > 0

    @property
    def measured(self) -> int:
        """Poses whose error is known."""
        return sum(sample.error is not None for track in self.tracks for sample in track)

    def left_out(self) -> str:
        """What could not be measured, in words."""
        parts = [
            (self.unpredicted, "without a predicted pose"),
            (self.unmeasured, self.unit.lacking),
        ]
        phrases = [
            f"{count} {'person' if count == 1 else 'people'} {reason}"
            for count, reason in parts
            if count
        ]
        return f" Not measured: {', '.join(phrases)}." if phrases else ""


def unit_size(person: Person, reference: Reference) -> float | None:
    """The size of the head, or of the box, in image pixels; None where there is none."""
    if reference == "box":
        size = float(max(person.box[2:]))
    elif person.head_box is None:
        return None
    else:
        size = HEAD * float(np.hypot(*person.head_box[2:]))
    return size if size > 0 else None


def _distances(person: Person, pose: Person) -> np.ndarray:
    """How far a pose's joints are from the annotated ones, in pixels."""
    visible = person.keypoints[:, 2] > 0
    return np.linalg.norm(person.keypoints[visible, :2] - pose.keypoints[visible, :2], axis=1)


def rank(truth: list[Sequence], predicted: list[Sequence], *, own_boxes: bool) -> Samples:
    """Finds each annotated person's predicted pose and measures it.

    Args:
        truth: annotated sequences.
        predicted: with the same ``file_stem`` and image ids; those not there are not measured.
        own_boxes: poses were predicted in annotated boxes, so they are told by track id. Else,
            and where no id fits, a person's pose is the closest one in the frame.
    """
    poses = {
        (sequence.file_stem, frame.image_id): frame.people
        for sequence in predicted
        for frame in sequence.frames
    }
    samples = Samples(reference=reference_of(truth), predicted=bool(predicted))
    for sequence in truth:
        tracks: defaultdict[object, list[Sample]] = defaultdict(list)
        for frame in sequence.frames:
            candidates = poses.get((sequence.file_stem, frame.image_id), [])
            for position, person in enumerate(frame.people):
                if not frame.labeled or person.num_visible == 0:
                    continue
                pose = _pose_of(person, candidates, own_boxes)
                unit = unit_size(person, samples.reference)
                error = None
                if pose is None:
                    samples.unpredicted += samples.predicted
                elif unit is None:
                    samples.unmeasured += 1
                else:
                    error = float(_distances(person, pose).mean()) / unit
                # Someone without an id is a track of their own in every frame.
                alone = (frame.image_id, position)
                key = person.track_id if person.track_id >= 0 else alone
                tracks[key].append(Sample(sequence, frame, person, pose, error, unit))
        for track in tracks.values():
            samples.tracks.append(sorted(track, key=lambda sample: sample.frame.index))
    return samples


def _pose_of(person: Person, candidates: list[Person], own_boxes: bool) -> Person | None:
    if own_boxes and person.track_id >= 0:
        for pose in candidates:
            if pose.track_id == person.track_id:
                return pose
    return min(candidates, key=lambda pose: _distances(person, pose).mean(), default=None)


def pick(samples: Samples, count: int) -> tuple[list[Sample], list[Sample]]:
    """The worst and the best samples, the extreme ones first, a person in one of them only.

    Without errors: the first people's middle frames, and none.
    """
    if not samples.ranked:
        return [track[len(track) // 2] for track in samples.tracks[:count]], []
    measured = [
        [(sample.error, sample) for sample in track if sample.error is not None]
        for track in samples.tracks
    ]
    tracks = [track for track in measured if track]
    by_worst = sorted(tracks, key=lambda t: -max(error for error, _ in t))
    worst = by_worst[: min(count, -(-len(tracks) // 2))]
    rest = by_worst[len(worst) :]
    best = sorted(rest, key=lambda t: min(error for error, _ in t))[:count]

    def extreme(track: list[tuple[float, Sample]], sign: int) -> Sample:
        return max(track, key=lambda pair: sign * pair[0])[1]

    return [extreme(track, 1) for track in worst], [extreme(track, -1) for track in best]
