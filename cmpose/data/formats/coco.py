"""COCO-style PoseTrack JSON: PoseTrack18, PoseTrack21, DetectAndTrack's PoseTrack17.

One file holds one sequence, or many merged (mmpose, DetectAndTrack), which are told apart by the
folder of their frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from msgspec import UNSET

from cmpose.data.formats.boxes import NOT_A_PERSON
from cmpose.data.formats.documents import (
    IMAGE_FIELDS,
    Annotation,
    AnnotationSubject,
    Category,
    Image,
    PoseDocument,
)
from cmpose.data.formats.messages import short
from cmpose.data.formats.reader import convert
from cmpose.data.formats.skeleton import skeleton_of_category
from cmpose.data.sequence import (
    AnnotationError,
    Frame,
    Person,
    Sequence,
    box_of_keypoints,
    frame_number,
)
from cmpose.data.skeleton import JOINTS, POSETRACK, SLOT_OF_JOINT, SLOTS17, Skeleton


def read_coco(
    document: PoseDocument[Image, Any, Any],
    source: str,
    stem: str,
    extras: Items[Mapping[str, Any]],
    *,
    skip: bool,
) -> list[Sequence]:
    """A COCO-style document → its sequences, in order of their first frame.

    Args:
        document: the file, with ``images`` and ``annotations``; its people may be unchecked.
        source: the file's name, for messages.
        stem: the file's name without ``.json``; the sequence's ``file_stem`` if it is the only one.
        extras: the images as they were parsed, for what ``Image`` does not name.
        skip: leaves a broken annotation out and counts it instead of raising.

    Raises:
        AnnotationError: naming file, field and value.
    """
    if document.images is UNSET or document.annotations is UNSET:
        key = "images" if document.images is UNSET else "annotations"
        raise AnnotationError(f"{source}: missing key {key!r}")
    layout = _layout(document.categories or [], document.images, source)
    groups: dict[str, Sequence] = {}
    frames: dict[int | str, _Listed] = {}
    for number, image in enumerate(document.images):
        where = f"{source}: images[{number}]"
        frame = _frame(image, extras[number], where)
        if frame.image_id in frames:
            raise AnnotationError(
                f"{where}.id: {frame.image_id} occurs twice: {frame.file_name} and "
                f"{frames[frame.image_id].frame.file_name}"
            )
        folder = str(PurePosixPath(frame.file_name).parent)
        group = folder if folder != "." else str(stem if image.vid_id is None else image.vid_id)
        name = PurePosixPath(group).name
        sequence = groups.setdefault(
            group, Sequence(name, "", frames=[], source=source, skeleton=layout.skeleton)
        )
        _set_nframes(sequence, image, where)
        sequence.frames.append(frame)
        frames[frame.image_id] = _Listed(sequence, frame, image.is_labeled is not None)
    for number, entry in enumerate(document.annotations):
        _add_person(entry, f"annotations[{number}]", frames, layout, source, skip=skip)
    sequences = list(groups.values())
    for sequence in sequences:
        sequence.file_stem = stem if len(sequences) == 1 else sequence.name
    return sequences


class _Listed(NamedTuple):
    """A frame that the file lists, its sequence, and whether the file says if it is labelled."""

    sequence: Sequence
    frame: Frame
    says_labeled: bool


def _add_person(
    entry: Any,
    at: str,
    frames: Mapping[int | str, _Listed],
    layout: _Layout,
    source: str,
    *,
    skip: bool,
) -> None:
    """Adds an annotation, checked or not, to its frame, or counts why it is left out."""
    subject = entry
    if not isinstance(entry, Annotation):
        subject = convert(entry, AnnotationSubject, source, AnnotationError, at)
    if subject.image_id not in frames:
        raise AnnotationError(
            f"{source}: {at}.image_id: {short(subject.image_id)} is not among the file's images"
        )
    sequence, frame, says_labeled = frames[subject.image_id]
    if subject.category_id not in layout.people:
        sequence.skipped[NOT_A_PERSON] += 1
        return
    if subject.iscrowd:
        sequence.skipped["crowd region (iscrowd)"] += 1
        return
    try:
        annotation = convert(entry, Annotation, source, AnnotationError, at)
        person = _person(annotation, layout, f"{source}: {at}")
    except AnnotationError:
        if not skip:
            raise
        sequence.skipped["broken annotation"] += 1
        return
    frame.people.append(person)
    if not says_labeled and person.num_visible:
        frame.labeled = True


def _frame(image: Image, extra: Mapping[str, Any], where: str) -> Frame:
    if not isinstance(image.id, int):
        raise AnnotationError(f"{where}.id: expected an integer, got {short(image.id)}")
    name = file_name_of(image, where)
    check_image_size(image, where)
    if image.is_labeled not in (None, 0, 1):
        raise AnnotationError(f"{where}.is_labeled: expected true or false, got {image.is_labeled}")
    return Frame(
        image_id=image.id,
        file_name=name,
        index=frame_number(name, f"{where}.file_name"),
        labeled=bool(image.is_labeled),
        ignore_regions=regions_of(image, where),
        width=image.width,
        height=image.height,
        extra={key: value for key, value in extra.items() if key not in IMAGE_FIELDS},
    )


def file_name_of(image: Image, where: str) -> str:
    """An image's path below the data set's folder, with forward slashes."""
    if not image.file_name:
        raise AnnotationError(
            f"{where}: missing key 'file_name', or an empty one; it names the frame's picture"
        )
    return image.file_name.replace("\\", "/")


def check_image_size(image: Image, where: str) -> None:
    """Raises AnnotationError for a width or height that no picture has."""
    for key, size in (("width", image.width), ("height", image.height)):
        if size is not None and size <= 0:
            raise AnnotationError(f"{where}.{key}: expected a positive size, got {size}")


def _set_nframes(sequence: Sequence, image: Image, where: str) -> None:
    if image.nframes is None:
        return
    if image.nframes < 1:
        raise AnnotationError(f"{where}.nframes: expected at least 1, got {image.nframes}")
    if sequence.nframes not in (None, image.nframes):
        raise AnnotationError(
            f"{where}.nframes: {image.nframes}, but the sequence's other frames say "
            f"{sequence.nframes}"
        )
    sequence.nframes = image.nframes


def _person(annotation: Annotation, layout: _Layout, where: str) -> Person:
    skeleton, slots, num_slots, _ = layout
    keypoints = np.zeros((len(skeleton), 3))
    if annotation.keypoints:
        values = numbers(annotation.keypoints, 3 * num_slots, f"{where}.keypoints")
        keypoints = values.reshape(-1, 3)[slots]
        if (keypoints[:, 2] < 0).any():
            joint = int(np.argmax(keypoints[:, 2] < 0))
            raise AnnotationError(
                f"{where}.keypoints: visibility {keypoints[joint, 2]:g} of "
                f"{skeleton.keypoints[joint]}; "
                "it must be 0 (not annotated), 1 or 2"
            )
        keypoints[:, 2] = keypoints[:, 2] > 0
    if annotation.bbox is not None:
        box = box_of(annotation.bbox, f"{where}.bbox")
    elif keypoints[:, 2].any():
        box = box_of_keypoints(keypoints, enlarge=1.3, margin=0.0)
    else:
        raise AnnotationError(f"{where}: has neither 'bbox' nor annotated 'keypoints'")
    return Person(
        box=box,
        keypoints=keypoints,
        head_box=_head_box(annotation, where),
        track_id=-1 if annotation.track_id is None else annotation.track_id,
        score=annotation.score,
        joint_scores=(
            numbers(annotation.scores, num_slots, f"{where}.scores")[slots]
            if annotation.scores
            else None
        ),
        person_id=annotation.person_id,
    )


def _head_box(annotation: Annotation, where: str) -> np.ndarray | None:
    """PoseTrack18's ``bbox_head`` (x, y, w, h) or DetectAndTrack's ``head_box`` (two corners)."""
    if annotation.bbox_head:
        return box_of(annotation.bbox_head, f"{where}.bbox_head")
    if annotation.head_box:
        x1, y1, x2, y2 = numbers(annotation.head_box, 4, f"{where}.head_box")
        return np.array([min(x1, x2), min(y1, y2), abs(x2 - x1), abs(y2 - y1)])
    return None


def numbers(values: list[float], length: int, where: str) -> np.ndarray:
    """``length`` numbers → float64 [length]. Raises AnnotationError for another length."""
    if len(values) != length:
        raise AnnotationError(f"{where}: expected {length} numbers, got {len(values)}")
    return np.array(values, dtype=np.float64)


def box_of(values: list[float], where: str) -> np.ndarray:
    """x, y, width, height with sizes ≥ 0 → float64 [4]. Raises AnnotationError for others."""
    box = numbers(values, 4, where)
    if box[2] < 0 or box[3] < 0:
        raise AnnotationError(
            f"{where}: negative size in [x, y, width, height] = {box.tolist()}; "
            "corners (x1, y1, x2, y2) must be converted to sizes"
        )
    return box


def regions_of(image: Image, where: str) -> list[np.ndarray]:
    """Ignore regions as polygons, float64 [n, 2] each. Raises AnnotationError for uneven ones."""
    xs, ys = image.ignore_regions_x or [], image.ignore_regions_y or []
    if len(xs) != len(ys):
        raise AnnotationError(
            f"{where}.ignore_regions_x: {len(xs)} polygons, but ignore_regions_y has {len(ys)}"
        )
    return [
        np.stack(
            [np.array(x, np.float64), numbers(y, len(x), f"{where}.ignore_regions_y[{position}]")],
            axis=1,
        )
        for position, (x, y) in enumerate(zip(xs, ys, strict=True))
    ]


class _Layout(NamedTuple):
    """A file's skeleton, the slot of each of its keypoints, the number of slots, people's ids."""

    skeleton: Skeleton
    slots: list[int]
    num_slots: int
    people: frozenset[int | str | None]


def person_category(categories: Items[Category]) -> Category:
    """The category of people: the one of that name, else the only one, else the one of id 1."""
    named = [category for category in categories if (category.name or "").lower() == "person"]
    if len(named) == 1 or len(categories) == 1:
        return (named or list(categories))[0]
    return next((category for category in categories if category.id == 1), Category())


def _layout(categories: Items[Category], images: Items[Image], source: str) -> _Layout:
    """PoseTrack's joints in the 17 slots, in another order that the person category names, or
    keypoints of the file's own where the category has ``flip_pairs``.

    COCO's names of the slots that PoseTrack re-uses (left_eye for head_bottom, right_eye for
    head_top) are understood in files that have PoseTrack's fields.
    """
    category = person_category(categories)
    people: frozenset[int | str | None] = frozenset({None, category.id})
    if all(other.id != 1 for other in categories):
        people |= {1}
    if category.flip_pairs is not UNSET:
        skeleton = skeleton_of_category(category, source, "categories[*]")
        return _Layout(skeleton, list(range(len(skeleton))), len(skeleton), people)
    names = list(category.keypoints or [])
    if not names:
        return _Layout(POSETRACK, list(SLOT_OF_JOINT), len(SLOTS17), people)
    if len(names) == len(SLOTS17) and tuple(names[1:3]) == ("left_eye", "right_eye"):
        marked = [
            image
            for image in images
            if (image.is_labeled, image.vid_id, image.frame_id, image.nframes) != (None,) * 4
        ]
        if images and not marked:
            raise AnnotationError(
                f"{source}: categories[*].keypoints: COCO's 17 keypoints, eyes among them, in a "
                "file without PoseTrack's fields (is_labeled, vid_id, ...); cmpose convert makes a "
                "data set of it"
            )
        names[1:3] = SLOTS17[1:3]
    missing = [joint for joint in JOINTS if joint not in names]
    if missing:
        raise AnnotationError(
            f"{source}: categories[*].keypoints: no {', '.join(missing)} among {short(names)}; "
            f"PoseTrack's slots are {', '.join(SLOTS17)}. For keypoints of your own use cmpose "
            "convert, or give the category flip_pairs"
        )
    slots = [names.index(joint) for joint in JOINTS]
    return _Layout(POSETRACK, slots, len(names), people)
