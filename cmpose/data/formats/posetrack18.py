"""COCO-style PoseTrack JSON: PoseTrack18, PoseTrack21, DetectAndTrack's PoseTrack17; the writer.

One file holds one sequence, or many merged (mmpose, DetectAndTrack), which are told apart by the
folder of their frames.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Items
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from cmpose.data.sequence import (
    AnnotationError,
    Frame,
    Person,
    Sequence,
    as_box,
    as_flag,
    as_floats,
    as_image_size,
    as_int,
    as_list,
    as_text,
    box_of_keypoints,
    frame_number,
    guarded,
    require,
    short,
)
from cmpose.data.skeleton import (
    CATEGORY,
    JOINTS,
    POSETRACK,
    SLOT_OF_JOINT,
    SLOTS17,
    Skeleton,
    skeleton_of_category,
    to_slots17,
)
from cmpose.files import whole_file

_IMAGE_FIELDS = {
    "id",
    "frame_id",
    "file_name",
    "vid_id",
    "nframes",
    "is_labeled",
    "width",
    "height",
    "ignore_regions_x",
    "ignore_regions_y",
}
_SOURCES = {"mpii": 1, "bonn": 2, "mpiinew": 3}


def read_coco(data: Mapping[str, Any], source: str, stem: str, *, skip: bool) -> list[Sequence]:
    """A COCO-style document → its sequences, in order of their first frame.

    Args:
        data: the parsed file, with ``images`` and ``annotations``.
        source: the file's name, for messages.
        stem: the file's name without ``.json``; the sequence's ``file_stem`` if it is the only one.
        skip: leaves a broken annotation out and counts it instead of raising.

    Raises:
        AnnotationError: naming file, field and value.
    """
    images = as_list(require(data, "images", source), f"{source}: images")
    annotations = as_list(require(data, "annotations", source), f"{source}: annotations")
    layout = _layout(data.get("categories"), images, source)

    groups: dict[str, Sequence] = {}
    frames: dict[int, tuple[Sequence, Frame]] = {}
    said: dict[int, bool] = {}  # image id → the file says whether the frame is labelled
    for number, entry in enumerate(images):
        where = f"{source}: images[{number}]"
        frame = _frame(entry, where)
        if frame.image_id in frames:
            raise AnnotationError(
                f"{where}.id: {frame.image_id} occurs twice: {frame.file_name} and "
                f"{frames[frame.image_id][1].file_name}"
            )
        folder = str(PurePosixPath(frame.file_name).parent)
        group = folder if folder != "." else f"{entry.get('vid_id', stem)}"
        sequence = groups.setdefault(
            group,
            Sequence(
                PurePosixPath(group).name, "", frames=[], source=source, skeleton=layout.skeleton
            ),
        )
        _set_nframes(sequence, entry, where)
        sequence.frames.append(frame)
        frames[frame.image_id] = sequence, frame
        said[frame.image_id] = entry.get("is_labeled") is not None

    for number, entry in enumerate(annotations):
        where = f"{source}: annotations[{number}]"
        image_id = as_int(require(entry, "image_id", where), f"{where}.image_id")
        if image_id not in frames:
            raise AnnotationError(f"{where}.image_id: {image_id} is not among the file's images")
        sequence, frame = frames[image_id]
        if entry.get("category_id", 1) != 1:
            sequence.skipped["not a person (category_id)"] += 1
        elif entry.get("iscrowd"):
            sequence.skipped["crowd region (iscrowd)"] += 1
        else:
            person = guarded(_person, sequence, skip, entry, layout, where)
            if person is None:
                continue
            frame.people.append(person)
            if not said[image_id] and person.num_visible:
                frame.labeled = True

    sequences = list(groups.values())
    for sequence in sequences:
        sequence.file_stem = stem if len(sequences) == 1 else sequence.name
    return sequences


def _frame(entry: Any, where: str) -> Frame:
    name = as_text(require(entry, "file_name", where), f"{where}.file_name").replace("\\", "/")
    width, height = as_image_size(entry, where)
    labeled = entry.get("is_labeled")
    return Frame(
        image_id=as_int(require(entry, "id", where), f"{where}.id"),
        file_name=name,
        index=frame_number(name, f"{where}.file_name"),
        labeled=False if labeled is None else as_flag(labeled, f"{where}.is_labeled"),
        ignore_regions=_regions(entry, where),
        width=width,
        height=height,
        extra={key: value for key, value in entry.items() if key not in _IMAGE_FIELDS},
    )


def _set_nframes(sequence: Sequence, entry: Mapping[str, Any], where: str) -> None:
    if entry.get("nframes") is None:
        return
    nframes = as_int(entry["nframes"], f"{where}.nframes")
    if nframes < 1:
        raise AnnotationError(f"{where}.nframes: expected at least 1, got {nframes}")
    if sequence.nframes not in (None, nframes):
        raise AnnotationError(
            f"{where}.nframes: {nframes}, but the sequence's other frames say {sequence.nframes}"
        )
    sequence.nframes = nframes


def _person(entry: Mapping[str, Any], layout: _Layout, where: str) -> Person:
    skeleton, slots, num_slots = layout
    keypoints = np.zeros((len(skeleton), 3))
    if entry.get("keypoints"):
        values = as_floats(entry["keypoints"], 3 * num_slots, f"{where}.keypoints")
        keypoints = values.reshape(-1, 3)[slots]
        if (keypoints[:, 2] < 0).any():
            joint = int(np.argmax(keypoints[:, 2] < 0))
            raise AnnotationError(
                f"{where}.keypoints: visibility {keypoints[joint, 2]:g} of "
                f"{skeleton.keypoints[joint]}; "
                "it must be 0 (not annotated), 1 or 2"
            )
        keypoints[:, 2] = keypoints[:, 2] > 0
    if entry.get("bbox") is not None:
        box = as_box(entry["bbox"], f"{where}.bbox")
    elif keypoints[:, 2].any():
        box = box_of_keypoints(keypoints, enlarge=1.3, margin=0.0)
    else:
        raise AnnotationError(f"{where}: has neither 'bbox' nor annotated 'keypoints'")
    track_id, person_id = (
        None if entry.get(key) is None else as_int(entry[key], f"{where}.{key}")
        for key in ("track_id", "person_id")
    )
    return Person(
        box=box,
        keypoints=keypoints,
        head_box=_head_box(entry, where),
        track_id=-1 if track_id is None else track_id,
        score=(
            None
            if entry.get("score") is None
            else float(as_floats([entry["score"]], 1, f"{where}.score")[0])
        ),
        joint_scores=(
            as_floats(entry["scores"], num_slots, f"{where}.scores")[slots]
            if entry.get("scores")
            else None
        ),
        person_id=person_id,
    )


def _head_box(entry: Mapping[str, Any], where: str) -> np.ndarray | None:
    """PoseTrack18's ``bbox_head`` (x, y, w, h) or DetectAndTrack's ``head_box`` (two corners)."""
    if entry.get("bbox_head"):
        return as_box(entry["bbox_head"], f"{where}.bbox_head")
    if entry.get("head_box"):
        x1, y1, x2, y2 = as_floats(entry["head_box"], 4, f"{where}.head_box")
        return np.array([min(x1, x2), min(y1, y2), abs(x2 - x1), abs(y2 - y1)])
    return None


def _regions(entry: Mapping[str, Any], where: str) -> list[np.ndarray]:
    xs = as_list(entry.get("ignore_regions_x") or [], f"{where}.ignore_regions_x")
    ys = as_list(entry.get("ignore_regions_y") or [], f"{where}.ignore_regions_y")
    if len(xs) != len(ys):
        raise AnnotationError(
            f"{where}.ignore_regions_x: {len(xs)} polygons, but ignore_regions_y has {len(ys)}"
        )
    polygons = []
    for position, (x, y) in enumerate(zip(xs, ys, strict=True)):
        at = f"{where}.ignore_regions_x[{position}]"
        x = as_floats(x, len(x) if isinstance(x, list) else 0, at)
        y = as_floats(y, len(x), f"{where}.ignore_regions_y[{position}]")
        polygons.append(np.stack([x, y], axis=1))
    return polygons


class _Layout(NamedTuple):
    """A file's skeleton, the slot of each of its keypoints, and the number of slots."""

    skeleton: Skeleton
    slots: list[int]
    num_slots: int


