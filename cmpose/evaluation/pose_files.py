"""Poses of one sequence as the evaluator sees them, from PoseTrack17, 18 and 21 JSON.

Ground truth and predictions have the same formats. PoseTrack17 is an ``annolist`` with one entry
a frame; PoseTrack18 and 21 have ``images``, ``annotations`` and ``categories``. Everything ends
up in the official 15-joint order, or in that of the ground truth's own skeleton. What is checked
is what would otherwise give a wrong number without a word: missing fields, lengths, non-finite
coordinates, ids that lead nowhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np

from cmpose.data.skeleton import (
    NUM_JOINTS,
    POSETRACK,
    SLOTS17,
    Skeleton,
    skeleton_of_category,
)

MISSING_SCORE = -9999.0
"""Score of a predicted joint that has none (the official tool's fallback)."""

Match = Literal["name", "order"]

_NOT_A_FILE_OF_POSES = (
    "{source} is not a PoseTrack file: expected an object with 'annolist' (PoseTrack17) or with "
    "'images' and 'annotations' (PoseTrack18 and 21), got {got}"
)


@dataclass
class FramePoses:
    """The people of one frame.

    Attributes:
        name: picture's file name, empty when the file gives none.
        image_id: PoseTrack18's image id, ``None`` in PoseTrack17 files.
        xy: float64 [P, K, 2] pixels, NaN where a joint is absent.
        scores: float64 [P, K].
        head_size: float64 [P], 0.6 × the diagonal of the head box in pixels; NaN without a box.
        box_size: float64 [P], the longer side of the person's box in pixels; NaN without a box.
        annotated: people listed in the file, those without any joint included.
        ignore_regions: polygons, float64 [n, 2] each, n ≥ 3.
    """

    name: str
    image_id: int | None
    xy: np.ndarray
    scores: np.ndarray
    head_size: np.ndarray
    box_size: np.ndarray
    annotated: int
    ignore_regions: list[np.ndarray] = field(default_factory=list)


def skeleton_of_file(data: Any, source: str) -> Skeleton:
    """The skeleton of a sequence's JSON object: PoseTrack's unless its category has flip_pairs.

    Raises:
        ValueError: the category is broken.
    """
    category = _category(data)
    if "flip_pairs" not in category:
        return POSETRACK
    return skeleton_of_category(category, f"{source}: categories[0]")


def _category(data: Any) -> Mapping[str, Any]:
    categories = data.get("categories") if isinstance(data, Mapping) else None
    first = categories[0] if categories else None
    return first if isinstance(first, Mapping) else {}


def parse_poses(
    data: Any, source: str, *, unique_tracks: bool = False, skeleton: Skeleton = POSETRACK
) -> list[FramePoses]:
    """Reads one sequence's JSON object.

    Args:
        data: the parsed JSON.
        source: what to call it in messages, normally the file's path.
        unique_tracks: a track_id that occurs twice in a frame is an error. The official tool
            asks it of predictions.
        skeleton: whose K keypoints to read, by name.

    Raises:
        ValueError: the object is of neither format, or a field is missing, of the wrong length,
            not a number, or leads to an image that is not listed.
    """
    if isinstance(data, Mapping):
        if "annolist" in data:
            if skeleton != POSETRACK:
                raise ValueError(
                    f"{source}: a PoseTrack17 annolist knows PoseTrack's joints alone, not the "
                    f"{len(skeleton)} keypoints of the ground truth; write PoseTrack18's layout"
                )
            return _parse_annolist(data["annolist"], source, unique_tracks)
        if "images" in data and "annotations" in data:
            for key in ("images", "annotations"):
                if not isinstance(data[key], list):
                    raise ValueError(f"{source}: {key} must be a list, got {data[key]!r:.60}")
            return _parse_coco(data, source, unique_tracks, skeleton)
        keys = ", ".join(map(repr, list(data)[:6])) or "no keys"
        raise ValueError(_NOT_A_FILE_OF_POSES.format(source=source, got=f"the keys {keys}"))
    raise ValueError(_NOT_A_FILE_OF_POSES.format(source=source, got=f"a {type(data).__name__}"))


def match_frames(
    truth: list[FramePoses],
    predicted: list[FramePoses],
    match: Match,
    truth_source: str,
    predicted_source: str,
) -> list[tuple[FramePoses, FramePoses]]:
    """Pairs of ground truth and prediction, in the ground truth's order.

    Args:
        truth: frames of the ground truth.
        predicted: frames of the prediction.
        match: ``name`` goes by image id, or by file name where the ids differ; ``order`` pairs
            the i-th with the i-th, as the official tool does.
        truth_source: the ground truth's name in messages.
        predicted_source: the prediction's.

    Raises:
        ValueError: the number of frames differs, or by ``name`` some frame has no counterpart.
    """
    if match not in ("name", "order"):
        raise ValueError(f"match must be 'name' or 'order', got {match!r}")
    if len(truth) != len(predicted):
        raise ValueError(
            f"{predicted_source} has {len(predicted)} frames, the ground truth {truth_source} "
            f"{len(truth)}; list every frame of the sequence, those of nobody too"
        )
    if match == "order" or not truth:
        return list(zip(truth, predicted, strict=True))

    # Two components tell the frames of a merged file apart; one survives a moved folder.
    components = 1 if len(set(_frame_keys(truth, 1))) == len(truth) else 2
    truth_names, names = _frame_keys(truth, components), _frame_keys(predicted, components)
    named = all(truth_names) and all(names)
    ids = [frame.image_id for frame in truth]
    by_id = {frame.image_id: k for k, frame in enumerate(predicted)}
    if None not in ids and set(ids) == set(by_id):
        order = [by_id[image_id] for image_id in ids]
        if named:
            for image_id, truth_name, k in zip(ids, truth_names, order, strict=True):
                if truth_name != names[k]:
                    raise ValueError(
                        f"{predicted_source}: image id {image_id} is {names[k]}, in the ground "
                        f"truth {truth_source} it is {truth_name}; write the ground truth's ids "
                        "and file names, or match frames by order"
                    )
        return [(frame, predicted[k]) for frame, k in zip(truth, order, strict=True)]

    by_name = {name: k for k, name in enumerate(names)}
    if named and set(truth_names) == set(by_name) and len(by_name) == len(names):
        return [(f, predicted[by_name[n]]) for f, n in zip(truth, truth_names, strict=True)]
    unknown = next((n for n in truth_names if n not in by_name), truth_names[0])
    raise ValueError(
        f"{predicted_source}: frames match the ground truth {truth_source} neither by image id "
        f"nor by file name (for example {unknown or truth[0].image_id} is not among them); write "
        "the ground truth's ids and file names, or match frames by order"
    )


def _frame_keys(frames: Sequence[FramePoses], components: int) -> list[str]:
    """The last ``components`` parts of every frame's file name."""
    return ["/".join(PurePosixPath(frame.name).parts[-components:]) for frame in frames]


def _numbers(value: Any, where: str, what: str) -> np.ndarray:
    try:
        array = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {what} must be numbers, got {value!r:.80}") from error
    if not np.isfinite(array).all():
        raise ValueError(
            f"{where}: {what} has a value that is not finite; leave the joint out "
            "(PoseTrack18: 0, 0, 0) instead of writing NaN"
        )
    return array


def _scalar(value: Any, where: str, what: str) -> float:
    """PoseTrack17 wraps every number in a list of one."""
    array = _numbers(value, where, what).reshape(-1)
    if array.size != 1:
        raise ValueError(f"{where}: {what} must be one number, got {value!r:.80}")
    return float(array[0])


def head_size_of(width: float, height: float) -> float:
    """What distances are measured in: 0.6 × the diagonal of a head box, pixels."""
    return 0.6 * float(np.hypot(width, height))


def _box_size(box: Any) -> float:
    """The longer side of x, y, w, h; NaN for anything else, which PoseTrack's AP does not need."""
    try:
        x, y, width, height = np.asarray(box, np.float64)
    except (TypeError, ValueError):
        return float("nan")
    return float(max(width, height)) if np.isfinite([x, y, width, height]).all() else float("nan")


def _check_track_ids(track_ids: Iterable[Any], where: str) -> None:
    seen: set[Any] = set()
    for track_id in track_ids:
        if track_id is None:
            continue
        if track_id in seen:
            raise ValueError(
                f"{where}: track_id {track_id!r} occurs twice; give every person of a frame "
                "a track_id of its own"
            )
        seen.add(track_id)


def _polygon(xs: Any, ys: Any, where: str) -> np.ndarray | None:
    """One ignore region; an empty one covers nothing."""
    x = _numbers(xs, where, "ignore region's x").reshape(-1)
    y = _numbers(ys, where, "ignore region's y").reshape(-1)
    if x.size != y.size:
        raise ValueError(f"{where}: an ignore region has {x.size} x and {y.size} y coordinates")
    if x.size == 0:
        return None
    if x.size < 3:
        raise ValueError(
            f"{where}: an ignore region has {x.size} points; a polygon needs at least 3"
        )
    return np.stack([x, y], axis=1)


class _Pose(NamedTuple):
    """A person: keypoints, scores, head size, box size, as in :class:`FramePoses`."""

    xy: np.ndarray
    scores: np.ndarray
    head_size: float
    box_size: float


def _stack(
    name: str,
    image_id: int | None,
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
    data: Mapping[str, Any], source: str, skeleton: Skeleton
) -> tuple[np.ndarray, int]:
    """Which of a file's keypoint slots holds each keypoint; and how many slots there are."""
    names: Sequence[str] = _category(data).get("keypoints") or SLOTS17
    absent = [joint for joint in skeleton.keypoints if joint not in names]
    if absent:
        whose = "PoseTrack's 15 joint" if skeleton == POSETRACK else "the ground truth's keypoint"
        raise ValueError(
            f"{source}: categories[0].keypoints lacks {', '.join(absent)}; {whose} names are "
            "expected"
        )
    return np.array([list(names).index(joint) for joint in skeleton.keypoints]), len(names)


def _parse_coco(
    data: Mapping[str, Any], source: str, unique_tracks: bool, skeleton: Skeleton
) -> list[FramePoses]:
    columns, slots = _joint_columns(data, source, skeleton)
    by_image: dict[Any, list[tuple[int, Mapping[str, Any]]]] = {}  # with their place in the file
    for i, image in enumerate(data["images"]):
        if not isinstance(image, Mapping) or "id" not in image:
            raise ValueError(f"{source}: images[{i}] has no 'id'")
        if image["id"] in by_image:
            raise ValueError(f"{source}: images[{i}].id {image['id']!r} occurs twice")
        by_image[image["id"]] = []
    for i, annotation in enumerate(data["annotations"]):
        where = f"{source}: annotations[{i}]"
        if not isinstance(annotation, Mapping) or "image_id" not in annotation:
            raise ValueError(f"{where} has no 'image_id'")
        if annotation["image_id"] not in by_image:
            raise ValueError(
                f"{where}.image_id {annotation['image_id']!r} is not the id of any entry of "
                "'images'; write the ids of the images the poses belong to"
            )
        by_image[annotation["image_id"]].append((i, annotation))

    frames = []
    for i, image in enumerate(data["images"]):
        where = f"{source}: images[{i}]"
        xs, ys = image.get("ignore_regions_x") or [], image.get("ignore_regions_y") or []
        if len(xs) != len(ys):
            raise ValueError(
                f"{where}: ignore_regions_x has {len(xs)} regions, ignore_regions_y {len(ys)}"
            )
        polygons = [_polygon(x, y, where) for x, y in zip(xs, ys, strict=True)]
        annotations = by_image[image["id"]]
        if unique_tracks:
            _check_track_ids((a.get("track_id") for _, a in annotations), where)
        people = [
            _coco_person(annotation, f"{source}: annotations[{k}]", columns, slots)
            for k, annotation in annotations
        ]
        regions = [polygon for polygon in polygons if polygon is not None]
        name = str(image.get("file_name", ""))
        frames.append(_stack(name, image["id"], people, regions, len(skeleton)))
    return frames


def _coco_person(
    annotation: Mapping[str, Any], where: str, columns: np.ndarray, slots: int
) -> _Pose:
    xy = np.full((len(columns), 2), np.nan)
    scores = np.full(len(columns), MISSING_SCORE)
    if annotation.get("keypoints"):
        values = _numbers(annotation["keypoints"], where, "keypoints").reshape(-1)
        if values.size != 3 * slots:
            raise ValueError(
                f"{where}.keypoints has {values.size} numbers, expected {3 * slots} "
                f"(x, y, v of {slots} joints)"
            )
        points = values.reshape(slots, 3)[columns]
        present = (points != 0).any(axis=1)  # (0, 0, 0) stands for a joint nobody annotated
        xy[present] = points[present, :2]
    if annotation.get("scores"):
        given = _numbers(annotation["scores"], where, "scores").reshape(-1)
        if given.size != slots:
            raise ValueError(
                f"{where}.scores has {given.size} numbers, expected {slots}, one a keypoint slot"
            )
        scores = given[columns]
    head_size = np.nan
    if annotation.get("bbox_head"):
        box = _numbers(annotation["bbox_head"], where, "bbox_head").reshape(-1)
        if box.size != 4:
            raise ValueError(f"{where}.bbox_head has {box.size} numbers, expected x, y, w, h")
        # Through the corners, as the official tool does, so that not even rounding differs.
        head_size = head_size_of((box[0] + box[2]) - box[0], (box[1] + box[3]) - box[1])
    elif annotation.get("head_box"):  # COCO-style PoseTrack17: two corners
        box = _numbers(annotation["head_box"], where, "head_box").reshape(-1)
        if box.size != 4:
            raise ValueError(f"{where}.head_box has {box.size} numbers, expected x1, y1, x2, y2")
        head_size = head_size_of(box[2] - box[0], box[3] - box[1])
    return _Pose(xy, scores, head_size, _box_size(annotation.get("bbox")))


# PoseTrack17 ----------------------------------------------------------------------------------


def _parse_annolist(annolist: Any, source: str, unique_tracks: bool) -> list[FramePoses]:
    if not isinstance(annolist, list):
        raise ValueError(f"{source}: annolist must be a list with one entry a frame")
    frames = []
    for i, entry in enumerate(annolist):
        where = f"{source}: annolist[{i}]"
        if not isinstance(entry, Mapping) or "annorect" not in entry:
            raise ValueError(f"{where} has no 'annorect' (an empty list for a frame of nobody)")
        rects = entry["annorect"] or []
        if unique_tracks:
            _check_track_ids(
                (int(_scalar(r["track_id"], where, "track_id")) for r in rects if "track_id" in r),
                where,
            )
        polygons = []
        for region in entry.get("ignore_regions") or []:
            points = region.get("point") or []
            xs = [_scalar(p.get("x"), where, "ignore region's x") for p in points]
            ys = [_scalar(p.get("y"), where, "ignore region's y") for p in points]
            polygons.append(_polygon(xs, ys, where))
        people = [_annorect(rect, f"{where}.annorect[{k}]") for k, rect in enumerate(rects)]
        regions = [polygon for polygon in polygons if polygon is not None]
        frames.append(_stack(_annolist_name(entry), None, people, regions))
    return frames


def _annolist_name(entry: Mapping[str, Any]) -> str:
    image = entry.get("image")
    image = image[0] if isinstance(image, list) and image else image
    name = image.get("name", "") if isinstance(image, Mapping) else ""
    return str(name[0] if isinstance(name, list) and name else name)


def _annorect(rect: Mapping[str, Any], where: str) -> _Pose:
    xy = np.full((NUM_JOINTS, 2), np.nan)
    scores = np.full(NUM_JOINTS, MISSING_SCORE)
    annopoints = rect.get("annopoints") or []
    points = (annopoints[0].get("point") or []) if annopoints else []
    for k, point in enumerate(points):
        at = f"{where}.annopoints[0].point[{k}]"
        absent = [key for key in ("id", "x", "y") if key not in point]
        if absent:
            raise ValueError(f"{at} has no {absent[0]!r}")
        joint = int(_scalar(point["id"], at, "id"))
        # Other ids are no joints of the evaluation; of a repeated id the first counts.
        if not 0 <= joint < NUM_JOINTS or not np.isnan(xy[joint, 0]):
            continue
        xy[joint] = _scalar(point["x"], at, "x"), _scalar(point["y"], at, "y")
        if "score" in point:
            scores[joint] = _scalar(point["score"], at, "score")
    head_size = np.nan
    if all(key in rect for key in ("x1", "y1", "x2", "y2")):
        x1, y1, x2, y2 = (_scalar(rect[key], where, key) for key in ("x1", "y1", "x2", "y2"))
        head_size = head_size_of(x2 - x1, y2 - y1)
    return _Pose(xy, scores, head_size, np.nan)
