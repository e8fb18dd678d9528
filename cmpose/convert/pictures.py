"""The pictures of a conversion: found where the source has them, and placed in the data set."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

from cmpose.convert.report import Report
from cmpose.convert.sources import Draft
from cmpose.data.frames import FrameFolder
from cmpose.data.pictures import is_picture
from cmpose.data.sequence import AnnotationError, split_frame_name
from cmpose.files import remove, whole_file, writing


class SourcePictures:
    """Finds the pictures of drafts; each folder is listed once.

    Args:
        images: folder that the source's file names are relative to.
        report: is told what is missing.
        numbered: a draft with a frame number names its folder only, as a CSV does.
    """

    def __init__(self, images: Path, report: Report, *, numbered: bool) -> None:
        self.images, self.report, self.numbered = images, report, numbered
        self._folders: dict[Path, FrameFolder] = {}

    def folder(self, path: Path) -> FrameFolder:
        """What lies in a folder."""
        if path not in self._folders:
            self._folders[path] = FrameFolder(path)
        return self._folders[path]

    def find(self, draft: Draft) -> Path | None:
        """A draft's picture; None if it is missing and the report's ``on_error`` is ``skip``.

        Raises:
            AnnotationError: it is missing.
        """
        names_its_folder = (
            self.numbered and draft.number is not None and draft.file_name == draft.video
        )
        if not draft.file_name or names_its_folder:
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

    def _find_number(self, draft: Draft) -> Path | None:
        folder = self.folder(self.images / draft.file_name)
        matches = []
        for name in sorted(folder.names):
            parts = split_frame_name(name)
            if parts is not None and int(parts[1]) == draft.number and is_picture(name):
                matches.append(name)
        if len(matches) == 1:
            return folder.path / matches[0]
        self.report.error(
            "picture missing",
            f"{draft.where}: frame: {folder.path} has {len(matches)} pictures of number "
            f"{draft.number}; one is expected (--images)",
        )
        return None


def placed_name(index: int, picture: Path) -> str:
    """A frame's file name in the data set: ``000012.jpg``."""
    return f"{index:06d}{picture.suffix.lower()}"


def place_pictures(
    pictures: list[Path], folder: Path, how: Literal["copy", "link"], *, overwrite: bool
) -> None:
    """Puts the pictures of a sequence into its folder, numbered from 0.

    Args:
        pictures: in order.
        folder: the sequence's; made if absent.
        how: copies or links.
        overwrite: also removes what else lies in the folder: it would pass for a neighbour.

    Raises:
        AnnotationError: the pictures lie in that very folder, under other numbers.
        OutputError: the disk is full, and the like.
    """
    placed = {placed_name(index, picture): picture for index, picture in enumerate(pictures)}
    same_folder = folder.resolve() == pictures[0].parent.resolve()
    if same_folder and any(name != picture.name for name, picture in placed.items()):
        raise AnnotationError(
            f"{folder}: the pictures already lie where they are to be written, under other "
            "numbers; move them and name their folder with --images"
        )
    for name, picture in placed.items():
        _place(picture, folder / name, how)
    if overwrite and not same_folder:
        with writing(folder):
            _remove_others(folder, placed)


def _remove_others(folder: Path, placed: Mapping[str, Path]) -> None:
    for path in folder.iterdir():
        if path.name not in placed:
            path.unlink()


def _place(picture: Path, target: Path, how: Literal["copy", "link"]) -> None:
    """Copies or links one picture, whole or not at all; one that is there already is kept."""
    state = picture.stat()
    if target.is_file():
        there = target.stat()
        if (there.st_size, there.st_mtime_ns) == (state.st_size, state.st_mtime_ns):
            return
    if target.is_symlink():  # the link is replaced, and not what it points to
        with writing(target):
            remove(target)
    with whole_file(target, "run the same command again", durable=False) as partial:
        if how == "link":
            partial.symlink_to(picture.resolve())
        else:
            shutil.copy2(picture, partial)