def _layout(categories: Any, images: Items[Any], source: str) -> _Layout:
    """PoseTrack's joints in the 17 slots, in another order that the person category names, or
    keypoints of the file's own where the category has ``flip_pairs``.

    COCO's names of the slots that PoseTrack re-uses (left_eye for head_bottom, right_eye for
    head_top) are understood in files that have PoseTrack's fields.
    """
    category = person_category(categories)
    names: list[Any] = list(category.get("keypoints") or [])
    if "flip_pairs" in category:
        try:
            skeleton = skeleton_of_category(category, f"{source}: categories[*]")
        except ValueError as error:
            raise AnnotationError(str(error)) from error
        return _Layout(skeleton, list(range(len(skeleton))), len(skeleton))
    if not names:
        return _Layout(POSETRACK, list(SLOT_OF_JOINT), len(SLOTS17))
    if len(names) == len(SLOTS17) and tuple(names[1:3]) == ("left_eye", "right_eye"):
        marks = {"is_labeled", "vid_id", "frame_id", "nframes"}
        if images and not any(isinstance(e, Mapping) and marks & e.keys() for e in images):
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
    return _Layout(POSETRACK, [names.index(joint) for joint in JOINTS], len(names))


def person_category(categories: Any) -> Mapping[str, Any]:
    """The last entry of ``categories`` with id 1, or an empty one."""
    found: Mapping[str, Any] = {}
    for category in categories or []:
        if isinstance(category, Mapping) and category.get("id", 1) == 1:
            found = category
    return found


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
    seen: set[int] = set()
    for frame in sequence.frames:
        if frame.image_id in seen:
            raise ValueError(f"image_id: {frame.image_id} ({frame.file_name}) occurs twice")
        seen.add(frame.image_id)
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
    clash = _IMAGE_FIELDS & frame.extra.keys()
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
