"""What all files of people's boxes have in common: who is a person, units, what is left out.

The readers of such files are ``detections.py`` beside this module,
``cmpose/predict/detectors/detect.py`` and ``cmpose/convert/boxes.py``.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from msgspec import UNSET, Struct, UnsetType, field

from cmpose.data.formats.messages import counted, short
from cmpose.data.formats.reader import Number, Whole
from cmpose.data.sequence import AnnotationError

FROM_ZERO = "category_id 0 read as person, for the file has no 1"
EMPTY = "box empty or outside the image"

_SHARE = 0.1
"""A unit is doubted when more than this share of the boxes does not fit the picture."""
_REACH = 0.1
"""A box of a person who is cut off by the border may leave the picture by this share of itself."""


def low_score(limit: float) -> str:
    """The reason to leave out a box with a lower score."""
    return f"score below {limit:g}"


IN_SHARES = (
    "and pixels are expected: multiply x and width by the picture's width, y and height by its "
    "height"
)


def not_a_person(said_in: str) -> str:
    """The reason to leave out a box of something else, by the key that says so."""
    return f"not a person ({said_in})"


NOT_A_PERSON = not_a_person("category_id")


class Classified(Struct, gc=False, kw_only=True):
    """What an entry of a file of boxes says of its class: tools have other keys for it than COCO.

    Of the keys beside ``category_id`` only texts and whole numbers have a meaning here.
    """

    category_id: Whole | str | None = None
    category_name: Any = None
    category: Any = None
    class_name: Any = None
    class_: Any = field(name="class", default=None)
    label: Any = None

    def class_said(self) -> tuple[str, int | str | None]:
        """The key that decides and its value: a name before a number, ``person`` before others."""
        values = (
            ("category_id", self.category_id),
            ("category_name", self.category_name),
            ("category", self.category),
            ("class_name", self.class_name),
            ("class", self.class_),
            ("label", self.label),
        )
        usable = [(key, value) for key, value in values if type(value) is int or _is_text(value)]
        names = [(key, name) for key, name in usable if _is_text(name) and not _is_id(name)]
        people = [(key, name) for key, name in names if _plain(name) == "person"]
        return (people or names or usable or [("category_id", None)])[0]


class Scored(Classified, gc=False, kw_only=True):
    """What an entry says of its score: some detectors' files call it ``confidence`` or ``conf``."""

    score: Number | UnsetType = UNSET
    confidence: Number | UnsetType = UNSET
    conf: Number | UnsetType = UNSET

    def score_said(self) -> float | None:
        """The first of these three that is given."""
        scores = (self.score, self.confidence, self.conf)
        return next((value for value in scores if value is not UNSET), None)


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value.strip())


def _plain(name: int | str) -> str:
    return str(name).strip().lower()


def _is_id(name: int | str) -> bool:
    return _plain(name).isdecimal()


class BoxCounts:
    """Which entries of a file are people's boxes, and how many are left out for what reason.

    Args:
        path: the file, for messages.
        limit_option: what sets the least score, for messages.

    Attributes:
        left_out: reason → number of entries that are not used.
        kept: reason → number of entries that are used and that a user should know of.
    """

    def __init__(self, path: Path, limit_option: str = "") -> None:
        self.path, self.limit_option = path, limit_option
        self.left_out: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self._others: dict[str, list[str]] = {}  # key of the class → some of its values
        self._first: dict[bool, str] = {}  # whether ids count from 0 → where that is said

    def reason_against(self, entry: Classified, at: str) -> str:
        """Why an entry is left out, as it is no person; empty for a person.

        A person is 1 as in COCO, the name ``person``, or no class at all. Where ids count from
        0, as YOLO's do, a person is 0: an id that COCO's files do not have.

        Args:
            entry: of the file.
            at: where it is in the file, for messages.

        Raises:
            AnnotationError: the file has both, so that either may be the person.
        """
        key, value = entry.class_said()
        if value is None:
            return ""
        name = _plain(value)
        if name not in ("0", "1", "person"):
            reason = not_a_person(key)
            self.left_out[reason] += 1
            others = self._others.setdefault(key, [])
            if len(others) < 3 and short(value) not in others:
                others.append(short(value))
            return reason
        from_zero = name == "0"
        self._first.setdefault(from_zero, f"{at}.{key}: {short(value)}")
        if len(self._first) == 2:
            raise AnnotationError(
                f"{self.path}: {self._first[True]}, but {self._first[False]}: either may be the "
                'person; write "person" for people, and leave other things out of the file'
            )
        self.kept[FROM_ZERO] += from_zero
        return ""

    def summary(self) -> str:
        """``left out: 2 × ...; kept: 3 × ...``, empty where there is nothing to say."""
        parts = (("left out", +self.left_out), ("kept", +self.kept))
        return "; ".join(f"{outcome}: {counted(counts)}" for outcome, counts in parts if counts)

    def check_somebody(self, used: int, entries: int) -> None:
        """Raises AnnotationError with the reasons and what to do if no entry is used."""
        if used:
            return
        reasons = counted(self.left_out)
        remedies = []
        for key, others in self._others.items():
            reasons = reasons.replace(not_a_person(key), not_a_person(f"{key} {', '.join(others)}"))
            remedies.append(f'a person\'s {key} is 1 or "person", or is left out')
        if any(reason.startswith("score below") for reason in self.left_out) and self.limit_option:
            remedies.append(f"{self.limit_option} sets the least score")
        if self.left_out[EMPTY]:
            remedies.append("boxes are x, y, width, height in pixels")
        raise AnnotationError(
            "; ".join([f"{self.path}: nobody is left of its {entries} boxes: {reasons}", *remedies])
        )


def check_units(path: Path, boxes: np.ndarray, sizes: np.ndarray | None = None) -> None:
    """Refuses boxes that are certainly not x, y, width, height in pixels.

    Boxes of a picture of another size, and shares in percent, cannot be told from boxes of small
    people.

    Args:
        path: the file, for messages.
        boxes: [N, 4], all of the file's.
        sizes: [N, 2] or [2], width and height of their pictures, NaN where unknown.

    Raises:
        AnnotationError: all lie within 0 and 1 (shares of the picture); or many leave the picture
            and all lie in it when read as two corners.
    """
    if not len(boxes):
        return
    if (np.abs(boxes) <= 1.5).all() and (boxes[:, 2:] > 0).any():
        raise AnnotationError(
            f"{path}: boxes are shares of the picture, e.g. bbox {boxes[0].tolist()}, {IN_SHARES}; "
            "where x, y are the box's centre, as in YOLO's files, take off half its size"
        )
    if sizes is None:
        return
    sizes = np.broadcast_to(sizes, (len(boxes), 2))
    has_size = ~np.isnan(sizes).any(axis=1)
    boxes, sizes = boxes[has_size], sizes[has_size]
    first, second = boxes[:, :2], boxes[:, 2:]
    reaching = (first + second - sizes > _REACH * second).any(axis=1)
    are_corners = (first >= -1).all() and (second > first).all() and (second <= sizes + 1).all()
    if are_corners and reaching.sum() > _SHARE * len(boxes):
        i = int(np.argmax(reaching))
        raise AnnotationError(
            f"{path}: {reaching.sum()} of {len(boxes)} boxes leave the picture, but all lie in it "
            f"as two corners, e.g. bbox {boxes[i].tolist()} in {sizes[i, 0]:g}×{sizes[i, 1]:g} "
            "pixels: write x, y, width, height (width is x2 - x1); boxes that do reach out so far "
            "must be cut at the border"
        )
