"""PoseTrack17's annolist: one JSON a sequence, the official evaluator's own layout.

Every value sits in a one-element list. Joints are named by id in the official order and missing
joints are absent; the only box is the head's, so a person's box is made from the joints.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from cmpose.data.sequence import (
    AnnotationError,
    Frame,
    Person,
    Sequence,
    as_flag,
    as_floats,
    as_int,
    as_list,
    as_text,
    box_of_keypoints,
    frame_number,
    guarded,
    require,
    short,
)
from cmpose.data.skeleton import JOINTS, NUM_JOINTS


def read_annolist(data: Mapping[str, Any], source: str, stem: str, *, skip: bool) -> Sequence:
    """An annolist document → one sequence.

    A person's box is the extents of the joints plus one pixel, enlarged 1.2 times about its
    centre, which is how DetectAndTrack's PoseTrack17 files (and so DCPose's) were made. Image
    ids are the frame numbers, unique within the sequence only; ``load_annotations`` makes them
    unique among the sequences it loads.

    Args:
        data: the parsed file, with ``annolist``.
        source: the file's name, for messages.
        stem: the file's name without ``.json``.
        skip: leaves a broken person out and counts it instead of raising.

    Raises:
        AnnotationError: naming file, field and value.
    """
    entries = as_list(require(data, "annolist", source), f"{source}: annolist")
    sequence = Sequence(name=stem, file_stem=stem, frames=[], source=source)
    folders: dict[str, str] = {}
    for number, entry in enumerate(entries):
        where = f"{source}: annolist[{number}]"
        frame = _frame(entry, where, sequence, skip=skip)
        folders.setdefault(str(PurePosixPath(frame.file_name).parent), where)
        sequence.frames.append(frame)
    if len(folders) > 1:
        raise AnnotationError(
            f"{source}: annolist[*].image.name: frames lie in {len(folders)} folders "
            f"({', '.join(sorted(folders)[:3])}); an annolist file holds one sequence"
        )
    for folder in folders:
        sequence.name = PurePosixPath(folder).name or stem
    return sequence


def _frame(entry: Any, where: str, sequence: Sequence, *, skip: bool) -> Frame:
    image = _single(require(entry, "image", where), f"{where}.image")
    name = as_text(
        _single(require(image, "name", f"{where}.image"), f"{where}.image.name"),
        f"{where}.image.name",
    ).replace("\\", "/")
    index = frame_number(name, f"{where}.image.name")
    rects = entry.get("annorect")
    rects = [] if rects is None else _many(rects, f"{where}.annorect")
    people = []
    for position, rect in enumerate(rects):
        person = guarded(_person, sequence, skip, rect, f"{where}.annorect[{position}]")
        if person is not None:
            people.append(person)
    labeled = bool(people)
    if entry.get("is_labeled") not in (None, []):
        labeled = as_flag(
            _single(entry["is_labeled"], f"{where}.is_labeled"), f"{where}.is_labeled"
        )
    return Frame(
        image_id=index,
        file_name=name,
        index=index,
        labeled=labeled,
        ignore_regions=_regions(entry.get("ignore_regions"), f"{where}.ignore_regions"),
        people=people,
    )


def _person(rect: Any, where: str) -> Person:
    if not isinstance(rect, Mapping):
        raise AnnotationError(f"{where}: expected an object, got {short(rect)}")
    keypoints = np.zeros((NUM_JOINTS, 3))
    scores = np.zeros(NUM_JOINTS)
    has_scores = False
    for position, point in enumerate(_points(rect.get("annopoints"), f"{where}.annopoints")):
        at = f"{where}.annopoints.point[{position}]"
        joint = as_int(_single(require(point, "id", at), f"{at}.id"), f"{at}.id")
        if not 0 <= joint < NUM_JOINTS:
            raise AnnotationError(
                f"{at}.id: {joint} is no joint; ids run from 0 ({JOINTS[0]}) to 14 ({JOINTS[-1]})"
            )
        if keypoints[joint, 2]:
            raise AnnotationError(f"{at}.id: joint {joint} ({JOINTS[joint]}) occurs twice")
        # A joint that is listed counts as annotated whatever is_visible says: so do the official
        # evaluator and DetectAndTrack's conversion.
        keypoints[joint] = (_number(point, "x", at), _number(point, "y", at), 1.0)
        # The official evaluator ranks a joint without a score last.
        scores[joint] = _number(point, "score", at) if "score" in point else -9999.0
        has_scores |= "score" in point
    return Person(
        box=(
            box_of_keypoints(keypoints, enlarge=1.2, margin=1.0)
            if keypoints[:, 2].any()
            else np.zeros(4)
        ),
        keypoints=keypoints,
        head_box=_head_box(rect, where),
        track_id=(
            as_int(_single(rect["track_id"], f"{where}.track_id"), f"{where}.track_id")
            if rect.get("track_id") not in (None, [])
            else -1
        ),
        score=_number(rect, "score", where) if rect.get("score") not in (None, []) else None,
        joint_scores=scores if has_scores else None,
    )


def _points(annopoints: Any, where: str) -> list[Any]:
    """``annopoints`` of a person: [{"point": [...]}], or empty for a person without joints."""
    if annopoints is None or annopoints == []:
        return []
    points = require(_single(annopoints, where), "point", where)
    return _many(points, f"{where}.point")


def _head_box(rect: Mapping[str, Any], where: str) -> np.ndarray | None:
    if not any(rect.get(key) not in (None, []) for key in ("x1", "y1", "x2", "y2")):
        return None
    x1, y1, x2, y2 = (_number(rect, key, where) for key in ("x1", "y1", "x2", "y2"))
    # The evaluator uses the diagonal only, for which the order of the corners does not matter.
    return np.array([min(x1, x2), min(y1, y2), abs(x2 - x1), abs(y2 - y1)])


def _regions(regions: Any, where: str) -> list[np.ndarray]:
    if regions is None or regions == []:
        return []
    polygons = []
    for position, region in enumerate(_many(regions, where)):
        at = f"{where}[{position}]"
        at_point = f"{at}.point"
        corners = [
            (_number(point, "x", at_point), _number(point, "y", at_point))
            for point in _many(require(region, "point", at), at_point)
        ]
        polygons.append(np.array(corners, dtype=np.float64).reshape(-1, 2))
    return polygons


def _number(entry: Any, key: str, where: str) -> float:
    value = require(entry, key, where)
    return float(as_floats(value if isinstance(value, list) else [value], 1, f"{where}.{key}")[0])


def _single(value: Any, where: str) -> Any:
    """``[v]`` or ``v`` → v: annolist wraps scalars, but some tools write them bare."""
    if not isinstance(value, list):
        return value
    if len(value) != 1:
        raise AnnotationError(f"{where}: expected one value, got {len(value)}: {short(value)}")
    return value[0]


def _many(value: Any, where: str) -> list[Any]:
    """A list, or a bare object where a converter dropped the list around a single element."""
    return [value] if isinstance(value, Mapping) else as_list(value, where)
