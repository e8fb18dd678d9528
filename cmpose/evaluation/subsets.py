"""Results on the clean, the occluded and the defocused frames of a data set.

Rendered data say of each frame what makes it difficult (``Frame.extra["cmpose"]``, see
docs/rendered.md). A frame belongs to

- ``occluded``: a thing or another person hides at least one joint of somebody;
- ``defocused``: the whole picture is out of focus;
- ``clean``: neither.

A frame that is both occluded and defocused counts in both.

The AP of a subset is the official AP of the data set that consists of these frames alone: ground
truth and predictions are cut to them and then scored, so that joints are ranked among the subset's
own people.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import UNSET, Struct, structs

from cmpose.data.formats.documents import PoseFile
from cmpose.data.formats.reader import Number, Whole, convert, read
from cmpose.data.sequence import AnnotationError, Frame, Sequence
from cmpose.evaluation.pose_files import head_size_of
from cmpose.evaluation.posetrack_ap import score_sequences
from cmpose.evaluation.predictions import PoseRecord
from cmpose.evaluation.tally import THRESHOLD

ALL = "all"
SUBSETS = (ALL, "clean", "occluded", "defocused")


class RenderedFrame(Struct):
    """What got in the way in a rendered frame, as far as subsets depend on it."""

    occluded_joints: Whole = 0
    defocus_sigma: Number = 0.0


def subsets_of(frame: Frame) -> frozenset[str]:
    """The subsets that a frame belongs to; only ``all`` where nothing is recorded."""
    if frame.extra.get("cmpose") is None:
        return frozenset({ALL})
    record = convert(
        frame.extra["cmpose"], RenderedFrame, frame.file_name, AnnotationError, "cmpose"
    )
    names = set()
    if record.occluded_joints > 0:
        names.add("occluded")
    if record.defocus_sigma > 0:
        names.add("defocused")
    return frozenset({ALL} | (names or {"clean"}))


def frames_by_subset(sequences: Iterable[Sequence]) -> dict[str, set[tuple[str, int]]]:
    """Subset → its frames as (file stem, image id), in ``SUBSETS``' order; empty ones left out."""
    members: dict[str, set[tuple[str, int]]] = {name: set() for name in SUBSETS}
    for sequence in sequences:
        for frame in sequence.frames:
            for name in subsets_of(frame):
                members[name].add((sequence.file_stem, frame.image_id))
    return {name: frames for name, frames in members.items() if frames}


def cut_to_frames(document: PoseFile, image_ids: set[int]) -> PoseFile:
    """A PoseTrack18 document with only these images and their people."""
    assert document.images is not UNSET
    assert document.annotations is not UNSET
    return structs.replace(
        document,
        images=[image for image in document.images if image.id in image_ids],
        annotations=[person for person in document.annotations if person.image_id in image_ids],
    )


def subset_ap(
    truth: Mapping[str, PoseFile], predicted: Mapping[str, PoseFile], frames: set[tuple[str, int]]
) -> float | None:
    """The official Mean over the frames given, percent.

    Args:
        truth: file stem → PoseTrack18 document.
        predicted: the same stems → documents.
        frames: (file stem, image id).

    Returns:
        None when nobody is annotated in these frames.
    """
    image_ids: dict[str, set[int]] = {}
    for stem, image_id in sorted(frames):
        image_ids.setdefault(stem, set()).add(image_id)
    cut_truth = {stem: cut_to_frames(truth[stem], ids) for stem, ids in image_ids.items()}
    if not any(document.annotations for document in cut_truth.values()):
        return None
    cut_predicted = {stem: cut_to_frames(predicted[stem], ids) for stem, ids in image_ids.items()}
    mean = score_sequences(cut_truth, cut_predicted).mean
    return None if math.isnan(mean) else mean


def joint_errors(records: Items[PoseRecord], keypoints: np.ndarray) -> list[np.ndarray]:
    """The distances of each pose's annotated joints, in head sizes (0.6 × the box's diagonal).

    Args:
        records: whose poses they are; a record without a person (a detection), or whose person
            has no head box, gives an empty array.
        keypoints: [R, 15, 2] image pixels.
    """
    errors = []
    for record, pose in zip(records, keypoints, strict=True):
        person = record.person
        if person is None or person.head_box is None:
            errors.append(np.empty(0))
            continue
        visible = person.keypoints[:, 2] > 0
        pixels = np.linalg.norm(pose[visible] - person.keypoints[visible, :2], axis=-1)
        size = head_size_of(person.head_box[2], person.head_box[3])
        errors.append(pixels / size if size > 0 else np.full(len(pixels), np.inf))
    return errors


def subset_results(
    sequences: Items[Sequence],
    records: Items[PoseRecord],
    keypoints: np.ndarray,
    truth: Path,
    predictions: Path,
    ap: float,
) -> dict[str, dict[str, Any]]:
    """AP, PCKh and error of every subset that has frames.

    Args:
        sequences: the ground truth's.
        records: whose poses were predicted.
        keypoints: [R, 15, 2] of them, image pixels.
        truth: folder of the ground truth's files. They are read only where subsets are recorded,
            which only PoseTrack18's layout can do.
        predictions: folder with the predictions' files.
        ap: of all frames.

    Returns:
        By subset: ``ap`` (official Mean, percent), ``pckh`` (percent of annotated joints within
        half a head size), ``error`` (median distance in head sizes), ``frames`` (with people) and
        ``joints`` (annotated). ``pckh`` and ``error`` are None when boxes are detections.
    """
    frames = frames_by_subset(sequences)
    stems = [sequence.file_stem for sequence in sequences] if len(frames) > 1 else []
    real, guessed = (
        {stem: read(folder / f"{stem}.json", PoseFile, AnnotationError) for stem in stems}
        for folder in (truth, predictions)
    )
    errors = joint_errors(records, keypoints)
    keys = [(record.sequence.file_stem, record.frame.image_id) for record in records]
    peopled = {(s.file_stem, f.image_id) for s in sequences for f in s.frames if f.people}
    results: dict[str, dict[str, Any]] = {}
    for name, subset in frames.items():
        own = [e for e, key in zip(errors, keys, strict=True) if key in subset]
        distances = np.concatenate([np.empty(0), *own])
        measured = distances.size > 0
        results[name] = {
            "ap": ap if name == ALL else subset_ap(real, guessed, subset),
            "pckh": float(100 * (distances <= THRESHOLD).mean()) if measured else None,
            "error": float(np.median(distances)) if measured else None,
            "frames": len(subset & peopled),
            "joints": int(distances.size),
        }
    return results
