"""Which number in the names of a folder's pictures is the frame's."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import NamedTuple

from cmpose.data.pictures import is_picture

_HASHES = (
    re.compile(r"(?P<bare>.+)_[A-Za-z]{3,4}\.rf\.(?P<hash>[0-9A-Za-z]+)"),  # Roboflow's exports
    re.compile(r"(?P<hash>[0-9a-f]{8})(-|__)(?P<bare>.+)"),  # Label Studio's
    re.compile(r"(?P<bare>.+)[-_.](?P<hash>[0-9a-f]{8,})"),
)
"""What tools add to a name, with a different hash for each picture."""


class FrameName(NamedTuple):
    """What a picture's name says.

    Attributes:
        video: the name without its number and without a hash: text before, text behind. Pictures
            that differ in it are of different videos.
        number: the frame's.
        doubt: why the number may be another one; empty where there is no doubt.
    """

    video: tuple[str, str]
    number: int
    doubt: str = ""


def number_pictures(names: Collection[str]) -> dict[str, FrameName]:
    """The frame numbers of a folder's pictures.

    The number is the run of digits in which names differ that are equal otherwise; of several such
    runs the last; of a name like no other the last run that it has. A last run that is equal in all
    is the number too if it is padded with zeros and as wide as the one that differs: walk1_000000
    and walk2_000000 are of two videos. A hash that a labelling tool has added is passed over.

    Args:
        names: all that lies in the folder.

    Returns:
        Name → what it says. Names without digits, and what is no picture, are absent.
    """
    alike: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for name, stem in _without_hashes(names).items():
        digits = re.findall(r"\d+", stem)
        if digits and max(map(len, digits)) <= 18:
            texts = re.split(r"\d+", stem)
            texts[-1] += name[name.rindex(".") :]
            alike.setdefault(tuple(texts), {})[name] = digits
    numbered = {}
    for between, members in alike.items():
        column, doubt = _column(list(members.values()))
        for name, digits in members.items():
            runs = [text for pair in zip(between, [*digits, ""], strict=True) for text in pair]
            video = "".join(runs[: 2 * column + 1]), "".join(runs[2 * column + 2 :])
            numbered[name] = FrameName(video, int(digits[column]), doubt)
    return numbered


def _without_hashes(names: Collection[str]) -> dict[str, str]:
    """Pictures → their names without hash and ending.

    Digits alone are taken for a hash only where other names have one with letters in that place.
    """
    bare = {name: name[: name.rindex(".")] for name in sorted(names) if is_picture(name)}
    for pattern in _HASHES:
        matches = {name: pattern.fullmatch(stem) for name, stem in bare.items()}
        hashed = {n: m for n, m in matches.items() if m and re.search(r"\d", m["bare"])}
        if any(re.search(r"[a-z]", match["hash"], re.I) for match in hashed.values()):
            bare |= {name: match["bare"] for name, match in hashed.items()}
    return bare


def _column(rows: list[list[str]]) -> tuple[int, str]:
    """Which run of digits is the frame number, and a doubt about it."""
    columns = list(zip(*rows, strict=True))
    counts = [len(set(map(int, column))) for column in columns]
    varying = [i for i, count in enumerate(counts) if count > 1]
    last = len(columns) - 1
    if not varying or (
        _is_padded(columns[last]) and _width(columns[last]) >= _width(columns[varying[-1]])
    ):
        return last, ""
    last = varying[-1]
    # frame0000_cam1, frame0000_cam2, frame0001_cam1: a number that is padded and has more values.
    rivals = [i for i in varying[:-1] if _is_padded(columns[i]) and counts[i] > counts[last]]
    if rivals and not _is_padded(columns[last]):
        return last, (
            f"both {rows[0][rivals[-1]]} and {rows[0][last]} could be the frame number, "
            "as other names differ in either; put each video's pictures into a folder of its own, "
            "or name them with the frame number last"
        )
    return last, ""


def _is_padded(column: Collection[str]) -> bool:
    return any(len(digits) > 1 and digits[0] == "0" for digits in column)


def _width(column: Collection[str]) -> int:
    return max(map(len, column))
