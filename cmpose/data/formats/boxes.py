"""What all files of people's boxes have in common: who is a person, units, what is left out.

The readers of such files are ``detections.py`` beside this module, ``cmpose/predict/detect.py`` and
``cmpose/convert/boxes.py``.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from cmpose.data.formats.messages import counted, short
from cmpose.data.sequence import AnnotationError

NOT_A_PERSON = "not a person (category_id)"
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
        self._others: list[str] = []
        self._first: dict[bool, str] = {}  # whether ids count from 0 → where that is said

    def is_person(self, category: int | str | None, at: str) -> bool:
        """Whether an entry is a person; others are counted.

        A person is 1 as in COCO, the name ``person``, or no category at all. Where ids count from
        0, as YOLO's do, a person is 0: an id that COCO's files do not have.

        Args:
            category: the entry's ``category_id``.
            at: where the entry is in the file, for messages.

        Raises:
            AnnotationError: the file has both, so that either may be the person.
        """
        if category is None:
            return True
        name = str(category).strip().lower()
        if name not in ("0", "1", "person"):
            self.left_out[NOT_A_PERSON] += 1
            if len(self._others) < 3 and short(category) not in self._others:
                self._others.append(short(category))
            return False
        from_zero = name == "0"
        self._first.setdefault(from_zero, f"{at}.category_id: {short(category)}")
        if len(self._first) == 2:
            raise AnnotationError(
                f"{self.path}: {self._first[True]}, but {self._first[False]}: either may be the "
                'person; write "person" for people, and leave other things out of the file'
            )
        self.kept[FROM_ZERO] += from_zero
        return True

    def summary(self) -> str:
        """``left out: 2 × ...; kept: 3 × ...``, empty where there is nothing to say."""
        parts = (("left out", +self.left_out), ("kept", +self.kept))
        return "; ".join(f"{what}: {counted(counts)}" for what, counts in parts if counts)

    def check_somebody(self, used: int, entries: int) -> None:
        """Raises AnnotationError with the reasons and what to do if no entry is used."""
        if used:
            return
        reasons = counted(self.left_out)
        remedies = []
        if self._others:
            reasons = reasons.replace(
                NOT_A_PERSON, f"{NOT_A_PERSON[:-1]} {', '.join(self._others)})"
            )
            remedies.append('a person\'s category_id is 1 or "person", or is left out')
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
    known = ~np.isnan(sizes).any(axis=1)
    boxes, sizes = boxes[known], sizes[known]
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
