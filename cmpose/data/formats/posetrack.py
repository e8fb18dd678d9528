"""PoseTrack17, 18 and 21 annotations from a folder of per-sequence files or one merged file.

``docs/data.md`` describes the formats, what is skipped and counted, and how frames are found.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Items
from pathlib import Path
from typing import Any, Literal

from cmpose.data.formats.coco import read_coco
from cmpose.data.formats.detections import Detections, ScoredBox, load_detections
from cmpose.data.formats.documents import Image, PoseDocument, PoseFile
from cmpose.data.formats.messages import short
from cmpose.data.formats.posetrack17 import read_annolist
from cmpose.data.formats.posetrack18 import posetrack18_image_id, write_posetrack18
from cmpose.data.formats.reader import convert, no_collection, parse_file
from cmpose.data.sequence import AnnotationError, Frame, Person, Sequence
from cmpose.data.skeleton import Skeleton

__all__ = [
    "AnnotationError",
    "Detections",
    "Frame",
    "Person",
    "ScoredBox",
    "Sequence",
    "describe",
    "listed",
    "load_annotations",
    "load_detections",
    "posetrack18_image_id",
    "validate",
    "write_posetrack18",
]

Format = Literal["auto", "posetrack17", "coco"]

_ANNOLIST_ID_STEP = 10**8


def load_annotations(
    path: str | os.PathLike[str],
    root: str | os.PathLike[str] = ".",
    format: Format = "auto",
    *,
    on_error: Literal["raise", "skip"] = "raise",
) -> list[Sequence]:
    """Reads a folder of per-sequence JSON files (in order of name), or one file.

    Args:
        path: the folder or file; a relative path starts at ``root``.
        root: the data set's folder.
        format: ``posetrack17`` expects annolist files, ``coco`` the rest; ``auto`` looks at the
            keys of each file.
        on_error: ``skip`` leaves broken annotations of single people out and counts them in
            ``Sequence.skipped``. A file that is broken as a whole raises in any case.

    Returns:
        Sequences with distinct ``file_stem``. Image ids are the files'; an annolist has none, so
        its frames get (position of the file, from 1)·10⁸ + frame number.

    Raises:
        FileNotFoundError: no such file or folder, or a folder without JSON files.
        AnnotationError: naming file, field and value.
    """
    path = Path(root) / path
    if path.is_dir():
        files = sorted(file for file in path.glob("*.json") if not file.name.startswith("."))
        if not files:
            raise FileNotFoundError(f"{path}: holds no *.json files, one a sequence is expected")
    elif path.is_file():
        files = [path]
    else:
        raise FileNotFoundError(
            f"{path}: no such file or folder; annotations are looked for below the root {root}"
        )
    sequences: list[Sequence] = []
    for position, file in enumerate(files, start=1):
        sequences += _read(file, format, position, skip=on_error == "skip")
    stems: dict[str, str] = {}
    for sequence in sequences:
        if sequence.file_stem in stems:
            raise AnnotationError(
                f"{sequence.source}: sequence {sequence.file_stem!r} is also in "
                f"{stems[sequence.file_stem]}; give each sequence once"
            )
        stems[sequence.file_stem] = sequence.source
        first = sequences[0]
        if sequence.skeleton != first.skeleton:
            raise AnnotationError(
                f"{sequence.source}: categories[*].keypoints: {listed(sequence.skeleton)}, but "
                f"{first.source} has {listed(first.skeleton)}; a data set has one skeleton (names, "
                "limbs, flip_pairs, halves)"
            )
    return sequences


def listed(skeleton: Skeleton) -> str:
    """A skeleton for messages: how many keypoints, and their first names."""
    names = ", ".join(skeleton.keypoints[:4]) + (", ..." if len(skeleton) > 4 else "")
    return f"{len(skeleton)} keypoints ({names})"


@no_collection()
def _read(file: Path, format: Format, position: int, *, skip: bool) -> list[Sequence]:
    parsed = parse_file(file, AnnotationError)
    if not isinstance(parsed, dict) or not ("annolist" in parsed or "images" in parsed):
        hint = " (a detection file belongs in data.boxes)" if isinstance(parsed, list) else ""
        raise AnnotationError(
            f"{file}: neither 'annolist' (PoseTrack17) nor 'images' (PoseTrack18, 21 and COCO "
            f"style) at the top: {short(parsed)}{hint}"
        )
    is_annolist = "annolist" in parsed
    if format != "auto" and is_annolist != (format == "posetrack17"):
        raise AnnotationError(
            f"{file}: format {format!r} was asked for, but the file holds "
            f"{'annolist' if is_annolist else 'images'!r}; use format 'auto'"
        )
    # With skip, people are checked one by one: a broken one does not break the file.
    kind: Any = PoseDocument[Image, Any, Any] if skip else PoseFile
    document = convert(parsed, kind, str(file), AnnotationError)
    if is_annolist:
        sequences = [read_annolist(document.annolist, str(file), file.stem, skip=skip)]
        for frame in sequences[0].frames:
            frame.image_id += position * _ANNOLIST_ID_STEP
    else:
        sequences = read_coco(document, str(file), file.stem, parsed["images"], skip=skip)
    for sequence in sequences:
        _check_frames(sequence)
    return sequences


def _check_frames(sequence: Sequence) -> None:
    """A frame number once a sequence, and no more frames than the file says there are."""
    name_of: dict[int, str] = {}
    for frame in sequence.frames:
        if frame.index in name_of:
            raise AnnotationError(
                f"{sequence.source}: file_name: frame {frame.index} of sequence {sequence.name} "
                f"occurs twice: {name_of[frame.index]} and {frame.file_name}"
            )
        name_of[frame.index] = frame.file_name
    if sequence.nframes is not None and len(sequence.frames) > sequence.nframes:
        raise AnnotationError(
            f"{sequence.source}: nframes: sequence {sequence.name} lists {len(sequence.frames)} "
            f"frames, more than its nframes {sequence.nframes}"
        )


def validate(
    sequences: Items[Sequence],
    *,
    expected_sequences: int | None = None,
    expected_frames: int | None = None,
) -> None:
    """Checks the size of a data set before hours are spent on the wrong version of it.

    PoseTrack18's validation set has 170 files in version 0.45 and 74 in version 0.2; AP on one
    says nothing about the other.

    Args:
        sequences: as loaded.
        expected_sequences: number of sequences there should be; None does not check.
        expected_frames: number of labelled frames there should be; None does not check.

    Raises:
        AnnotationError: with both numbers.
    """
    count = len(sequences)
    source = Path(sequences[0].source).parent if sequences else "annotations"
    if expected_sequences is not None and count != expected_sequences:
        hint = ""
        if {count, expected_sequences} == {74, 170}:
            hint = "; PoseTrack18's validation set has 170 files in version 0.45, 74 in version 0.2"
        raise AnnotationError(
            f"{source}: {count} sequences, but {expected_sequences} are expected{hint}"
        )
    labeled = sum(frame.labeled for sequence in sequences for frame in sequence.frames)
    if expected_frames is not None and labeled != expected_frames:
        raise AnnotationError(
            f"{source}: {labeled} labelled frames, but {expected_frames} are expected"
        )


def describe(sequences: Iterable[Sequence]) -> str:
    """One line: sequences, frames, labelled frames, people, joints, and what was skipped."""
    sequences = list(sequences)
    frames = [frame for sequence in sequences for frame in sequence.frames]
    people = [person for frame in frames for person in frame.people]
    skipped = sum((sequence.skipped for sequence in sequences), start=Counter[str]())
    text = (
        f"{len(sequences)} sequences, {len(frames)} frames "
        f"({sum(frame.labeled for frame in frames)} labelled), {len(people)} people, "
        f"{sum(person.num_visible for person in people)} joints"
    )
    for reason, count in sorted(skipped.items()):
        text += f"; skipped {count}: {reason}"
    return text
