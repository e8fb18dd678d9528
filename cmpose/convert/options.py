"""How ``cmpose convert`` reads and writes: light to import, for the command line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Format = Literal["auto", "coco", "posetrack17", "csv"]
Grouping = Literal["auto", "video", "still"]


@dataclass(frozen=True)
class ConvertOptions:
    """How a source is read and written.

    Attributes:
        format: the source's format; ``auto`` tells it by the file's name and keys.
        split: folder of annotations and images in the data set, e.g. ``train`` or ``val``.
        name: name of the sequence whose pictures lie in ``images`` itself; empty takes the
            folder's name.
        group: ``video`` makes a sequence of the numbered pictures of a folder, ``still`` one of
            every picture; ``auto`` decides folder by folder.
        to: ``own`` keeps the source's keypoints, ``posetrack`` maps them to PoseTrack's by name.
        category: name of the category to take, where several of a COCO file have keypoints.
        skeleton: JSON file with keypoints, limbs and flips; empty takes the source's.
        boxes: detection file: people without a box get theirs from it, and it becomes
            ``SPLIT_boxes.json``.
        exif: what was labelled where a picture has an orientation tag: ``turned``, the picture as
            viewers show it, or ``unturned``, the pixels as they are stored (labels and boxes are
            turned along). ``auto`` goes by the size that the source states, and stops where that
            does not tell.
        outside: file names may lead out of the folder of images: absolute ones, with ``..``, and
            through links.
        place: pictures are copied, or linked (symbolic links to where they lie).
        on_error: ``skip`` leaves out what is broken and counts it.
        overwrite: replaces what an earlier conversion of the split wrote.
    """

    format: Format = "auto"
    split: str = "train"
    name: str = ""
    group: Grouping = "auto"
    to: Literal["own", "posetrack"] = "own"
    category: str = ""
    skeleton: str = ""
    boxes: str = ""
    exif: Literal["auto", "turned", "unturned"] = "auto"
    outside: bool = False
    place: Literal["copy", "link"] = "copy"
    on_error: Literal["raise", "skip"] = "raise"
    overwrite: bool = False
