"""PoseTrack17's annolist: one JSON a sequence, the official evaluator's own layout.

Every value sits in a one-element list. Joints are named by id in the official order and missing
joints are absent; the only box is the head's, so a person's box is made from the joints.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import PurePosixPath
from typing import Any, TypeVar

import numpy as np

from cmpose.data.formats.documents import Corner, Joints, LabeledFrame, Rect, Region
from cmpose.data.formats.messages import short
from cmpose.data.formats.reader import convert
from cmpose.data.sequence import (
    AnnotationError,
    Frame,
    Person,
    Sequence,
    box_of_keypoints,
    frame_number,
)
from cmpose.data.skeleton import JOINTS, NUM_JOINTS

T = TypeVar("T")


def read_annolist(
    entries: Iterable[LabeledFrame[Any]], source: str, stem: str, *, skip: bool
) -> Sequence:
    """An annolist's entries → one sequence.

    A person's box is the extents of the joints plus one pixel, enlarged 1.2 times about its
    centre, which is how DetectAndTrack's PoseTrack17 files (and so DCPose's) were made. Image
    ids are the frame numbers, unique within the sequence only; ``load_annotations`` makes them
    unique among the sequences it loads.

    Args:
        entries: ``annolist`` of the file; its people may be unchecked.
        source: the file's name, for messages.
        stem: the file's name without ``.json``.
        skip: leaves a broken person out and counts it instead of raising.

    Raises:
        AnnotationError: naming file, field and value.
    """
    sequence = Sequence(name=stem, file_stem=stem, frames=[], source=source)
    folders: dict[str, str] = {}
    for number, entry in enumerate(entries):
        frame = _frame(entry, f"annolist[{number}]", sequence, skip=skip)
        folders.setdefault(str(PurePosixPath(frame.file_name).parent), frame.file_name)
        sequence.frames.append(frame)
    if len(folders) > 1:
        raise AnnotationError(
            f"{source}: annolist[*].image.name: frames lie in {len(folders)} folders "
            f"({', '.join(sorted(folders)[:3])}); an annolist file holds one sequence"
        )
    for folder in folders:
        sequence.name = PurePosixPath(folder).name or stem
    return sequence


def _frame(entry: LabeledFrame[Any], at: str, sequence: Sequence, *, skip: bool) -> Frame:
    where = f"{sequence.source}: {at}"
    if entry.image is None:
        raise AnnotationError(f"{where}: missing key 'image', with the frame's 'name'")
    name = single(single(entry.image, f"{where}.image").name, f"{where}.image.name")
    if not name:
        raise AnnotationError(f"{where}.image: missing key 'name', or an empty one")
    name = name.replace("\\", "/")
    people = [
        person
        for position, rect in enumerate(many(entry.annorect or None))
        if (person := _person_or_count(rect, f"{at}.annorect[{position}]", sequence, skip))
    ]
    index = frame_number(name, f"{where}.image.name")
    return Frame(
        image_id=index,
        file_name=name,
        index=index,
        labeled=_labeled(entry, where, default=bool(people)),
        ignore_regions=regions_of(entry.ignore_regions, f"{where}.ignore_regions"),
        people=people,
    )


def _labeled(entry: LabeledFrame[Any], where: str, *, default: bool) -> bool:
    if entry.is_labeled is None or entry.is_labeled == []:
        return default
    flag = single(entry.is_labeled, f"{where}.is_labeled")
    if flag not in (0, 1):
        raise AnnotationError(f"{where}.is_labeled: expected true or false, got {flag}")
    return bool(flag)


def _person_or_count(rect: Any, at: str, sequence: Sequence, skip: bool) -> Person | None:
    """A person; with ``skip``, None and a count where the annotation is broken."""
    try:
        checked = convert(rect, Rect, sequence.source, AnnotationError, at)
        return _person(checked, f"{sequence.source}: {at}")
    except AnnotationError:
        if not skip:
            raise
        sequence.skipped["broken annotation"] += 1
        return None


def _person(rect: Rect, where: str) -> Person:
    keypoints = np.zeros((NUM_JOINTS, 3))
    scores = np.zeros(NUM_JOINTS)
    has_scores = False
    for position, point in enumerate(many(joints_of(rect, where))):
        at = f"{where}.annopoints.point[{position}]"
        joint = single(point.id, f"{at}.id")
        if not 0 <= joint < NUM_JOINTS:
            raise AnnotationError(
                f"{at}.id: {joint} is no joint; ids run from 0 ({JOINTS[0]}) to 14 ({JOINTS[-1]})"
            )
        if keypoints[joint, 2]:
            raise AnnotationError(f"{at}.id: joint {joint} ({JOINTS[joint]}) occurs twice")
        # A joint that is listed counts as annotated whatever is_visible says: so do the official
        # evaluator and DetectAndTrack's conversion.
        keypoints[joint] = (single(point.x, f"{at}.x"), single(point.y, f"{at}.y"), 1.0)
        # The official evaluator ranks a joint without a score last.
        scores[joint] = -9999.0 if point.score is None else single(point.score, f"{at}.score")
        has_scores |= point.score is not None
    return Person(
        box=(
            box_of_keypoints(keypoints, enlarge=1.2, margin=1.0)
            if keypoints[:, 2].any()
            else np.zeros(4)
        ),
        keypoints=keypoints,
        head_box=_head_box(rect, where),
        track_id=-1 if not_given(rect.track_id) else single(rect.track_id, f"{where}.track_id"),
        score=None if not_given(rect.score) else single(rect.score, f"{where}.score"),
        joint_scores=scores if has_scores else None,
    )


def joints_of(rect: Rect, where: str) -> list[Any] | Any:
    """``annopoints`` of a person: joints, or None for a person without any."""
    if not rect.annopoints:
        return None
    joints: Joints = single(rect.annopoints, f"{where}.annopoints")
    return joints.point


def corners_of_head(rect: Rect, where: str, *, partial: bool = False) -> tuple[float, ...] | None:
    """x1, y1, x2, y2 of a person's head box, or None where nothing of it is given.

    Of ``partial`` boxes some corner may be missing: they are None too, or else an error.
    """
    corners = {key: getattr(rect, key) for key in ("x1", "y1", "x2", "y2")}
    missing = [key for key, corner in corners.items() if not_given(corner)]
    if len(missing) == len(corners) or (partial and missing):
        return None
    if missing:
        raise AnnotationError(
            f"{where}: missing key {missing[0]!r}; a head's box has x1, y1, x2 and y2"
        )
    return tuple(single(corner, f"{where}.{key}") for key, corner in corners.items())


def _head_box(rect: Rect, where: str) -> np.ndarray | None:
    corners = corners_of_head(rect, where)
    if corners is None:
        return None
    x1, y1, x2, y2 = corners
    # The evaluator uses the diagonal only, for which the order of the corners does not matter.
    return np.array([min(x1, x2), min(y1, y2), abs(x2 - x1), abs(y2 - y1)])


def regions_of(regions: list[Region] | Region | None, where: str) -> list[np.ndarray]:
    """Ignore regions as polygons, float64 [n, 2] each."""
    polygons = []
    for position, region in enumerate(many(regions)):
        at = f"{where}[{position}].point"
        corners: list[Corner] = many(region.point)
        points = [(single(c.x, f"{at}.x"), single(c.y, f"{at}.y")) for c in corners]
        polygons.append(np.array(points, dtype=np.float64).reshape(-1, 2))
    return polygons


def not_given(value: Any) -> bool:
    return value is None or value == []


def single(value: list[T] | T | Any, where: str) -> T | Any:
    """``[v]`` or ``v`` → v: annolist wraps scalars, but some tools write them bare."""
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise AnnotationError(f"{where}: expected one value, got {len(value)}: {short(value)}")
    return value[0]


def many(value: Any) -> list[Any]:
    """A list, or a bare object where a converter dropped the list around a single element."""
    return value if isinstance(value, list) else [] if value is None else [value]
