"""The JSON of PoseTrack17, 18 and 21 and of COCO keypoints, as typed structs.

Readers for training, for the evaluation and for conversion share them. Keys that are not named
here are ignored. What a struct cannot say (how many keypoints a category has, ids that lead
nowhere) is checked by the readers.
"""

from __future__ import annotations

from typing import Any, Generic, TypeVar

from msgspec import UNSET, Struct, UnsetType

from cmpose.data.formats.reader import Number, Pixels, Whole

Id = Whole | str
Lengths = list[Pixels] | None
Flag = bool | Whole | None


class Category(Struct, gc=False):
    """What the keypoints of a file are. :mod:`cmpose.data.formats.skeleton` gives the meaning.

    ``flip_pairs``, even null, is the mark of keypoints of the file's own.
    """

    id: Id | None = 1
    name: str | None = None
    keypoints: list[str] | None = None
    skeleton: list[tuple[Id, Id]] | None = None
    flip_pairs: list[tuple[str, str]] | None | UnsetType = UNSET
    upper_body: list[str] | None = None
    lower_body: list[str] | None = None


class Image(Struct, gc=False):
    """An entry of ``images``, a frame."""

    id: Id
    file_name: str = ""
    width: Whole | None = None
    height: Whole | None = None
    nframes: Whole | None = None
    is_labeled: Flag = None
    vid_id: Id | None = None
    frame_id: Id | None = None
    ignore_regions_x: list[list[Pixels]] | None = None
    ignore_regions_y: list[list[Pixels]] | None = None


IMAGE_FIELDS = frozenset(Image.__struct_fields__)
"""What a reader gives a meaning to; other keys of an image are kept as they are."""


class SourcedImage(Image, gc=False):
    """An entry of ``images`` with the picture's name in what ``cmpose convert`` was given."""

    source: Any = None


class VideoImage(Image, gc=False):
    """An entry of ``images`` as labelling tools write it, with the video it is from."""

    video_id: Id | None = None
    frame_index: Id | None = None


class AnnotationSubject(Struct, gc=False):
    """What an entry of ``annotations`` is of; it decides whether the rest is looked at."""

    image_id: Id
    category_id: Id | None = None
    iscrowd: Flag = None


class Annotation(AnnotationSubject, gc=False):
    """An entry of ``annotations``, a person; boxes are x, y, width, height in pixels.

    ``bbox_head`` is PoseTrack18's head box, ``head_box`` DetectAndTrack's, two corners.
    """

    id: Id | None = None
    bbox: Lengths = None
    keypoints: Lengths = None
    scores: list[Number] | None = None
    score: Number | None = None
    bbox_head: Lengths = None
    head_box: Lengths = None
    track_id: Whole | None = None
    person_id: Whole | None = None
    segmentation: Any = None
    attributes: Any = None


class CocoVideo(Struct, gc=False):
    """An entry of COCO's ``videos``."""

    id: Id
    name: str | None = None
    file_name: str | None = None


class Corner(Struct, gc=False):
    """A point of an annolist: PoseTrack17 wraps every value in a list of one."""

    x: Pixels | list[Pixels]
    y: Pixels | list[Pixels]


class Joint(Struct, gc=False):
    """A joint of an annolist."""

    id: Whole | list[Whole]
    x: Pixels | list[Pixels]
    y: Pixels | list[Pixels]
    score: Number | list[Number] | None = None


class Joints(Struct, gc=False):
    """``annopoints`` of a person."""

    point: list[Joint] | Joint


class Rect(Struct, gc=False):
    """An entry of ``annorect``, a person; x1, y1, x2, y2 are the corners of the head's box."""

    annopoints: list[Joints] | Joints | None = None
    x1: Pixels | list[Pixels] | None = None
    y1: Pixels | list[Pixels] | None = None
    x2: Pixels | list[Pixels] | None = None
    y2: Pixels | list[Pixels] | None = None
    track_id: Whole | list[Whole] | None = None
    score: Number | list[Number] | None = None


class Region(Struct, gc=False):
    """An ignore region of an annolist, a polygon."""

    point: list[Corner] | Corner


class Picture(Struct, gc=False):
    """``image`` of an annolist's entry."""

    name: str | list[str] = ""


RectT = TypeVar("RectT")
AnnotationT = TypeVar("AnnotationT")
ImageT = TypeVar("ImageT")


class LabeledFrame(Struct, Generic[RectT], gc=False):
    """An entry of ``annolist``. ``annorect`` may be a bare object where there is one person."""

    image: Picture | list[Picture] | None = None
    is_labeled: Flag | list[bool | Whole] = None
    ignore_regions: list[Region] | Region | None = None
    annorect: list[RectT] | RectT | None | UnsetType = UNSET


class PoseDocument(Struct, Generic[ImageT, AnnotationT, RectT], gc=False):
    """A file of poses: ``annolist`` (PoseTrack17), or ``images`` and ``annotations`` (the others).

    With ``Any`` for the people of a file, each is checked on its own.
    """

    annolist: list[LabeledFrame[RectT]] | UnsetType = UNSET
    images: list[ImageT] | UnsetType = UNSET
    annotations: list[AnnotationT] | UnsetType = UNSET
    categories: list[Category] | None = None
    videos: list[CocoVideo] | None = None


PoseFile = PoseDocument[SourcedImage, Annotation, Rect]
"""Every person checked with the file."""
