"""COCO keypoints → people in pictures, before they are made into sequences.

A draft's boxes may be missing; names are still the source's.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import UNSET, Struct

from cmpose.convert.report import ConvertReport
from cmpose.data.formats.boxes import IN_SHARES
from cmpose.data.formats.coco import box_of, check_image_size, file_name_of, numbers
from cmpose.data.formats.documents import (
    Annotation,
    AnnotationSubject,
    Category,
    PoseDocument,
    VideoImage,
)
from cmpose.data.formats.messages import comma_list, short
from cmpose.data.formats.reader import Pixels, Whole, convert, read
from cmpose.data.formats.skeleton import skeleton_of_category
from cmpose.data.sequence import AnnotationError, Person
from cmpose.data.skeleton import POSETRACK, Skeleton

NO_BOX = np.zeros(4)


@dataclass(eq=False)
class Draft:
    """A picture of the source and the people in it.

    Attributes:
        file_name: below the folder of images, as the source has it; of a CSV with frame numbers
            the folder, and the file is found by ``number``.
        where: where the source has it, for messages.
        image_id: the source's, or -1.
        number: frame number where the source gives one apart from the name.
        video: what the source calls the video, or empty.
        width: as the source says, or None.
        height: likewise.
        people: keypoints [K, 3]; a box of zeros where there is none.
        regions: polygons to ignore.
        labeled: whether people were annotated, where the source says.
        boxes_are_made: the people's boxes are those of their keypoints, for the source has none.
        named_number: the frame number in the picture's name, once the picture has been found.
        turn: orientation and (width, height) of the stored pixels that boxes of other files are
            given for, where these are not the upright picture's.
    """

    file_name: str
    where: str
    image_id: int = -1
    number: int | None = None
    video: str = ""
    width: int | None = None
    height: int | None = None
    people: list[Person] = field(default_factory=list)
    regions: list[np.ndarray] = field(default_factory=list)
    labeled: bool | None = None
    boxes_are_made: bool = False
    named_number: int | None = None
    turn: tuple[int, tuple[int, int]] | None = None


def check_pixels(drafts: Items[Draft], source: Path) -> None:
    """Raises AnnotationError if the keypoints are certainly not in pixels: all within 0 and 1."""
    people = [person for draft in drafts for person in draft.people]
    visible = [p.keypoints[p.keypoints[:, 2] > 0, :2] for p in people]
    points = np.concatenate([np.zeros((0, 2)), *visible])
    if len(points) > 1 and (np.abs(points) <= 1.5).all() and points.any():
        raise AnnotationError(
            f"{source}: keypoints are shares of the picture, e.g. {points[0].tolist()}, {IN_SHARES}"
        )


# COCO -------------------------------------------------------------------------------------------


def read_coco_drafts(
    path: Path, report: ConvertReport, category_name: str = "", skeleton: Skeleton | None = None
) -> tuple[list[Draft], Skeleton]:
    """A COCO keypoints file.

    Args:
        path: the JSON file.
        report: gets what is left out.
        category_name: which category with keypoints, if there are several.
        skeleton: in place of the category's flips and limbs; the same names in the same order.

    Raises:
        AnnotationError: naming file, field and value.
    """
    document = read(path, PoseDocument[VideoImage, Any, Any], AnnotationError)
    if document.images is UNSET or document.annotations is UNSET:
        key = "images" if document.images is UNSET else "annotations"
        raise AnnotationError(f"{path}: missing key {key!r}; is it a file of COCO keypoints?")
    category_id, own = _coco_category(document.categories or [], path, category_name)
    if skeleton is not None and skeleton.keypoints != own.keypoints:
        raise AnnotationError(
            f"{path}: categories[*].keypoints are {comma_list(own.keypoints)}, those of --skeleton "
            f"{comma_list(skeleton.keypoints)}; give the same names in the same order"
        )
    own = skeleton or own
    videos = {video.id: video.name or video.file_name or "" for video in document.videos or []}
    drafts: dict[int | str, Draft] = {}
    for number, image in enumerate(document.images):
        where = f"{path}: images[{number}]"
        draft = _coco_image(image, where, videos)
        if draft.image_id in drafts:
            raise AnnotationError(
                f"{where}.id: {draft.image_id} occurs twice: {draft.file_name} and "
                f"{drafts[draft.image_id].file_name}; give every image an id of its own"
            )
        drafts[draft.image_id] = draft
    number_of: dict[int | str, int] = {}
    for number, entry in enumerate(document.annotations):
        _add_coco_person(entry, number, drafts, number_of, own, category_id, report, path)
    return list(drafts.values()), own


def _add_coco_person(
    entry: Any,
    number: int,
    drafts: Mapping[int | str, Draft],
    number_of: dict[int | str, int],
    skeleton: Skeleton,
    category_id: int | str,
    report: ConvertReport,
    path: Path,
) -> None:
    """Adds an annotation to its picture, or reports why it is left out."""
    at = f"annotations[{number}]"
    where = f"{path}: {at}"
    subject = convert(entry, AnnotationSubject, str(path), AnnotationError, at)
    if subject.image_id not in drafts:
        report.error(
            "annotation of an unknown image",
            f"{where}.image_id: {short(subject.image_id)} is not among the file's images",
        )
        return
    draft = drafts[subject.image_id]
    own_id = entry.get("id")
    if isinstance(own_id, (int, str)):
        if own_id in number_of:
            raise AnnotationError(
                f"{where}.id: {short(own_id)} is also the id of annotations[{number_of[own_id]}]; "
                "give every annotation an id of its own"
            )
        number_of[own_id] = number
    if subject.category_id != category_id and "category_id" in entry:
        report.leave_out("annotation of another category", where)
        return
    try:
        annotation = convert(entry, Annotation, str(path), AnnotationError, at)
        if subject.iscrowd:
            draft.regions += _crowd_regions(annotation, str(path), at)
        else:
            draft.people.append(_coco_person(annotation, skeleton, str(path), at))
    except AnnotationError as error:
        if subject.iscrowd:
            raise
        report.error("broken annotation", str(error))


def _coco_category(
    categories: Items[Category], path: Path, name: str
) -> tuple[int | str, Skeleton]:
    usable = [(i, entry) for i, entry in enumerate(categories) if entry.keypoints]
    chosen = [(i, entry) for i, entry in usable if not name or entry.name == name]
    if len(chosen) != 1:
        names = ", ".join(repr(entry.name) for _, entry in usable) or "none"
        raise AnnotationError(
            f"{path}: categories: {len(chosen)} with keypoints"
            + (f" are called {name!r}" if name else "")
            + f" (with keypoints: {names}); name one with --category, or export keypoints"
        )
    [(i, entry)] = chosen
    if entry.id is None:
        raise AnnotationError(f"{path}: categories[{i}].id: expected an integer, got None")
    return entry.id, skeleton_of_category(entry, str(path), f"categories[{i}]")


def _coco_image(image: VideoImage, where: str, videos: Mapping[int | str, str]) -> Draft:
    if not isinstance(image.id, int):
        raise AnnotationError(f"{where}.id: expected an integer, got {short(image.id)}")
    check_image_size(image, where)
    video = image.vid_id if image.video_id is None else image.video_id
    number = image.frame_index if image.frame_id is None else image.frame_id
    if video is not None and isinstance(number, str):
        raise AnnotationError(f"{where}.frame_id: expected an integer, got {short(number)}")
    return Draft(
        file_name=file_name_of(image, where),
        where=where,
        image_id=image.id,
        number=number if video is not None and isinstance(number, int) else None,
        video="" if video is None else videos.get(video) or f"video_{video}",
        width=image.width,
        height=image.height,
    )


def _coco_person(annotation: Annotation, skeleton: Skeleton, source: str, at: str) -> Person:
    where, count = f"{source}: {at}", len(skeleton)
    keypoints = np.zeros((count, 3))
    if annotation.keypoints:
        keypoints = numbers(annotation.keypoints, 3 * count, f"{where}.keypoints").reshape(-1, 3)
        for j, v in enumerate(keypoints[:, 2]):
            if v not in (0, 1, 2):
                raise AnnotationError(
                    f"{where}.keypoints: visibility {v:g} of {skeleton.keypoints[j]}; it must be 0 "
                    "(not annotated), 1 (hidden) or 2 (visible)"
                )
    keypoints = np.where(keypoints[:, 2:] > 0, np.minimum(keypoints, [np.inf, np.inf, 1]), 0.0)
    track = annotation.track_id
    if track is None and isinstance(annotation.attributes, Mapping):  # where CVAT writes it
        at = f"{at}.attributes"
        track = convert(annotation.attributes, _Attributes, source, AnnotationError, at).track_id
    head = annotation.bbox_head
    return Person(
        box=NO_BOX if annotation.bbox is None else box_of(annotation.bbox, f"{where}.bbox"),
        keypoints=keypoints,
        head_box=box_of(head, f"{where}.bbox_head") if head else None,
        track_id=-1 if track is None else track,
    )


class _Attributes(Struct):
    track_id: Whole | None = None


def _crowd_regions(annotation: Annotation, source: str, at: str) -> list[np.ndarray]:
    """A crowd's polygons; its box where it is a run-length mask or has none."""
    where, shape = f"{source}: {at}", annotation.segmentation
    if isinstance(shape, list) and shape:
        parts = convert(shape, list[list[Pixels]], source, AnnotationError, f"{at}.segmentation")
        for position, part in enumerate(parts):
            if len(part) < 6 or len(part) % 2:
                raise AnnotationError(
                    f"{where}.segmentation[{position}]: {len(part)} numbers are no polygon of at "
                    "least 3 corners (x, y, ...)"
                )
        return [np.array(part, np.float64).reshape(-1, 2) for part in parts]
    if annotation.bbox is None:
        raise AnnotationError(f"{where}: missing key 'bbox' of a crowd without 'segmentation'")
    x, y, w, h = box_of(annotation.bbox, f"{where}.bbox")
    return [np.array([[x, y], [x + w, y], [x + w, y + h], [x, y + h]])]


