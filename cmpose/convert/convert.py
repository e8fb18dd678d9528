"""Own data → the layout of PoseTrack18: frames in numbered folders, one JSON a sequence, a report.

``docs/own_data.md`` leads through it; what is checked and what is counted stands there.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path, PurePosixPath

import numpy as np

from cmpose.convert.boxes import OwnBoxes
from cmpose.convert.options import ConvertOptions, Format
from cmpose.convert.people import People
from cmpose.convert.report import Report
from cmpose.convert.sources import (
    Draft,
    read_coco_drafts,
    read_csv_drafts,
    to_posetrack,
)
from cmpose.data.formats.posetrack import load_annotations, write_posetrack18
from cmpose.data.formats.reader import parse_file, short
from cmpose.data.formats.skeleton import read_skeleton
from cmpose.data.frames import FrameError, FrameFolder, picture_size
from cmpose.data.sequence import (
    AnnotationError,
    Frame,
    Sequence,
    split_frame_name,
)
from cmpose.data.skeleton import POSETRACK, Skeleton

_CSV_ID_STEP = 10**8


def convert(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    images: str | os.PathLike[str],
    options: ConvertOptions | None = None,
) -> Report:
    """Converts a source into ``out``.

    Writes ``images/SPLIT/NAME/000000.jpg`` on, ``annotations/SPLIT/NAME.json`` (each atomically and
    after its pictures), ``annotations/SPLIT_boxes.json`` with ``options.boxes``, and
    ``SPLIT_report.json`` and ``.txt``.

    Args:
        source: a COCO or CSV file, an annolist file, or a folder of those.
        out: the data set's root; other splits in it stay.
        images: folder that the source's file names are relative to.
        options: see there.

    Raises:
        AnnotationError: naming file, field, value and what to do.
        FileNotFoundError, FileExistsError: of source, images or annotations.
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
    if not options.overwrite and any(annotations.glob("*.json")):
        raise FileExistsError(
            f"{annotations} already has annotations: give another --split or folder, or "
            "--overwrite to replace them"
        )
    report = Report(options.on_error)
    format = _format(source, options.format)
    drafts, skeleton = _read(source, format, options, report)
    converter = _Converter(out, images, options, report, skeleton, keep_ids=format != "csv")
    sequences = converter.sequences(drafts)
    if not sequences:
        raise AnnotationError(f"{source}: nothing to convert: {report.text()}")
    if options.overwrite and annotations.is_dir():
        for old in annotations.glob("*.json"):
            old.unlink()
    for sequence in sequences:
        write_posetrack18(annotations / f"{sequence.file_stem}.json", sequence)
    if converter.boxes is not None:
        converter.boxes.write(out / "annotations" / f"{options.split}_boxes.json", report)
    _finish(out, source, format, sequences, skeleton, options, report)
    return report


def _format(source: Path, asked: Format) -> Format:
    if asked != "auto":
        return asked
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
    source: Path, format: Format, options: ConvertOptions, report: Report
) -> tuple[list[Draft], Skeleton]:
    given = read_skeleton(Path(options.skeleton)) if options.skeleton else None
    if format == "posetrack17":
        return _annolist_drafts(source, options, report), POSETRACK
    if format == "csv":
        drafts, skeleton = read_csv_drafts(source, report, given)
    else:
        drafts, skeleton = read_coco_drafts(source, report, options.category, given)
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


def _annolist_drafts(source: Path, options: ConvertOptions, report: Report) -> list[Draft]:
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
            )
            for frame in sequence.frames
        ]
    return drafts


