"""CSV with a keypoint a row → people in pictures."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping
from collections.abc import Sequence as Items
from pathlib import Path

import numpy as np

from cmpose.convert.report import ConvertReport
from cmpose.convert.sources import NO_BOX, Draft
from cmpose.data.formats.messages import comma_list, short
from cmpose.data.formats.reader import MOST_PIXELS, read_text
from cmpose.data.formats.skeleton import skeleton_of_category
from cmpose.data.sequence import AnnotationError, Person
from cmpose.data.skeleton import Skeleton

_NEEDED = ("keypoint", "x", "y")
_COLUMNS = (*_NEEDED, "image", "frame", "sequence", "track", "visible")


def read_csv_drafts(
    path: Path, report: ConvertReport, skeleton: Skeleton | None = None
) -> tuple[list[Draft], Skeleton]:
    """A CSV with one keypoint a row.

    Columns: ``keypoint``, ``x``, ``y`` (pixels); ``image``, a file, or ``frame``, a number, with
    ``sequence`` where there are several; ``track``, who it is (one person a frame without);
    ``visible``, 0, 1 or 2 as in COCO (2 if left out). Empty x and y are a keypoint that is not
    annotated.

    Args:
        path: the file, UTF-8 or as its byte order mark says, separated by commas.
        report: gets what is left out.
        skeleton: names, limbs and flips; None takes the names in order of appearance, flips from
            them, and no limbs.

    Raises:
        AnnotationError: naming file, line, column and value.
    """
    rows = _csv_rows(path)
    if skeleton is None:
        names = list(dict.fromkeys(row["keypoint"] for _, row in rows))
        skeleton = skeleton_of_category({"keypoints": names}, str(path), "column keypoint")
    drafts: dict[tuple[str, str], Draft] = {}
    people: dict[tuple[str, str, str], Person] = {}
    for where, row in rows:
        _try_csv_row(where, row, skeleton, drafts, people, report)
    for person in people.values():  # a keypoint without a row is not annotated
        person.keypoints = np.nan_to_num(person.keypoints)
    return list(drafts.values()), skeleton


def _csv_rows(path: Path) -> list[tuple[str, dict[str, str]]]:
    """The rows of a CSV, column → value, each with what messages call it."""
    lines = read_text(path, AnnotationError).splitlines()
    reader = csv.DictReader(lines, restkey="", strict=True)
    rows: list[tuple[str, dict[str, str]]] = []
    try:
        header = [name.strip().lower() for name in reader.fieldnames or []]
        _check_columns(header, f"{path}: line 1")
        reader.fieldnames = header
        for row in reader:
            where = f"{path}: line {reader.line_num}"
            if "" in row or None in row.values():
                raise AnnotationError(
                    f"{where}: other than {len(header)} values; write one for each column"
                )
            rows.append((where, {column: value.strip() for column, value in row.items()}))
    except csv.Error as error:
        raise AnnotationError(f"{path}: line {reader.line_num}: not CSV: {error}") from error
    if not rows:
        raise AnnotationError(f"{path}: holds no keypoints, only a header")
    return rows


def _check_columns(header: Items[str], where: str) -> None:
    if not set(_NEEDED) <= set(header) or not {"image", "frame"} & set(header):
        raise AnnotationError(
            f"{where}: the columns are {comma_list(header) or 'none'}; needed are keypoint, x, y "
            "and image or frame, separated by commas"
        )
    unknown = [short(name) for name in header if name not in _COLUMNS]
    if unknown:
        raise AnnotationError(
            f"{where}: no column is called {comma_list(unknown)}; there are {', '.join(_COLUMNS)}"
        )
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise AnnotationError(f"{where}: two columns are called {twice!r}; keep one of them")


def _try_csv_row(
    where: str,
    row: Mapping[str, str],
    skeleton: Skeleton,
    drafts: dict[tuple[str, str], Draft],
    people: dict[tuple[str, str, str], Person],
    report: ConvertReport,
) -> None:
    try:
        _csv_row(where, row, skeleton, drafts, people)
    except AnnotationError as error:
        report.error("broken row", str(error))


def _csv_row(
    where: str,
    row: Mapping[str, str],
    skeleton: Skeleton,
    drafts: dict[tuple[str, str], Draft],
    people: dict[tuple[str, str, str], Person],
) -> None:
    name, video = row.get("image", ""), row.get("sequence", "")
    number = None if name else _integer(row.get("frame", ""), f"{where}: frame")
    if row["keypoint"] not in skeleton.keypoints:
        raise AnnotationError(
            f"{where}: keypoint: {short(row['keypoint'])} is not among "
            f"{comma_list(skeleton.keypoints)}"
        )
    joint = skeleton.keypoints.index(row["keypoint"])
    track = _integer(row["track"], f"{where}: track") if row.get("track") else -1
    visible = _integer(row["visible"], f"{where}: visible") if row.get("visible") else 2
    if visible not in (0, 1, 2):
        raise AnnotationError(
            f"{where}: visible: {visible}; it must be 0 (not annotated), 1 (hidden) or 2 (visible)"
        )
    if not row["x"] and not row["y"]:
        visible, x, y = 0, 0.0, 0.0
    else:
        x, y = (_number(row[axis], f"{where}: {axis}") for axis in ("x", "y"))
    key = (video, name or str(number))
    draft = drafts.setdefault(
        key, Draft(name.replace("\\", "/") or video, where, number=number, video=video)
    )
    who = (*key, str(track))
    if who not in people:
        people[who] = Person(NO_BOX, np.full((len(skeleton), 3), np.nan), track_id=track)
        draft.people.append(people[who])
    pose = people[who].keypoints
    if not np.isnan(pose[joint, 0]):
        raise AnnotationError(
            f"{where}: keypoint: {row['keypoint']:.60} of track {track} is given twice in "
            f"{name[:60] or f'frame {number}'}; number people in the column track"
        )
    pose[joint] = (x, y, 1.0) if visible else (0.0, 0.0, 0.0)


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
"""Python reads more than that, of which little is meant so: 1_0, inf, digits of other scripts."""


def _integer(text: str, where: str) -> int:
    if not re.fullmatch(r"[+-]?\d{1,18}", text, re.ASCII):
        raise AnnotationError(
            f"{where}: expected a whole number of at most 18 digits, got {short(text)}"
        )
    return int(text)


def _number(text: str, where: str) -> float:
    value = float(text) if _NUMBER.fullmatch(text) else math.nan
    if not abs(value) <= MOST_PIXELS:
        raise AnnotationError(f"{where}: expected a number of pixels, got {short(text)}")
    return value