# To PoseTrack -----------------------------------------------------------------------------------

_ALIASES = {"neck": "head_bottom"}
_JOINTS = POSETRACK.keypoints


def to_posetrack(drafts: list[Draft], skeleton: Skeleton, report: ConvertReport) -> None:
    """Re-orders keypoints into PoseTrack's 15 by name; the ones it lacks stay unannotated.

    ``neck`` is PoseTrack's ``head_bottom``. Nothing is made up: COCO has neither neck nor crown, so
    ``head_bottom`` and ``head_top`` of its people are not annotated.

    Raises:
        AnnotationError: when no name is PoseTrack's.
    """
    names = [_ALIASES.get(name, name) for name in skeleton.keypoints]
    columns = {_JOINTS.index(n): j for j, n in enumerate(names) if n in _JOINTS}
    if not columns:
        raise AnnotationError(
            f"{drafts[0].where}: --to posetrack, but none of the keypoints "
            f"{', '.join(skeleton.keypoints)} is PoseTrack's: {', '.join(_JOINTS)}"
        )
    for name, own in zip(names, skeleton.keypoints, strict=True):
        if name not in _JOINTS:
            report.leave_out("keypoint that PoseTrack does not have", own)
    for joint in _JOINTS:
        if joint not in names:
            report.warn("PoseTrack joint that the source does not have, not annotated", joint)
    for draft in drafts:
        for person in draft.people:
            pose = np.zeros((len(POSETRACK), 3))
            pose[list(columns)] = person.keypoints[list(columns.values())]
            person.keypoints = pose
