"""Annotated people beside the poses predicted for them: how far off, worst and best."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from cmpose.data.sequence import Frame, Person, Sequence

HEAD = 0.6
"""The head's size is this share of the diagonal of its box, as in the AP."""


@dataclass(eq=False)
class Sample:
    """An annotated person in a frame, the pose predicted for them, and how far off it is.

    Attributes:
        sequence: that the frame is of.
        frame: that the person is in.
        person: as annotated.
        pose: as predicted; None if there is no prediction.
        error: mean distance over the annotated joints in head sizes; None where it is not known.
        head: the head's size in image pixels; None without a head box.
    """

    sequence: Sequence
    frame: Frame
    person: Person
    pose: Person | None
    error: float | None
    head: float | None


@dataclass
class Samples:
    """All samples of a data set.

    Attributes:
        tracks: those of one person together, in order of frames.
        unpredicted: people without a predicted pose.
        headless: people with a predicted pose, but without a head box.
    """

    tracks: list[list[Sample]] = field(default_factory=list)
    unpredicted: int = 0
    headless: int = 0

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
            (self.headless, "without a head box"),
        ]
        said = [f"{count} people {what}" for count, what in parts if count]
        return f" Not measured: {', '.join(said)}." if said else ""


def head_size(person: Person) -> float | None:
    """The head's size in image pixels; None without a head box."""
    if person.head_box is None:
        return None
    size = HEAD * float(np.hypot(*person.head_box[2:]))
    return size if size > 0 else None


def _distances(person: Person, pose: Person) -> np.ndarray:
    """How far a pose's joints are from the annotated ones, in pixels."""
    known = person.keypoints[:, 2] > 0
    return np.linalg.norm(person.keypoints[known, :2] - pose.keypoints[known, :2], axis=1)


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
    samples = Samples()
    for sequence in truth:
        tracks: defaultdict[object, list[Sample]] = defaultdict(list)
        for frame in sequence.frames:
            candidates = poses.get((sequence.file_stem, frame.image_id), [])
            for position, person in enumerate(frame.people):
                if not frame.labeled or person.num_visible == 0:
                    continue
                pose = _pose_of(person, candidates, own_boxes)
                head = head_size(person)
                error = None
                if pose is None:
                    samples.unpredicted += bool(predicted)
                elif head is None:
                    samples.headless += 1
                else:
                    error = float(_distances(person, pose).mean()) / head
                # Someone without an id is a track of their own in every frame.
                alone = (frame.image_id, position)
                key = person.track_id if person.track_id >= 0 else alone
                tracks[key].append(Sample(sequence, frame, person, pose, error, head))
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
    known = [
        [(sample.error, sample) for sample in track if sample.error is not None]
        for track in samples.tracks
    ]
    tracks = [track for track in known if track]
    by_worst = sorted(tracks, key=lambda t: -max(error for error, _ in t))
    worst = by_worst[: min(count, -(-len(tracks) // 2))]
    rest = by_worst[len(worst) :]
    best = sorted(rest, key=lambda t: min(error for error, _ in t))[:count]

    def extreme(track: list[tuple[float, Sample]], sign: int) -> Sample:
        return max(track, key=lambda pair: sign * pair[0])[1]

    return [extreme(track, 1) for track in worst], [extreme(track, -1) for track in best]
