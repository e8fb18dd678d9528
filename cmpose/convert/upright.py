"""Labels of pictures with an orientation tag: what they were made on, and turned along with it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from cmpose.convert.sources import NO_BOX, Draft
from cmpose.data.picture_header import PictureHeader
from cmpose.data.pictures import is_mirrored, turn_box, turn_points
from cmpose.data.sequence import AnnotationError, Person
from cmpose.data.skeleton import Skeleton


def upright_draft(
    draft: Draft,
    picture: Path,
    header: PictureHeader,
    exif: Literal["auto", "turned", "unturned"],
    skeleton: Skeleton,
) -> Draft:
    """A picture's labels as they lie on the upright picture.

    Args:
        draft: what the source says.
        picture: for messages.
        header: the picture's.
        exif: what the labels were made on, see ``ConvertOptions``.
        skeleton: says what swaps where stored pixels are mirrored.

    Raises:
        AnnotationError: nothing tells what the labels were made on, or the stated size contradicts
            ``exif``.
    """
    if header.orientation == 1:
        return draft
    stated = (draft.width, draft.height)
    tells = None not in stated and header.size != header.stored_size
    about = f"{draft.where}: {picture} has the orientation tag {header.orientation}"
    size = f"width, height: {stated[0]}×{stated[1]}"
    if exif == "auto":
        if tells and stated == header.stored_size:
            raise AnnotationError(
                f"{about}, but {size} are of the pixels as they are stored; --exif unturned turns "
                "the labels along"
            )
        if not tells:
            raise AnnotationError(
                f"{about}, and its size does not tell what was labelled: give --exif turned if the "
                "labels lie on the picture as viewers show it, or --exif unturned if they lie on "
                "the pixels as they are stored"
            )
        return draft
    if exif == "turned":
        if tells and stated == header.stored_size:
            raise AnnotationError(f"{about} and --exif turned is given, but {size} are unturned")
        return draft
    if tells and stated == header.size:
        raise AnnotationError(f"{about} and --exif unturned is given, but {size} are turned")
    turn = header.orientation, header.stored_size
    width, height = stated[::-1] if header.orientation >= 5 else stated
    return replace(
        draft,
        width=width,
        height=height,
        people=[_turned(person, turn, skeleton) for person in draft.people],
        regions=[turn_points(region, *turn) for region in draft.regions],
        turn=turn,
    )


def _turned(person: Person, turn: tuple[int, tuple[int, int]], skeleton: Skeleton) -> Person:
    pose = person.keypoints.copy()
    visible = pose[:, 2] > 0
    pose[visible, :2] = turn_points(pose[visible, :2], *turn)
    if is_mirrored(turn[0]):  # who labelled a mirrored left hand called it the right one
        pose = pose[list(skeleton.flip_permutation)]

    def turned(box: np.ndarray) -> np.ndarray:
        return turn_box(box, *turn)

    return replace(
        person,
        keypoints=pose,
        box=person.box if person.box is NO_BOX else turned(person.box),
        head_box=None if person.head_box is None else turned(person.head_box),
    )
