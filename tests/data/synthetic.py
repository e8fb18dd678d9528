"""Tiny made-up data sets, written by hand in each of PoseTrack's formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from cmpose.data.sequence import Frame, Person, Sequence
from cmpose.data.skeleton import CATEGORY, NUM_JOINTS, SLOTS17, to_slots17

WIDTH, HEIGHT = 320, 240

COCO_KEYPOINTS = [SLOTS17[0], "left_eye", "right_eye", *SLOTS17[3:]]
"""COCO's 17; PoseTrack18 has re-used the eyes' slots."""


def person(seed: int = 0, missing: tuple[int, ...] = (5, 11)) -> Person:
    """Joints on a grid of quarter pixels inside the picture, some of them not annotated."""
    rng = np.random.default_rng(seed)
    keypoints = np.ones((NUM_JOINTS, 3))
    keypoints[:, 0] = rng.integers(4 * 60, 4 * 250, NUM_JOINTS) / 4
    keypoints[:, 1] = rng.integers(4 * 40, 4 * 220, NUM_JOINTS) / 4
    keypoints[list(missing)] = 0
    return Person(
        box=np.array([50.0, 30.0, 210.0, 200.0]),
        keypoints=keypoints,
        head_box=np.array([80.0, 40.0, 22.0, 31.0]),
        track_id=seed,
    )


def sequence(
    name: str = "000007_mpii_test",
    indices: tuple[int, ...] = (0, 1, 2, 3),
    people: int = 2,
    digits: int = 6,
    folder: str = "images/val",
) -> Sequence:
    frames = [
        Frame(
            image_id=10_000_070_000 + index,
            file_name=f"{folder}/{name}/{index:0{digits}d}.jpg",
            index=index,
            ignore_regions=[np.array([[1.0, 2.0], [30.0, 2.0], [30.0, 41.5]])],
            people=[person(seed=10 * index + p) for p in range(people)],
            width=WIDTH,
            height=HEIGHT,
        )
        for index in indices
    ]
    return Sequence(name=name, file_stem=name, frames=frames, nframes=len(indices))


def write_pictures(root: Path, *sequences: Sequence, extra: tuple[int, ...] = ()) -> None:
    """A textured JPEG for every frame; its brightness tells the frame's number."""
    for item in sequences:
        for frame in item.frames:
            write_picture(root / frame.file_name, frame.index)
        for index in extra:
            path = root / item.frames[0].file_name
            write_picture(path.with_name(f"{index:0{len(path.stem)}d}.jpg"), index)


def write_picture(path: Path, index: int, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), np.full((size[1], size[0], 3), 20 + 10 * index, np.uint8))


def dot(x: float, y: float, radius: float) -> np.ndarray:
    """uint8 [HEIGHT, WIDTH]: a smooth dot that survives resampling, 0 outside its radius."""
    ys, xs = np.mgrid[:HEIGHT, :WIDTH]
    distance = np.minimum(np.hypot(xs - x, ys - y) / radius, 1)
    return np.rint(255 * np.cos(distance * np.pi / 2) ** 2).astype(np.uint8)


def annolist(item: Sequence) -> dict[str, Any]:
    """PoseTrack17's annolist."""

    def rect(who: Person) -> dict[str, Any]:
        assert who.head_box is not None
        x, y, w, h = who.head_box
        points = [
            {"id": [j], "x": [float(px)], "y": [float(py)], "is_visible": [1]}
            for j, (px, py, v) in enumerate(who.keypoints)
            if v
        ]
        return {
            "x1": [x],
            "y1": [y],
            "x2": [x + w],
            "y2": [y + h],
            "track_id": [who.track_id],
            "annopoints": [{"point": points}] if points else [],
        }

    return {
        "annolist": [
            {
                "image": [{"name": frame.file_name}],
                "imgnum": [number + 1],
                "is_labeled": [int(frame.labeled)],
                "ignore_regions": [
                    {"point": [{"x": [float(x)], "y": [float(y)]} for x, y in region]}
                    for region in frame.ignore_regions
                ],
                "annorect": [rect(who) for who in frame.people],
            }
            for number, frame in enumerate(item.frames)
        ]
    }


