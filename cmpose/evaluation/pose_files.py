"""Poses of one sequence as the evaluator sees them, from PoseTrack17, 18 and 21 JSON.

Ground truth and predictions have the same formats. PoseTrack17 is an ``annolist`` with one entry
a frame; PoseTrack18 and 21 have ``images``, ``annotations`` and ``categories``. Everything ends
up in the official 15-joint order, or in that of the ground truth's own skeleton. The structs of
``cmpose.data.formats`` check types and fields; what is checked here is what else would give a wrong
number without a word: lengths, and ids that lead nowhere.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from msgspec import UNSET

from cmpose.data.formats import coco
from cmpose.data.formats.documents import (
    Annotation,
    Category,
    LabeledFrame,
    PoseDocument,
    PoseFile,
    Rect,
)
from cmpose.data.formats.messages import comma_list, short
from cmpose.data.formats.posetrack17 import corners_of_head, joints_of, many, regions_of, single
from cmpose.data.formats.reader import convert, no_collection
from cmpose.data.formats.skeleton import skeleton_of_category
from cmpose.data.sequence import AnnotationError
from cmpose.data.skeleton import NUM_JOINTS, POSETRACK, SLOTS17, Skeleton

MISSING_SCORE = -9999.0
"""Score of a predicted joint that has none (the official tool's fallback)."""

_NOT_A_FILE_OF_POSES = (
    "{source} is not a PoseTrack file: expected an object with 'annolist' (PoseTrack17) or with "
    "'images' and 'annotations' (PoseTrack18 and 21), got {got}"
)


@dataclass
class FramePoses:
    """The people of one frame.

    Attributes:
        name: picture's file name, empty when the file gives none.
        image_id: PoseTrack18's image id, a number or a text; ``None`` in PoseTrack17 files.
        xy: float64 [P, K, 2] pixels, NaN where a joint is absent.
        scores: float64 [P, K].
        head_size: float64 [P], 0.6 × the diagonal of the head box in pixels; NaN without a box.
        box_size: float64 [P], the longer side of the person's box in pixels; NaN without a box.
        annotated: people listed in the file, those without any joint included.
        ignore_regions: polygons, float64 [n, 2] each, n ≥ 3.
        source_name: the picture's name before ``cmpose convert`` numbered it anew, or empty.
        nframes: frames of the video, where the file says.
        not_people: annotations of the file's other categories, which are left out.
    """

    name: str
    image_id: int | str | None
    xy: np.ndarray
    scores: np.ndarray
    head_size: np.ndarray
    box_size: np.ndarray
    annotated: int
    ignore_regions: list[np.ndarray] = field(default_factory=list)
    source_name: str = ""
    nframes: int | None = None
    not_people: int = 0


def pose_document(data: Any, source: str) -> PoseFile:
    """A sequence's parsed JSON object with its types checked; a document is returned as it is.

    Raises:
        AnnotationError: the object is of neither format, or a field is of another type.
    """
    if isinstance(data, PoseDocument):
        return data
    if not isinstance(data, Mapping):
        contents = "a list" if isinstance(data, list) else short(data)
        raise AnnotationError(_NOT_A_FILE_OF_POSES.format(source=source, got=contents))
    if "annolist" not in data and not {"images", "annotations"} <= data.keys():
        keys = comma_list(map(short, data)) or "none"
        raise AnnotationError(_NOT_A_FILE_OF_POSES.format(source=source, got=f"the keys {keys}"))
    return convert(data, PoseFile, source, AnnotationError)


def skeleton_of_file(data: Any, source: str) -> Skeleton:
    """The skeleton of a sequence's JSON object: PoseTrack's unless its category has flip_pairs.

    Raises:
        AnnotationError: the category is broken.
    """
    category = _category(pose_document(data, source))
    if category.flip_pairs is UNSET:
        return POSETRACK
    return skeleton_of_category(category, source, "categories[0]")


def _category(document: PoseDocument[Any, Any, Any]) -> Category:
    return coco.person_category(document.categories or [])


@no_collection()
def parse_poses(
    data: Any, source: str, *, unique_tracks: bool = False, skeleton: Skeleton = POSETRACK
) -> list[FramePoses]:
    """Reads one sequence's JSON object.

    Args:
        data: the parsed JSON, or a document from :func:`pose_document`.
        source: what to call it in messages, normally the file's path.
        unique_tracks: a track_id that occurs twice in a frame is an error, unless all people of
            the file have the same. The official tool asks it of predictions.
        skeleton: whose K keypoints to read, by name.

    Raises:
        AnnotationError: the object is of neither format, or a field is missing, of the wrong
            length, not a number, or leads to an image that is not listed.
    """
    document = pose_document(data, source)
    if document.annolist is UNSET:
        return _parse_coco(document, source, unique_tracks, skeleton)
    if skeleton != POSETRACK:
        raise AnnotationError(
            f"{source}: a PoseTrack17 annolist knows PoseTrack's joints alone, not the "
            f"{len(skeleton)} keypoints of the ground truth; write PoseTrack18's layout"
        )
    return _parse_annolist(document.annolist, source, unique_tracks)


def head_size_of(width: float, height: float) -> float:
    """What distances are measured in: 0.6 × the diagonal of a head box, pixels."""
    return 0.6 * float(np.hypot(width, height))


def _box_size(box: Sequence[float] | None) -> float:
    """The longer side of x, y, w, h; NaN for anything else, which PoseTrack's AP does not need."""
    return max(box[2:]) if box is not None and len(box) == 4 else math.nan


def _are_tracks(track_ids: Iterable[int | None]) -> bool:
    """Whether a file has tracks: where all people have one id, -1 or 0, it stands for none."""
    return len(set(track_ids)) > 1


def _check_track_ids(track_ids: Iterable[int | None], where: str) -> None:
    earlier: set[int] = set()
    for track_id in track_ids:
        if track_id is None or track_id < 0:
            continue
        if track_id in earlier:
            raise AnnotationError(
                f"{where}: track_id {track_id!r} occurs twice; give every person of a frame "
                "a track_id of its own"
            )
        earlier.add(track_id)


def _polygons(regions: Iterable[np.ndarray], where: str) -> list[np.ndarray]:
    """Ignore regions; an empty one covers nothing."""
    polygons = [region for region in regions if len(region)]
    for polygon in polygons:
        if len(polygon) < 3:
            raise AnnotationError(
                f"{where}: an ignore region has {len(polygon)} points; a polygon needs at least 3"
            )
    return polygons


class _Pose(NamedTuple):
    """A person: keypoints, scores, head size, box size, as in :class:`FramePoses`."""

    xy: np.ndarray
    scores: np.ndarray
    head_size: float
    box_size: float


def _stack(
    name: str,
    image_id: int | str | None,
    people: list[_Pose],
    regions: list[np.ndarray],
    num_keypoints: int = NUM_JOINTS,
) -> FramePoses:
    count = len(people)
    xy = np.full((count, num_keypoints, 2), np.nan)
    scores = np.full((count, num_keypoints), MISSING_SCORE)
    head_size, box_size = np.full((2, count), np.nan)
    for p, person in enumerate(people):
        xy[p], scores[p], head_size[p], box_size[p] = person
    return FramePoses(name, image_id, xy, scores, head_size, box_size, count, regions)


# PoseTrack18 and 21 ---------------------------------------------------------------------------


def _joint_columns(
    document: PoseDocument[Any, Any, Any], source: str, skeleton: Skeleton
) -> tuple[np.ndarray, int]:
    """Which of a file's keypoint slots holds each keypoint; and how many slots there are."""
    names: Sequence[str] = _category(document).keypoints or SLOTS17
    absent = [joint for joint in skeleton.keypoints if joint not in names]
    if absent:
        whose = "PoseTrack's 15 joint" if skeleton == POSETRACK else "the ground truth's keypoint"
        raise AnnotationError(
            f"{source}: categories[0].keypoints lacks {', '.join(absent)}; {whose} names are "
            "expected"
        )
    return np.array([list(names).index(joint) for joint in skeleton.keypoints]), len(names)


def _parse_coco(
    document: PoseFile,
    source: str,
    unique_tracks: bool,
    skeleton: Skeleton,
) -> list[FramePoses]:
    if document.images is UNSET or document.annotations is UNSET:
        raise AnnotationError(f"{source}: lacks 'images' or 'annotations'")
    columns, slots = _joint_columns(document, source, skeleton)
    others = {category.id for category in document.categories or []} - {_category(document).id}
    by_image: dict[int | str, list[tuple[int, Annotation]]] = {}  # with their index in the file
    not_people: Counter[int | str] = Counter()
    for i, image in enumerate(document.images):
        if image.id in by_image:
            raise AnnotationError(f"{source}: images[{i}].id {short(image.id)} occurs twice")
        by_image[image.id] = []
    for i, annotation in enumerate(document.annotations):
        if annotation.image_id not in by_image:
            raise AnnotationError(
                f"{source}: annotations[{i}].image_id {short(annotation.image_id)} is not the id "
                "of any entry of 'images'; write the ids of the images the poses belong to"
            )
        if annotation.category_id is not None and annotation.category_id in others:
            not_people[annotation.image_id] += 1
        else:
            by_image[annotation.image_id].append((i, annotation))

    frames = []
    tracks = unique_tracks and _are_tracks(a.track_id for a in document.annotations)
    for i, image in enumerate(document.images):
        where = f"{source}: images[{i}]"
        regions = _polygons(coco.regions_of(image, where), where)
        annotations = by_image[image.id]
        if tracks:
            _check_track_ids((a.track_id for _, a in annotations), where)
        people = [
            _coco_person(annotation, f"{source}: annotations[{k}]", columns, slots)
            for k, annotation in annotations
        ]
        frame = _stack(image.file_name, image.id, people, regions, len(skeleton))
        frame.source_name = image.source if isinstance(image.source, str) else ""
        frame.nframes, frame.not_people = image.nframes, not_people[image.id]
        frames.append(frame)
    return frames


def _coco_person(annotation: Annotation, where: str, columns: np.ndarray, slots: int) -> _Pose:
    xy = np.full((len(columns), 2), np.nan)
    scores = np.full(len(columns), MISSING_SCORE)
    if annotation.keypoints:
        if len(annotation.keypoints) != 3 * slots:
            raise AnnotationError(
                f"{where}.keypoints has {len(annotation.keypoints)} numbers, expected {3 * slots} "
                f"(x, y, v of {slots} joints)"
            )
        points = np.array(annotation.keypoints, np.float64).reshape(slots, 3)[columns]
        present = (points != 0).any(axis=1)  # (0, 0, 0) stands for a joint nobody annotated
        xy[present] = points[present, :2]
    if annotation.scores:
        if len(annotation.scores) != slots:
            raise AnnotationError(
                f"{where}.scores has {len(annotation.scores)} numbers, expected {slots}, one a "
                "keypoint slot"
            )
        scores = np.array(annotation.scores, np.float64)[columns]
    head_size = np.nan
    if annotation.bbox_head:
        if len(annotation.bbox_head) != 4:
            raise AnnotationError(
                f"{where}.bbox_head has {len(annotation.bbox_head)} numbers, expected x, y, w, h"
            )
        x, y, width, height = annotation.bbox_head
        # Through the corners, as the official tool does, so that not even rounding differs.
        head_size = head_size_of((x + width) - x, (y + height) - y)
    elif annotation.head_box:  # COCO-style PoseTrack17: two corners
        if len(annotation.head_box) != 4:
            raise AnnotationError(
                f"{where}.head_box has {len(annotation.head_box)} numbers, expected x1, y1, x2, y2"
            )
        x1, y1, x2, y2 = annotation.head_box
        head_size = head_size_of(x2 - x1, y2 - y1)
    return _Pose(xy, scores, head_size, _box_size(annotation.bbox))


# PoseTrack17 ----------------------------------------------------------------------------------


def _parse_annolist(
    annolist: Iterable[LabeledFrame[Rect]], source: str, unique_tracks: bool
) -> list[FramePoses]:
    frames = []
    tracks: dict[str, list[int | None]] = {}
    for i, entry in enumerate(annolist):
        where = f"{source}: annolist[{i}]"
        if entry.annorect is UNSET:
            raise AnnotationError(
                f"{where} has no 'annorect' (an empty list for a frame of nobody)"
            )
        rects: list[Rect] = many(entry.annorect)
        tracks[where] = [single(r.track_id, f"{where}.track_id") for r in rects if r.track_id != []]
        regions = regions_of(entry.ignore_regions, f"{where}.ignore_regions")
        people = [_annorect(rect, f"{where}.annorect[{k}]") for k, rect in enumerate(rects)]
        picture = single(entry.image, f"{where}.image") if entry.image else None
        name = single(picture.name, f"{where}.image.name") if picture and picture.name else ""
        frames.append(_stack(name, None, people, _polygons(regions, where)))
    if unique_tracks and _are_tracks(chain.from_iterable(tracks.values())):
        for where, track_ids in tracks.items():
            _check_track_ids(track_ids, where)
    return frames


def _annorect(rect: Rect, where: str) -> _Pose:
    xy = np.full((NUM_JOINTS, 2), np.nan)
    scores = np.full(NUM_JOINTS, MISSING_SCORE)
    for k, point in enumerate(many(joints_of(rect, where))):
        at = f"{where}.annopoints[0].point[{k}]"
        joint = single(point.id, f"{at}.id")
        # Other ids are no joints of the evaluation; of a repeated id the first counts.
        if not 0 <= joint < NUM_JOINTS or not np.isnan(xy[joint, 0]):
            continue
        xy[joint] = single(point.x, f"{at}.x"), single(point.y, f"{at}.y")
        if point.score is not None:
            scores[joint] = single(point.score, f"{at}.score")
    corners = corners_of_head(rect, where, partial=True)
    if corners is None:
        return _Pose(xy, scores, np.nan, np.nan)
    x1, y1, x2, y2 = corners
    return _Pose(xy, scores, head_size_of(x2 - x1, y2 - y1), np.nan)
