"""Writing PoseTrack18's JSON, and its image ids. :mod:`cmpose.data.formats.coco` reads it."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from cmpose.data.formats.documents import IMAGE_FIELDS
from cmpose.data.sequence import Frame, Person, Sequence
from cmpose.data.skeleton import (
    CATEGORY,
    POSETRACK,
    Skeleton,
    to_slots17,
)
from cmpose.files import whole_file

_SOURCES = {"mpii": 1, "bonn": 2, "mpiinew": 3}


def posetrack18_image_id(name: str, frame: int) -> int:
    """PoseTrack18's image id: T·10¹⁰ + sequence·10⁴ + frame, T = 1 mpii, 2 bonn, 3 mpiinew.

    Args:
        name: the sequence's, e.g. ``000342_mpii_test``.
        frame: frame number, 0 to 9999.

    Raises:
        ValueError: for a name of another form, or a frame number that does not fit.
    """
    match = re.match(r"(\d{1,6})_(mpiinew|mpii|bonn)(_|$)", name)
    if match is None:
        raise ValueError(
            f"name: {name!r} is not <number>_<mpii|bonn|mpiinew>[_<split>], "
            "which PoseTrack18's ids are made from"
        )
    if not 0 <= frame < 10_000:
        raise ValueError(f"frame: {frame} is not between 0 and 9999")
    return _SOURCES[match[2]] * 10**10 + int(match[1]) * 10**4 + frame


def write_posetrack18(path: str | os.PathLike[str], sequence: Sequence) -> None:
    """Writes one sequence as a PoseTrack18 file, whole or not at all.

    Keypoints (PoseTrack's in the 17 slots) with unannotated ones (0, 0, 0), ``bbox``,
    ``bbox_head``, ``track_id``, ignore polygons and, when present, ``score``, ``scores`` and
    ``person_id``; ``Frame.extra`` goes into the image entries. Annotation ids are image id · 100 +
    position in the frame.

    Args:
        path: of the file; parent folders are made.
        sequence: its ``name`` up to the first underscore becomes ``vid_id``.

    Raises:
        ValueError: if an image id occurs twice, ``extra`` holds a field that the writer sets, or
            a number is not finite.
    """
    image_ids: set[int] = set()
    for frame in sequence.frames:
        if frame.image_id in image_ids:
            raise ValueError(f"image_id: {frame.image_id} ({frame.file_name}) occurs twice")
        image_ids.add(frame.image_id)
    nframes = sequence.nframes or len(sequence.frames)
    write_posetrack18_frames(
        path, sequence.name, lambda: sequence.frames, nframes, sequence.skeleton
    )


def write_posetrack18_frames(
    path: str | os.PathLike[str],
    name: str,
    frames: Callable[[], Iterable[Frame]],
    nframes: int,
    skeleton: Skeleton = POSETRACK,
) -> None:
    """``write_posetrack18`` of frames that are made as they are asked for, one at a time.

    Args:
        path: of the file; parent folders are made.
        name: of the sequence.
        frames: called twice, for the file lists images before annotations; with ids that differ.
        nframes: frames the video has.
        skeleton: of the frames' people.

    Raises:
        ValueError: ``extra`` holds a field that the writer sets, or a number is not finite.
    """
    vid_id = name.split("_")[0]
    images = (_image(frame, vid_id, nframes) for frame in frames())
    annotations = (
        _annotation(person, frame, position, skeleton)
        for frame in frames()
        for position, person in enumerate(frame.people)
    )
    with whole_file(path, "run the same command again") as partial, open(partial, "w") as file:
        for lead, entries in (('{"images": [', images), ('], "annotations": [', annotations)):
            file.write(lead)
            for number, entry in enumerate(entries):
                text = json.dumps(entry, allow_nan=False)
                file.write(f", {text}" if number else text)
        category = CATEGORY if skeleton == POSETRACK else skeleton.category()
        file.write(f'], "categories": {json.dumps([category])}}}')


def _image(frame: Frame, vid_id: str, nframes: int) -> dict[str, Any]:
    clash = IMAGE_FIELDS & frame.extra.keys()
    if clash:
        raise ValueError(f"extra: {frame.file_name}: {sorted(clash)} are set by the writer")
    image: dict[str, Any] = {
        "file_name": frame.file_name,
        "id": frame.image_id,
        "frame_id": frame.image_id,
        "vid_id": vid_id,
        "nframes": nframes,
        "is_labeled": frame.labeled,
        "ignore_regions_x": [region[:, 0].tolist() for region in frame.ignore_regions],
        "ignore_regions_y": [region[:, 1].tolist() for region in frame.ignore_regions],
    }
    if frame.width is not None and frame.height is not None:
        image |= {"width": frame.width, "height": frame.height}
    return image | frame.extra


def _annotation(person: Person, frame: Frame, position: int, skeleton: Skeleton) -> dict[str, Any]:
    def numbers(field: str, values: np.ndarray) -> list[float]:
        values = np.asarray(values, dtype=np.float64)
        if not np.isfinite(values).all():
            raise ValueError(
                f"{field}: person {position} of {frame.file_name} is not finite: {values.tolist()}"
            )
        return values.ravel().tolist()

    def slots(values: np.ndarray) -> np.ndarray:
        return to_slots17(values) if skeleton == POSETRACK else np.asarray(values)

    pose, scores = person.keypoints, person.joint_scores
    if pose.shape != (len(skeleton), 3):
        raise ValueError(
            f"keypoints: person {position} of {frame.file_name} has {list(pose.shape)}, expected "
            f"[{len(skeleton)}, 3] for the sequence's skeleton"
        )
    annotation: dict[str, Any] = {
        "id": frame.image_id * 100 + position,
        "image_id": frame.image_id,
        "track_id": person.track_id,
        "category_id": 1,
        "bbox": numbers("box", person.box),
        "keypoints": numbers("keypoints", slots(np.where(pose[:, 2:] > 0, pose, 0.0))),
        "scores": (
            [] if scores is None else numbers("joint_scores", slots(np.asarray(scores)[:, None]))
        ),
    }
    if person.head_box is not None:
        annotation["bbox_head"] = numbers("head_box", person.head_box)
    if person.score is not None:
        annotation["score"] = numbers("score", np.array([person.score]))[0]
    if person.person_id is not None:
        annotation["person_id"] = person.person_id
    return annotation
