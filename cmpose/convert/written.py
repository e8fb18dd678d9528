"""The files that conversions have written into a split: listed in its report, alone replaceable."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from msgspec import Struct

from cmpose.convert.report import ConvertReport
from cmpose.data.formats.reader import read
from cmpose.data.sequence import AnnotationError
from cmpose.files import write_text, writing


class EarlierReport(Struct):
    """What a later conversion needs of ``SPLIT_report.json``.

    Attributes:
        files: written, relative to the data set's root.
        unfinished: the conversion was killed, and there were no annotations before it.
        left_out: which reports have that list no files, those of earlier versions.
    """

    files: list[str] | None = None
    unfinished: bool = False
    left_out: Any = None


def report_path(out: Path, split: str) -> Path:
    """The report of a split's conversion, as JSON; ``.txt`` beside it is the same for people."""
    return out / f"{split}_report.json"


class WrittenFiles:
    """What may be replaced and removed in a split, and what a conversion writes there.

    Before the first file the list is written, so that a conversion which is called again after
    a kill knows its own. Paths are relative to the root, with ``/``.

    Args:
        out: the data set's root.
        split: the folder of its pictures and annotations.

    Raises:
        AnnotationError: the split's report is damaged, or lists what no conversion writes.
        FileExistsError: there is a link, or another file, in its place.
    """

    def __init__(self, out: Path, split: str) -> None:
        self.out, self.split = out, split
        self.earlier: frozenset[str] = frozenset()
        self.unfinished = False
        self.now: frozenset[str] = frozenset()
        report = report_path(out, split)
        if os.path.lexists(report):
            remedy = "mend it, or move it away: then nothing that is there is replaced"
            earlier = EarlierReport()
            if not report.is_symlink():
                earlier = read(report, EarlierReport, AnnotationError, remedy)
            if earlier.files is None and earlier.left_out is None:
                raise FileExistsError(
                    f"{report}: is there already and is no report of a conversion, or a link: move "
                    "it, or give another --split or folder"
                )
            files = earlier.files or []
            for number, file in enumerate(files):
                if not self._is_of_split(file):
                    raise AnnotationError(
                        f"{report}: files[{number}]: {file!r} is no file that a conversion of "
                        f"{split!r} writes; {remedy}"
                    )
            self.earlier, self.unfinished = frozenset(files), earlier.unfinished

    def _is_of_split(self, file: str) -> bool:
        if file in self._single:
            return True
        *folders, name = file.split("/")
        stem, _, suffix = name.rpartition(".")
        inside = not {"", ".", ".."} & set(folders) and "\0" not in file
        if folders[:2] == ["annotations", self.split]:
            return inside and bool(stem) and suffix == "json"
        return inside and folders[:2] == ["images", self.split] and stem.isdecimal()

    @property
    def _single(self) -> tuple[str, str]:
        return f"annotations/{self.split}_boxes.json", f"{self.split}_report.txt"

    def is_ours(self, file: str) -> bool:
        """Whether an earlier conversion wrote a file: not if a link leads to it by now."""
        return file in self.earlier and not self._behind_link(file)

    def _behind_link(self, file: str) -> bool:
        return _place_of(self.out / file) != os.path.join(os.path.realpath(self.out), file)

    def begin(self, planned: Mapping[str, Path | None], *, annotations: bool) -> None:
        """Checks that nobody else's file is replaced, and writes the list.

        Args:
            planned: what will be written → the picture that is copied or linked, if it is one.
            annotations: whether the split has annotations.

        Raises:
            FileExistsError: naming the first file that is there and of no earlier conversion.
        """
        present = {file for file in planned if os.path.lexists(self.out / file)}
        for file in sorted(present):
            if not self.is_ours(file) and not _is_copy(self.out / file, planned[file]):
                raise FileExistsError(
                    f"{self.out / file}: is there already and would be replaced, but the report of "
                    "the split lists no such file, or a link leads there: move it, or give another "
                    "--split or folder"
                )
        self.now = frozenset(
            file for file in planned if file in self.earlier or file not in present
        )
        self.unfinished = self.unfinished or not annotations
        begun = {"unfinished": self.unfinished, "files": sorted(self.earlier | self.now)}
        write_text(report_path(self.out, self.split), json.dumps(begun, indent=1) + "\n")

    def remove_links(self, planned: Mapping[str, Path | None]) -> None:
        """Removes links to pictures that an earlier conversion made, so that copies replace them.

        Args:
            planned: as in :meth:`begin`. A link that is itself the source's picture stays.
        """
        sources = {_place_of(picture) for picture in planned.values() if picture is not None}
        for file, picture in planned.items():
            path = self.out / file
            if picture is None or not path.is_symlink() or _place_of(path) in sources:
                continue
            if self.is_ours(file):
                with writing(path):
                    path.unlink()

    def remove_stale(self, report: ConvertReport, pictures: Iterable[Path]) -> None:
        """Removes what an earlier conversion wrote and this one does not.

        Annotations are not among it: their folder is replaced as a whole.

        Args:
            report: is warned of what stays.
            pictures: the source's, which may lie in the data set.
        """
        sources = {_place_of(picture) for picture in pictures}
        for file in sorted(self.earlier - self.now):
            path = self.out / file
            if file.startswith(f"annotations/{self.split}/") or not os.path.lexists(path):
                continue
            if not self.is_ours(file) or _place_of(path) in sources:
                report.warn("file of an earlier conversion, now linked or a source: it stays", file)
            elif path.is_symlink() or not path.is_dir():
                with writing(path):
                    path.unlink()
                with suppress(OSError):  # there is more in it
                    path.parent.rmdir()

    def warn_of_others(self, report: ConvertReport) -> None:
        """Warns of files among those of the split that no conversion wrote: they stay."""
        for folder in sorted({file.rpartition("/")[0] for file in self.now}):
            if folder.endswith(f"/{self.split}") or folder.startswith("images/"):
                for name in sorted(os.listdir(self.out / folder)):
                    if f"{folder}/{name}" not in self.now and name[0] != ".":
                        report.warn("file that no conversion wrote: it stays", f"{folder}/{name}")


def _place_of(path: Path) -> str:
    """Where a file lies, whatever links lead to its folder; of a link, where the link lies."""
    return os.path.join(os.path.realpath(path.parent), path.name)


def _is_copy(path: Path, picture: Path | None) -> bool:
    """Whether ``path`` is a picture that is to be placed there, or a copy of it."""
    if picture is None or not path.is_file():
        return False
    present, original = path.stat(), picture.stat()
    return (present.st_size, present.st_mtime_ns) == (original.st_size, original.st_mtime_ns)
