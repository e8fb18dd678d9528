"""A COCO-style category as a skeleton: names, flips, limbs and halves of its keypoints."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from msgspec import UNSET

from cmpose.data.formats.documents import Category
from cmpose.data.formats.messages import comma_list, short
from cmpose.data.formats.reader import convert, parse_file
from cmpose.data.sequence import AnnotationError
from cmpose.data.skeleton import Side, Skeleton, is_lower, side_and_rest

_FIELDS = (
    "keypoints, upper_body and lower_body are lists of names, flip_pairs a list of pairs of names, "
    "skeleton of pairs of names or of numbers from 1"
)


def read_skeleton(path: Path) -> Skeleton:
    """The skeleton in a JSON file that holds a category.

    Raises:
        FileNotFoundError: there is no such file.
        AnnotationError: naming file, field, value and what to do.
    """
    return skeleton_of_category(parse_file(path, AnnotationError), str(path))


def skeleton_of_category(category: Any, source: str, at: str = "") -> Skeleton:
    """The skeleton that a COCO-style category describes.

    ``keypoints`` are the names; ``skeleton`` the limbs, pairs of numbers from 1 as COCO has them,
    or of names. ``flip_pairs`` are pairs of names; left out, names that differ in left and right
    (or l and r) pair up: ``left_knee`` and ``right_knee``, ``knee_l`` and ``knee_r``, ``LKnee`` and
    ``RKnee``. ``upper_body`` and ``lower_body`` are names; left out, names with hip, knee, ankle,
    foot, heel, toe, thigh, shin or leg are the lower body, and the rest the upper.

    Args:
        category: a ``Category``, or the parsed object.
        source: the file, for messages.
        at: its path in the file, for messages.

    Raises:
        AnnotationError: naming the field, the value and what to do.
    """
    category = convert(category, Category, source, AnnotationError, at, _FIELDS)
    where = f"{source}: {at}." if at else f"{source}: "
    names = tuple(category.keypoints or ())
    if not names:
        raise AnnotationError(
            f"{where}keypoints: expected a list of at least one name, got {category.keypoints!r}"
        )
    for position, name in enumerate(names):
        if not name:
            raise AnnotationError(f"{where}keypoints[{position}]: expected a name, got {name!r}")
        if name in names[:position]:
            raise AnnotationError(
                f"{where}keypoints[{position}]: {short(name)} occurs twice; give each keypoint one "
                "name"
            )
    if category.flip_pairs is UNSET or category.flip_pairs is None:
        flips = _pairs_by_name(names)
    else:
        flips = _pairs(category.flip_pairs, names, f"{where}flip_pairs")
        _check_flips(flips, names, f"{where}flip_pairs")
    lower = [j for j, name in enumerate(names) if is_lower(name)]
    upper = [j for j in range(len(names)) if j not in lower] if lower else []
    halves = [
        default if joints is None else [_index(n, names, f"{where}{key}") for n in joints]
        for key, joints, default in (
            ("upper_body", category.upper_body, upper),
            ("lower_body", category.lower_body, lower),
        )
    ]
    limbs = _pairs(category.skeleton or [], names, f"{where}skeleton")
    return Skeleton(names, limbs, flips, tuple(halves[0]), tuple(halves[1]))


def _pairs_by_name(names: Sequence[str]) -> tuple[tuple[int, int], ...]:
    sides_of: dict[tuple[str, ...], dict[Side, int]] = {}
    for j, name in enumerate(names):
        side, rest = side_and_rest(name)
        if side != "middle":
            sides_of.setdefault(rest, {}).setdefault(side, j)
    return tuple((sides["left"], sides["right"]) for sides in sides_of.values() if len(sides) == 2)


def _pairs(
    pairs: Iterable[tuple[int | str, int | str]], names: Sequence[str], where: str
) -> tuple[tuple[int, int], ...]:
    indices = []
    for position, pair in enumerate(pairs):
        a, b = (_index(end, names, f"{where}[{position}]") for end in pair)
        if a == b:
            raise AnnotationError(
                f"{where}[{position}]: {short(names[a])} is paired with itself; leave the pair out"
            )
        indices.append((a, b))
    return tuple(indices)


def _check_flips(pairs: Iterable[tuple[int, int]], names: Sequence[str], where: str) -> None:
    paired: set[int] = set()
    for j in (j for pair in pairs for j in pair):
        if j in paired:
            raise AnnotationError(
                f"{where}: {short(names[j])} is in two pairs; a keypoint has one mirror image"
            )
        paired.add(j)


def _index(keypoint: int | str, names: Sequence[str], where: str) -> int:
    """Of a keypoint by its name, or by its number from 1 on."""
    if isinstance(keypoint, str):
        if keypoint in names:
            return list(names).index(keypoint)
        raise AnnotationError(
            f"{where}: {short(keypoint)} is no keypoint; there are {comma_list(names)}"
        )
    if not 1 <= keypoint <= len(names):
        raise AnnotationError(
            f"{where}: {keypoint} is no keypoint; numbers run from 1 to {len(names)}, as in COCO"
        )
    return keypoint - 1
