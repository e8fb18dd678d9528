"""Own data → the layout of PoseTrack18: frames in numbered folders, one JSON a sequence, a report.

``docs/own_data.md`` leads through it; what is checked and what is counted stands there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cmpose.convert.boxes import OwnBoxes
from cmpose.convert.describe import Describer
from cmpose.convert.grouping import Grouping
from cmpose.convert.options import ConvertOptions, Format
from cmpose.convert.people import People
from cmpose.convert.pictures import SourcePictures, place_pictures, placed_name
from cmpose.convert.report import ConvertReport
from cmpose.convert.sources import (
    Draft,
    check_pixels,
    read_coco_drafts,
    to_posetrack,
)
from cmpose.convert.table import read_csv_drafts
from cmpose.convert.written import WrittenFiles, report_path
from cmpose.data.formats.messages import short
from cmpose.data.formats.posetrack import load_annotations, write_posetrack18
from cmpose.data.formats.reader import parse_file
from cmpose.data.formats.skeleton import read_skeleton
from cmpose.data.sequence import AnnotationError, Sequence
from cmpose.data.skeleton import POSETRACK, Skeleton
from cmpose.files import (
    claim_file,
    partial_path,
    recover,
    remove,
    whole_folder,
    write_text,
    writing,
)


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    images: str | os.PathLike[str],
    options: ConvertOptions | None = None,
) -> ConvertReport:
    """Converts a source into ``out``.

    Writes ``images/SPLIT/NAME/000000.jpg`` and so on, ``annotations/SPLIT/NAME.json``,
    ``annotations/SPLIT_boxes.json`` with ``options.boxes``, and ``SPLIT_report.json`` and ``.txt``;
    each file whole or not at all, annotations after all pictures, the report last. It lists the
    files that were written. Only what an earlier report lists is replaced and removed.

    Args:
        source: a COCO or CSV file, an annolist file, or a folder of those.
        out: the data set's root; other splits in it stay.
        images: folder that the source's file names are relative to.
        options: see there.

    Raises:
        AnnotationError: naming file, field, value and what to do.
        FileNotFoundError, FileExistsError: of source, images or annotations; or a file is in the
            way that no earlier conversion wrote.
        InUse: another process is converting into this split.
        OutputError: the disk is full, and the like.
    """
    options = options or ConvertOptions()
    source, out, images = Path(source), Path(out), Path(images)
    if not source.exists():
        raise FileNotFoundError(f"{source}: no such file or folder")
    if not images.is_dir():
        raise FileNotFoundError(
            f"{images}: no such folder (--images); name the folder that the source's file names "
            "start from; cmpose frames makes one of a video"
        )
    if not re.fullmatch(r"[\w-]+", options.split):
        raise ValueError(f"split: {options.split!r} is no folder name of letters, digits, _ and -")
    annotations = out / "annotations" / options.split
    _check_free(annotations, options)
    report = ConvertReport(options.on_error)
    format = _format(source, options.format)
    drafts, skeleton = _read(source, format, options, report)
    check_pixels(drafts, source)
    keep_ids = format != "csv"
    boxes = OwnBoxes(Path(options.boxes), report) if options.boxes else None
    people = People(report, skeleton, boxes)
    pictures = SourcePictures(images, report, numbered=not keep_ids, outside=options.outside)
    describer = Describer(options, skeleton, people, report, keep_ids=keep_ids)
    sequences: list[tuple[Sequence, list[Path]]] = []
    for position, group in enumerate(
        Grouping(pictures, options, report, people).sequences(drafts), start=1
    ):
        sequence = describer.sequence(group, position)
        if sequence is not None:
            sequences.append((sequence, group.pictures))
    if boxes is not None:
        boxes.check()
    if not any(frame.people for sequence, _ in sequences for frame in sequence.frames):
        raise AnnotationError(f"{source}: nobody to convert; {report.reasons()}")
    # The lock of a split: another one's files have other names.
    with claim_file(report_path(out, options.split), "convert", "--split or folder"):
        _check_free(annotations, options)
        _recover(out, options.split)
        _write(out, source, format, sequences, boxes, options, report)
    return report


# Many parameters: what was read, and where to write it.
def _write(
    out: Path,
    source: Path,
    format: Format,
    sequences: list[tuple[Sequence, list[Path]]],
    boxes: OwnBoxes | None,
    options: ConvertOptions,
    report: ConvertReport,
) -> None:
    """Writes a split: pictures, annotations, and last the report, which says that it is whole."""
    split = options.split
    written = WrittenFiles(out, split)
    planned: dict[str, Path | None] = {f"{split}_report.txt": None}
    for sequence, paths in sequences:
        folder = f"images/{split}/{sequence.name}"
        planned |= {f"{folder}/{placed_name(i, path)}": path for i, path in enumerate(paths)}
        planned[f"annotations/{split}/{sequence.file_stem}.json"] = None
    if boxes is not None:
        planned[f"annotations/{_box_file(split)}"] = None
    annotations = out / "annotations" / split
    written.begin(planned, annotations=any(annotations.glob("*.json")))
    if options.place == "copy":
        written.remove_links(planned)
    for sequence, paths in sequences:
        place_pictures(paths, out / "images" / split / sequence.name, options.place)
    written.remove_stale(report, [path for _, paths in sequences for path in paths])
    if boxes is not None:
        boxes.write(out / "annotations" / _box_file(split))
    described = [sequence for sequence, _ in sequences]
    _write_annotations(annotations, described, written)
    written.warn_of_others(report)
    report.files = sorted(written.now)
    _write_report(out, source, format, described, options, report)


def _check_free(annotations: Path, options: ConvertOptions) -> None:
    """Raises FileExistsError if there are annotations that may not be replaced."""
    if options.overwrite or not any(annotations.glob("*.json")):
        return
    if not WrittenFiles(annotations.parent.parent, options.split).unfinished:
        raise FileExistsError(
            f"{annotations} already has annotations: give another --split or folder, or "
            "--overwrite to replace them"
        )


def _box_file(split: str) -> str:
    return f"{split}_boxes.json"


def _recover(out: Path, split: str) -> None:
    """Removes what a killed conversion of this split left of its files."""
    with writing(out):
        for folder in (out / "annotations" / split, *(out / "images" / split).glob("*")):
            recover(folder)
        remove(partial_path(out / "annotations" / _box_file(split)))


def _write_annotations(annotations: Path, sequences: list[Sequence], written: WrittenFiles) -> None:
    """Writes a split's annotations all at once, after its pictures.

    So a split that has annotations has its pictures. Of other files in their folder those stay
    that no earlier conversion wrote.
    """

    def is_ours(path: Path) -> bool:
        return written.is_ours(f"annotations/{written.split}/{path.name}")

    with whole_folder(annotations, is_ours=is_ours) as partial:
        for sequence in sequences:
            write_posetrack18(partial / f"{sequence.file_stem}.json", sequence)


def _format(source: Path, requested: Format) -> Format:
    if requested != "auto":
        return requested
    if source.is_dir():
        return "posetrack17"
    if source.suffix.lower() == ".csv":
        return "csv"
    data = parse_file(source, AnnotationError)
    if isinstance(data, Mapping) and "annolist" in data:
        return "posetrack17"
    if isinstance(data, Mapping) and "images" in data:
        return "coco"
    raise AnnotationError(
        f"{source}: neither 'images' (COCO) nor 'annolist' (PoseTrack17) at the top: "
        f"{short(data)}; a CSV's name ends in .csv"
    )


def _read(
    source: Path, format: Format, options: ConvertOptions, report: ConvertReport
) -> tuple[list[Draft], Skeleton]:
    own_skeleton = read_skeleton(Path(options.skeleton)) if options.skeleton else None
    if format == "posetrack17":
        return _annolist_drafts(source, options, report), POSETRACK
    if format == "csv":
        drafts, skeleton = read_csv_drafts(source, report, own_skeleton)
    else:
        drafts, skeleton = read_coco_drafts(source, report, options.category, own_skeleton)
    if not drafts:
        raise AnnotationError(f"{source}: lists no picture")
    if options.to == "posetrack":
        to_posetrack(drafts, skeleton, report)
        return drafts, POSETRACK
    for name in skeleton.unpaired:
        report.warn(
            "keypoint of a side without a partner: mirroring would teach it wrongly; name the "
            "partner in flip_pairs, or train with data.augment.flip=0 and data.flip_test=false",
            name,
        )
    return drafts, skeleton


def _annolist_drafts(source: Path, options: ConvertOptions, report: ConvertReport) -> list[Draft]:
    drafts = []
    for sequence in load_annotations(
        source.resolve(), format="posetrack17", on_error=options.on_error
    ):
        for reason, count in sequence.skipped.items():
            for _ in range(count):
                report.leave_out(reason, sequence.source)
        drafts += [
            Draft(
                frame.file_name,
                f"{sequence.source}: frame {frame.index}",
                image_id=frame.image_id,
                video=sequence.name,
                people=frame.people,
                regions=frame.ignore_regions,
                labeled=frame.labeled,
                boxes_are_made=True,
            )
            for frame in sequence.frames
        ]
    return drafts


def _write_report(
    out: Path,
    source: Path,
    format: Format,
    sequences: list[Sequence],
    options: ConvertOptions,
    report: ConvertReport,
) -> None:
    """Fills in the facts of the report and writes its files."""
    skeleton = sequences[0].skeleton
    frames = [frame for sequence in sequences for frame in sequence.frames]
    people = [person for frame in frames for person in frame.people]
    visible = sum((p.keypoints[:, 2] > 0 for p in people), start=np.zeros(len(skeleton), int))
    names = skeleton.keypoints
    for name, count in zip(names, visible, strict=True):
        if count == 0 and options.to == "own" and format != "posetrack17":
            report.warn("keypoint that nobody has annotated", name)
    report.facts = {
        "source": source.name,
        "format": format,
        "sequences": len(sequences),
        "of_them_single_pictures": report.facts.get("stills", 0),
        "listed_frames": len(frames),
        "labelled_frames": sum(frame.labeled for frame in frames),
        "people": len(people),
        "keypoints": {name: int(count) for name, count in zip(names, visible, strict=True)},
        "flip_pairs": [[names[a], names[b]] for a, b in skeleton.flip_pairs],
        "limbs": len(skeleton.limbs),
    }
    path = report_path(out, options.split)
    write_text(path.with_suffix(".txt"), report.text())
    write_text(path, json.dumps(report.to_json(), indent=1) + "\n")
