"""Which pictures of a conversion make a video, and which stand alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cmpose.convert.options import ConvertOptions
from cmpose.convert.people import People
from cmpose.convert.pictures import SourcePictures
from cmpose.convert.report import Report
from cmpose.convert.sources import Draft
from cmpose.data.sequence import AnnotationError, split_frame_name


class PictureSequence(NamedTuple):
    """The pictures of a sequence, before they are described.

    Attributes:
        name: of letters, digits, _ and -; no other sequence has it.
        pictures: in order.
        drafts: picture → what the source says of it; neighbours that it does not list have none.
    """

    name: str
    pictures: list[Path]
    drafts: Mapping[Path, Draft]


class Grouping:
    """Puts the pictures of drafts into sequences.

    Args:
        pictures: finds them.
        options: ``group`` and ``name``.
        report: is told where numbers jump, and how many pictures stand alone.
        people: checks tracks along a video.
    """

    def __init__(
        self, pictures: SourcePictures, options: ConvertOptions, report: Report, people: People
    ) -> None:
        self.pictures, self.options, self.report, self.people = pictures, options, report, people
        self._names: set[str] = set()

    def sequences(self, drafts: list[Draft]) -> list[PictureSequence]:
        """All sequences, in order of their first draft.

        Raises:
            AnnotationError: a picture is missing or listed twice, or a video's pictures lie in
                several folders.
        """
        groups: dict[tuple[str, str, str, str], list[tuple[Draft, Path]]] = {}
        for draft in drafts:
            picture = self.pictures.find(draft)
            if picture is None:
                continue
            prefix, _, suffix = split_frame_name(picture.name) or (
                picture.stem,
                "",
                picture.suffix,
            )
            key = (str(picture.parent), draft.video, prefix, suffix)
            groups.setdefault(key, []).append((draft, picture))
        _check_videos([video for _, video, _, _ in groups if video])
        sequences: list[PictureSequence] = []
        for (_, video, _, _), members in groups.items():
            if self._is_video(members):
                sequences += self._video(video, members)
            else:
                self.report.facts["stills"] = self.report.facts.get("stills", 0) + len(members)
                for draft, picture in members:
                    name = self._name(picture.stem, picture)
                    sequences.append(PictureSequence(name, [picture], {picture: draft}))
        return sequences

    def _is_video(self, members: list[tuple[Draft, Path]]) -> bool:
        draft, picture = members[0]
        if split_frame_name(picture.name) is None:
            return False
        if self.options.group != "auto":
            return self.options.group == "video"
        by_number = draft.number is not None
        if by_number or draft.video or any(p.track_id >= 0 for d, _ in members for p in d.people):
            return True
        steps = np.diff(sorted(self.pictures.folder(picture.parent).like(picture.name)))
        return len(steps) >= 2 and 2 * int((steps == steps.min()).sum()) > len(steps)

    def _video(self, video: str, members: list[tuple[Draft, Path]]) -> list[PictureSequence]:
        """A folder's numbered pictures; a new sequence begins where numbers jump."""
        first = members[0][1]
        drafts: dict[Path, Draft] = {}
        for draft, picture in members:
            if picture in drafts:
                raise AnnotationError(
                    f"{draft.where}: {picture.name} is also at {drafts[picture].where}; list each "
                    "picture once"
                )
            drafts[picture] = draft
        runs = [run for run in self._runs(first) if any(picture in drafts for picture in run)]
        for run in runs[1:]:
            self.report.warn("numbers of pictures jump: a new sequence begins", str(run[0]))
        inside = first.parent == self.pictures.images
        own_name = self.options.name or self.pictures.images.name
        base = self._name(video or (own_name if inside else first.parent.name), first)
        self.people.check_tracks(
            base, [drafts[picture] for run in runs for picture in run if picture in drafts]
        )
        names = [base, *(f"{base}_{position}" for position in range(2, len(runs) + 1))]
        return [
            PictureSequence(name if name == base else self._name(name, first), run, drafts)
            for name, run in zip(names, runs, strict=True)
        ]

    def _runs(self, picture: Path) -> list[list[Path]]:
        """The pictures of a folder that differ from ``picture`` in the number, cut at jumps."""
        numbered = self.pictures.folder(picture.parent).like(picture.name)
        numbers = sorted(numbered)
        steps = np.diff(numbers)
        step = int(steps.min()) if len(steps) else 1
        runs = [[picture.parent / numbered[numbers[0]]]]
        for before, number in pairwise(numbers):
            if number - before > step:
                runs.append([])
            runs[-1].append(picture.parent / numbered[number])
        return runs

    def _name(self, wanted: str, picture: Path) -> str:
        """A name for a sequence that no other has, of letters, digits, _ and -."""
        candidates = [wanted, f"{picture.parent.name}_{wanted}"]
        candidates += [f"{wanted}_{n}" for n in range(2, 2 + len(self._names))]
        for candidate in candidates:
            name = re.sub(r"[^\w-]+", "_", candidate).strip("_") or "sequence"
            if name not in self._names:
                self._names.add(name)
                return name
        raise AssertionError("unreachable: more candidates than names")


def _check_videos(videos: list[str]) -> None:
    """A video that the source names lies in one folder, under names that differ in number."""
    for video, count in Counter(videos).items():
        if count > 1:
            raise AnnotationError(
                f"video {video!r}: its pictures lie in {count} folders, or their names differ "
                "in more than the number; give each video one folder of numbered pictures"
            )