def detect_and_track(*items: Sequence) -> dict[str, Any]:
    """DetectAndTrack's COCO-style PoseTrack17: v = 2, ``head_box`` as corners, all merged."""
    images, annotations = [], []
    for item in items:
        for frame in item.frames:
            images.append(
                {
                    "id": frame.image_id,
                    "file_name": frame.file_name,
                    "original_file_name": frame.file_name,
                    "frame_id": frame.index,
                    "nframes": item.nframes,
                    "width": frame.width,
                    "height": frame.height,
                    "is_labeled": frame.labeled,
                }
            )
            for who in frame.people:
                assert who.head_box is not None
                x, y, w, h = who.head_box
                keypoints = to_slots17(who.keypoints * [1, 1, 2])
                annotations.append(
                    {
                        "id": len(annotations),
                        "image_id": frame.image_id,
                        "category_id": 1,
                        "iscrowd": 0,
                        "track_id": who.track_id,
                        "head_box": [x, y, x + w, y + h],
                        "bbox": who.box.tolist(),
                        "area": float(who.box[2] * who.box[3]),
                        "num_keypoints": 17,
                        "segmentation": [],
                        "keypoints": keypoints.ravel().tolist(),
                    }
                )
    categories = [{"id": 1, "name": "person", "keypoints": list(SLOTS17)}]
    return {"images": images, "annotations": annotations, "categories": categories}


def posetrack18(item: Sequence) -> dict[str, Any]:
    """PoseTrack18 without width and height, as released."""
    merged = detect_and_track(item)
    for image, frame in zip(merged["images"], item.frames, strict=True):
        del image["width"], image["height"], image["original_file_name"]
        image |= {
            "frame_id": frame.image_id,
            "vid_id": item.name.split("_")[0],
            "has_no_densepose": True,
            "ignore_regions_x": [region[:, 0].tolist() for region in frame.ignore_regions],
            "ignore_regions_y": [region[:, 1].tolist() for region in frame.ignore_regions],
        }
    for annotation in merged["annotations"]:
        x1, y1, x2, y2 = annotation.pop("head_box")
        annotation["bbox_head"] = [x1, y1, x2 - x1, y2 - y1]
        annotation["keypoints"] = [
            min(v, 1.0) if position % 3 == 2 else v
            for position, v in enumerate(annotation["keypoints"])
        ]
        annotation["scores"] = []
        for key in ("area", "iscrowd", "segmentation", "num_keypoints"):
            del annotation[key]
    return merged | {"categories": [CATEGORY]}


def posetrack21(item: Sequence) -> dict[str, Any]:
    """PoseTrack21: as 18, with person_id and has_labeled_person."""
    document = posetrack18(item)
    for image in document["images"]:
        image["has_labeled_person"] = True
    for annotation in document["annotations"]:
        annotation["person_id"] = annotation["track_id"] + 500
    return document


def write_json(path: Path, document: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document))
    return path


def assert_same_people(left: Sequence, right: Sequence, *, boxes: bool = True) -> None:
    assert [frame.file_name for frame in left.frames] == [f.file_name for f in right.frames]
    for a, b in zip(left.frames, right.frames, strict=True):
        assert (a.index, a.labeled) == (b.index, b.labeled)
        assert len(a.people) == len(b.people)
        for p, q in zip(a.people, b.people, strict=True):
            np.testing.assert_array_equal(p.keypoints, q.keypoints)
            assert p.head_box is not None
            assert q.head_box is not None
            np.testing.assert_allclose(p.head_box, q.head_box, rtol=0, atol=1e-12)
            assert p.track_id == q.track_id
            if boxes:
                np.testing.assert_array_equal(p.box, q.box)
