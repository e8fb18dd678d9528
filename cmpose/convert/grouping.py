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
from cmpose.convert.report import ConvertReport
from cmpose.convert.sources import Draft
from cmpose.data.sequence import AnnotationError


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
        self,
        pictures: SourcePictures,
        options: ConvertOptions,
        report: ConvertReport,
        people: People,
    ) -> None:
        self.pictures, self.options, self.report, self.people = pictures, options, report, people
        self._names: set[str] = set()

    def sequences(self, drafts: list[Draft]) -> list[PictureSequence]:
        """All sequences, in order of their first draft.

        Raises:
            AnnotationError: a picture is missing or listed twice, or a video's pictures lie in
                several folders.
        """
        groups: dict[tuple[Path, str, tuple[str, str]], list[tuple[Draft, Path]]] = {}
        for draft in drafts:
            picture = self.pictures.find(draft)
            if picture is None:
                continue
            name = self.pictures.frame_name(picture)
            texts = (picture.stem, picture.suffix) if name is None else name.video
            groups.setdefault((picture.parent, draft.video, texts), []).append((draft, picture))
        if self.options.group != "still":
            _check_videos([video for _, video, _ in groups if video])
        sequences: list[PictureSequence] = []
        alone: dict[Path, list[Path]] = {}
        with_videos: set[Path] = set()
        for (folder, video, _), members in groups.items():
            says_video = self._says_video(members)
            of_video = self._video(video, members) if self._is_video(members, says_video) else []
            if says_video and not video:
                if any(len(sequence.pictures) > 1 for sequence in of_video):
                    with_videos.add(folder)
                alone.setdefault(folder, []).extend(picture for _, picture in members)
            sequences += of_video
            if not of_video:
                self.report.facts["stills"] = self.report.facts.get("stills", 0) + len(members)
                for draft, picture in members:
                    name_of_still = self._name(picture.stem, picture)
                    sequences.append(PictureSequence(name_of_still, [picture], {picture: draft}))
        for folder in alone.keys() - with_videos:
            _check_alone(folder, alone[folder])
        return sequences

    def _says_video(self, members: list[tuple[Draft, Path]]) -> bool:
        """Whether the user or the source says that these pictures are frames of a video."""
        if self.options.group != "auto":
            return self.options.group == "video"
        draft = members[0][0]
        tracked = any(person.track_id >= 0 for d, _ in members for person in d.people)
        return tracked or draft.number is not None or bool(draft.video)

    def _is_video(self, members: list[tuple[Draft, Path]], says_video: bool) -> bool:
        picture = members[0][1]
        if self.options.group == "still" or self.pictures.frame_name(picture) is None:
            return False
        if says_video:
            return True
        steps = np.diff(sorted(self.pictures.video(picture)))
        return len(steps) >= 2 and 2 * int((steps == steps.min()).sum()) > len(steps)

    def _video(self, video: str, members: list[tuple[Draft, Path]]) -> list[PictureSequence]:
        """A folder's numbered pictures; a new sequence begins where numbers jump."""
        first = members[0][1]
        drafts = {picture: draft for draft, picture in members}
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
        numbered = self.pictures.video(picture)
        numbers = sorted(numbered)
        steps = np.diff(numbers)
        step = int(steps.min()) if len(steps) else 1
        runs = [[numbered[numbers[0]]]]
        for before, number in pairwise(numbers):
            if number - before > step:
                runs.append([])
            runs[-1].append(numbered[number])
        return runs

    def _name(self, preferred: str, picture: Path) -> str:
        """A name for a sequence that no other has, of letters, digits, _ and -."""
        candidates = [preferred, f"{picture.parent.name}_{preferred}"]
        candidates += [f"{preferred}_{n}" for n in range(2, 2 + len(self._names))]
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


def _check_alone(folder: Path, pictures: list[Path]) -> None:
    """Pictures that are said to be of a video do not all come out as videos of one frame.

    The model would see one frame T times over.
    """
    if len(pictures) > 1:
        raise AnnotationError(
            f"{folder}: {len(pictures)} pictures are frames of a video by their track ids or by "
            "--group video, but each would be a video of one frame, as their names differ in more "
            f"than a number, e.g. {pictures[0].name} and {pictures[1].name}; name frames so that "
            "they differ in the number alone (000000.jpg), or give --group still if they are no "
            "video"
        )