class _Converter:
    """Finds the pictures, groups them into sequences, checks people, and places the pictures."""

    def __init__(
        self,
        out: Path,
        images: Path,
        options: ConvertOptions,
        report: Report,
        skeleton: Skeleton,
        *,
        keep_ids: bool,
    ) -> None:
        self.out, self.images, self.options, self.report = out, images, options, report
        self.skeleton, self.keep_ids = skeleton, keep_ids
        self.folders: dict[Path, FrameFolder] = {}
        self.names: set[str] = set()
        self.ids = 0
        self.boxes = OwnBoxes(Path(options.boxes)) if options.boxes else None
        self.people = People(report, skeleton, self.boxes)

    def folder(self, path: Path) -> FrameFolder:
        if path not in self.folders:
            self.folders[path] = FrameFolder(path)
        return self.folders[path]

    def sequences(self, drafts: list[Draft]) -> list[Sequence]:
        """All of them, in order of their first picture; their pictures are in place."""
        groups: dict[tuple[str, str, str, str], list[tuple[Draft, Path]]] = {}
        for draft in drafts:
            file = self._find(draft)
            if file is None:
                continue
            prefix, _, suffix = split_frame_name(file.name) or (file.stem, "", file.suffix)
            key = (str(file.parent), draft.video, prefix, suffix)
            groups.setdefault(key, []).append((draft, file))
        self._check_groups(list(groups))
        found: list[Sequence] = []
        for (_, video, _, _), members in groups.items():
            if self._is_video(members):
                found += self._video(video, members)
            else:
                self.report.facts["stills"] = self.report.facts.get("stills", 0) + len(members)
                for draft, file in members:
                    found += self._sequence(self._name(file.stem, file), [(0, file)], {file: draft})
        return found

    # --- which pictures ---------------------------------------------------------------------

    def _find(self, draft: Draft) -> Path | None:
        if not draft.file_name or self._by_number(draft):
            return self._find_number(draft)
        for path in (
            self.images / draft.file_name,
            self.images / PurePosixPath(draft.file_name).name,
        ):
            if path.name in self.folder(path.parent).names:
                return path
        self.report.error(
            "picture missing",
            f"{draft.where}: {draft.file_name!r} is not below {self.images}; is --images the "
            "folder that file names start from?",
        )
        return None

    def _by_number(self, draft: Draft) -> bool:
        """A CSV's frame number: the file name is only the folder's."""
        return draft.number is not None and draft.file_name == draft.video and not self.keep_ids

    def _find_number(self, draft: Draft) -> Path | None:
        folder = self.folder(self.images / draft.file_name)
        matches = []
        for name in sorted(folder.names):
            parts = split_frame_name(name)
            if parts is not None and int(parts[1]) == draft.number and name[0] != ".":
                matches.append(name)
        matches = [name for name in matches if Path(name).suffix.lower() in _PICTURES]
        if len(matches) == 1:
            return folder.path / matches[0]
        self.report.error(
            "picture missing",
            f"{draft.where}: frame: {folder.path} has {len(matches)} pictures of number "
            f"{draft.number}; one is expected (--images)",
        )
        return None

    def _check_groups(self, keys: list[tuple[str, str, str, str]]) -> None:
        """A video that the source names lies in one folder, under names that differ in number."""
        seen: Counter[str] = Counter(video for _, video, _, _ in keys if video)
        for video, count in seen.items():
            if count > 1:
                raise AnnotationError(
                    f"video {video!r}: its pictures lie in {count} folders, or their names differ "
                    "in more than the number; give each video one folder of numbered pictures"
                )

    def _is_video(self, members: list[tuple[Draft, Path]]) -> bool:
        draft, file = members[0]
        if split_frame_name(file.name) is None:
            return False
        if self.options.group != "auto":
            return self.options.group == "video"
        by_number = draft.number is not None
        if by_number or draft.video or any(p.track_id >= 0 for d, _ in members for p in d.people):
            return True
        steps = np.diff(sorted(self.folder(file.parent).like(file.name)))
        return len(steps) >= 2 and 2 * int((steps == steps.min()).sum()) > len(steps)

    # --- sequences --------------------------------------------------------------------------

    def _video(self, video: str, members: list[tuple[Draft, Path]]) -> list[Sequence]:
        """A folder's numbered pictures; a new sequence begins where numbers jump."""
        first = members[0][1]
        numbered = self.folder(first.parent).like(first.name)
        listed: dict[Path, Draft] = {}
        for draft, file in members:
            if file in listed:
                raise AnnotationError(
                    f"{draft.where}: {file.name} is also at {listed[file].where}; list each "
                    "picture once"
                )
            listed[file] = draft
        numbers = sorted(numbered)
        steps = np.diff(numbers)
        step = int(steps.min()) if len(steps) else 1
        pieces: list[list[int]] = [[numbers[0]]]
        for before, number in pairwise(numbers):
            if number - before > step:
                pieces.append([])
            pieces[-1].append(number)
        runs = [[(n, first.parent / numbered[n]) for n in piece] for piece in pieces]
        runs = [run for run in runs if any(file in listed for _, file in run)]
        if len(runs) > 1:
            for run in runs[1:]:
                self.report.warn("numbers of pictures jump: a new sequence begins", str(run[0][1]))
        inside = first.parent == self.images
        base = video or (self.options.name or self.images.name if inside else first.parent.name)
        base = self._name(base, first)
        self.people.check_tracks(
            base, [listed[file] for run in runs for _, file in run if file in listed]
        )
        found = []
        for position, run in enumerate(runs, start=1):
            name = base if position == 1 else self._name(f"{base}_{position}", first)
            placed = [(index, file) for index, (_, file) in enumerate(run)]
            found += self._sequence(name, placed, listed)
        return found

    def _name(self, wanted: str, file: Path) -> str:
        """A name for a sequence that no other has, of letters, digits, _ and -."""
        candidates = [wanted, f"{file.parent.name}_{wanted}"]
        candidates += [f"{wanted}_{n}" for n in range(2, 2 + len(self.names))]
        for candidate in candidates:
            name = re.sub(r"[^\w-]+", "_", candidate).strip("_") or "sequence"
            if name not in self.names:
                self.names.add(name)
                return name
        raise AssertionError("unreachable: more candidates than names")

    def _sequence(
        self, name: str, files: list[tuple[int, Path]], listed: Mapping[Path, Draft]
    ) -> list[Sequence]:
        """Places the pictures and describes the listed ones; empty if none is usable."""
        folder = f"images/{self.options.split}/{name}"
        sequence = Sequence(
            name, name, frames=[], nframes=len(files), source=name, skeleton=self.skeleton
        )
        sizes: dict[tuple[int, int], Path] = {}
        self.ids += 1
        for index, file in files:
            draft = listed.get(file)
            try:
                size = picture_size(file)
            except FrameError as error:
                if draft is None:
                    raise AnnotationError(f"{error}; it is a neighbour in {name}") from error
                self.report.error("picture unreadable", str(error))
                return []
            sizes.setdefault(size, file)
            if len(sizes) > 1:
                (a, first), (b, other) = list(sizes.items())[:2]
                raise AnnotationError(
                    f"{other}: is {b[0]}×{b[1]} pixels, {first.name} of the same sequence "
                    f"{a[0]}×{a[1]}; frames of a video have one size: --group still if it is none"
                )
            if draft is not None:
                number = index + self.ids * _CSV_ID_STEP
                frame = Frame(
                    image_id=draft.image_id if self.keep_ids else number,
                    file_name=f"{folder}/{index:06d}{file.suffix.lower()}",
                    index=index,
                    width=size[0],
                    height=size[1],
                    extra={"source": draft.file_name if draft.number is None else file.name},
                )
                self.people.fill(draft, frame, file)
                sequence.frames.append(frame)
        target = self.out / folder
        placed = {f"{index:06d}{file.suffix.lower()}": file for index, file in files}
        here = target.resolve() == files[0][1].parent.resolve()
        if here and any(name != file.name for name, file in placed.items()):
            raise AnnotationError(
                f"{target}: the pictures already lie where they are to be written, under other "
                "numbers; move them and name their folder with --images"
            )
        for name, file in placed.items():
            self._place(file, target / name)
        if self.options.overwrite and not here:
            for stale in target.iterdir():  # it would pass for a neighbour
                if stale.name not in placed:
                    stale.unlink()
        return [sequence]

    def _place(self, file: Path, target: Path) -> None:
        """The picture at its place, whole or not at all; one that is there already is kept."""
        stat = file.stat()
        if target.is_file():
            there = target.stat()
            if (there.st_size, there.st_mtime_ns) == (stat.st_size, stat.st_mtime_ns):
                return
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            if self.options.place == "link":
                partial.symlink_to(file.resolve())
            else:
                shutil.copy2(file, partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


_PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


def _finish(
    out: Path,
    source: Path,
    format: Format,
    sequences: list[Sequence],
    skeleton: Skeleton,
    options: ConvertOptions,
    report: Report,
) -> None:
    """The facts of the report, and its files."""
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
    for suffix, text in (
        ("json", json.dumps(report.to_json(), indent=1) + "\n"),
        ("txt", report.text()),
    ):
        path = out / f"{options.split}_report.{suffix}"
        partial = path.with_name(f".{path.name}.tmp")
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
