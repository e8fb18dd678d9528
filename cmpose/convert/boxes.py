"""A detection file beside a conversion: people's boxes, and ``data.boxes`` of the new data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cmpose.convert.report import ConvertReport
from cmpose.convert.sources import Draft
from cmpose.data.formats.boxes import EMPTY, FROM_ZERO, BoxCounts, Scored, check_units
from cmpose.data.formats.coco import box_of
from cmpose.data.formats.messages import ONLY_NEARLY, nearly, short
from cmpose.data.formats.reader import Pixels, Whole, read
from cmpose.data.pictures import turn_box
from cmpose.data.sequence import AnnotationError, Frame, Person
from cmpose.data.transforms import clean_box
from cmpose.files import write_text


class PictureBox(Scored, gc=False):
    """An entry of the file; ``frame``, ``image_name`` or ``image_id`` tells the picture."""

    bbox: list[Pixels]
    track_id: Whole = -1
    frame: Whole | None = None
    image_name: str | None = None
    image_id: Whole | None = None


class Box(NamedTuple):
    """A person's box.

    Attributes:
        box: float64 [4] x, y, width, height.
        score: the detector's.
        track_id: -1 without.
        where: its entry in the file, for messages.
        picture: what the entry says of its picture, of ``image_name``, ``frame`` and ``image_id``.
    """

    box: np.ndarray
    score: float
    track_id: int
    where: str
    picture: dict[str, int | str]


class OwnBoxes:
    """A list of ``{"frame": 0, "bbox": [x, y, w, h], "score": 0.9, "track_id": 3}``.

    ``image_name`` (a file's name, as the source has it) or ``image_id`` (the source's) may stand in
    place of ``frame``, the number in the picture's name; ``frame`` is for sources with one video.
    Where an entry has several, all must be of the same picture.

    Raises:
        AnnotationError: naming the file, the entry and the value.
    """

    def __init__(self, path: Path, report: ConvertReport) -> None:
        self.path, self.report = path, report
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such detection file (--boxes)")
        self._boxes: dict[tuple[str, Any], list[Box]] = {}
        self._video: Path | None = None  # the first picture that was found by its frame number
        self._written: list[dict[str, Any]] = []
        self._used: dict[tuple[str, Any], Path] = {}
        self._names: set[str] = set()  # of the pictures that were asked for
        self._sizes: list[tuple[int, int]] = []  # of the pictures of what is written
        entries = read(path, list[PictureBox], AnnotationError)
        if not entries:
            raise AnnotationError(f"{path}: holds no detections (--boxes)")
        counts = BoxCounts(path)
        for number, entry in enumerate(entries):
            where = f"{path}: [{number}]"
            picture = _picture(entry, where)
            score = entry.score_said()
            score = 1.0 if score is None else score
            bbox = box_of(entry.bbox, f"{where}.bbox")
            box = Box(bbox, score, entry.track_id, where, picture)
            if reason := counts.reason_against(entry, f"[{number}]"):
                report.leave_out(f"box of --boxes: {reason}", where)
            else:
                self._boxes.setdefault(next(iter(picture.items())), []).append(box)
        people = [box for boxes in self._boxes.values() for box in boxes]
        counts.check_somebody(len(people), len(entries))
        check_units(path, np.stack([box.box for box in people]))
        for _ in range(counts.kept[FROM_ZERO]):
            report.warn(f"box of --boxes: {FROM_ZERO}", str(path))

    def of(self, draft: Draft, frame: Frame, file: Path) -> list[Box]:
        """The boxes of a picture; :meth:`write` will write them.

        Raises:
            AnnotationError: they could be another picture's too.
        """
        keys: list[tuple[str, Any]] = [
            ("image_id", draft.image_id),
            ("image_name", draft.file_name),
            ("image_name", file.name),
        ]
        if draft.named_number is not None:
            keys.append(("frame", draft.named_number))
        self._names |= {draft.file_name, file.name}
        for key in keys:
            if key not in self._boxes:
                continue
            for box in self._boxes[key]:
                _check_agreement(box, keys)
            other = self._used.setdefault(key, file)
            if key[0] == "frame":
                self._video = self._video or file
                other = other if self._video.parent == file.parent else self._video
            if other != file:
                raise AnnotationError(
                    f"{self.path}: {key[0]} {short(key[1])} could be of {other} or {file}; give "
                    "image_name as the source has it, folder and all"
                )
            assert frame.width is not None
            assert frame.height is not None
            size = frame.width, frame.height
            boxes = []
            for box in self._boxes[key]:
                if draft.turn is not None:
                    box = box._replace(box=turn_box(box.box, *draft.turn))
                if clean_box(box.box, *size) is not None:
                    boxes.append(box)
                else:
                    self.report.leave_out(f"box of --boxes: {EMPTY}", box.where)
            self._sizes += [size] * len(boxes)
            self._written += [
                {
                    "image_id": frame.image_id,
                    "category_id": 1,
                    "bbox": box.box.tolist(),
                    "score": box.score,
                }
                for box in boxes
            ]
            return boxes
        return []

    @staticmethod
    def choose(boxes: list[Box], person: Person) -> np.ndarray | None:
        """The box of a person's track; without one, the box that holds most keypoints.

        It must hold at least half of them; of boxes that hold as many the smallest is taken.
        """
        for box in boxes:
            if box.track_id >= 0 and box.track_id == person.track_id:
                return box.box
        points = person.keypoints[person.keypoints[:, 2] > 0, :2]

        def keypoints_in(box: np.ndarray) -> int:
            return int(((points >= box[:2]) & (points <= box[:2] + box[2:])).all(axis=1).sum())

        ranked = sorted(boxes, key=lambda b: (-keypoints_in(b.box), b.box[2] * b.box[3]))
        if ranked and len(points) and 2 * keypoints_in(ranked[0].box) >= len(points):
            return ranked[0].box
        return None

    def check(self) -> None:
        """Counts the boxes of other pictures, when all pictures have been asked for.

        Raises:
            AnnotationError: no entry is of a converted picture, one has nearly the name of one, or
                boxes are two corners.
        """
        for key, boxes_of_key in self._boxes.items():
            near = nearly(key[1], self._names) if key[0] == "image_name" else None
            if near is not None and key not in self._used:
                raise AnnotationError(
                    f"{boxes_of_key[0].where}: image_name {short(key[1])}: {short(near)} of the "
                    f"source {ONLY_NEARLY}"
                )
        if not self._used:
            raise AnnotationError(
                f"{self.path}: none of its entries is of a converted picture; they are found by "
                "frame (the number in the picture's name), image_name or image_id"
            )
        if self._written:
            boxes = np.array([entry["bbox"] for entry in self._written])
            check_units(self.path, boxes, np.array(self._sizes))
        for key, boxes_of_key in self._boxes.items():
            if key not in self._used:
                for box in boxes_of_key:
                    self.report.leave_out(
                        "boxes of a picture that the source does not list",
                        f"{box.where} ({key[0]} {key[1]})",
                    )

    def write(self, path: Path) -> None:
        """Writes the boxes of the data set's pictures as a detection file."""
        write_text(path, json.dumps(self._written))


def _picture(entry: PictureBox, where: str) -> dict[str, int | str]:
    """What an entry says of its picture, the surest first."""
    name = (entry.image_name or "").replace("\\", "/")
    fields = {"image_name": name or None, "frame": entry.frame, "image_id": entry.image_id}
    picture = {key: value for key, value in fields.items() if value is not None}
    if not picture:
        raise AnnotationError(
            f"{where}: has neither 'frame', 'image_name' nor 'image_id', which tell its picture"
        )
    return picture


def _check_agreement(box: Box, keys: list[tuple[str, Any]]) -> None:
    """Raises AnnotationError if a box names another picture than ``keys`` by one of its values."""
    for key, value in box.picture.items():
        listed = [each for name, each in keys if name == key and each not in ("", -1)]  # -1: none
        if listed and value not in listed:
            first, own = next(iter(box.picture.items()))
            raise AnnotationError(
                f"{box.where}: {first} is {short(own)}, but {key} is {short(value)}, and in the "
                f"source that picture's is {short(listed[0])}; leave out the one that is wrong"
            )
