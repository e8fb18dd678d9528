"""The pictures of a conversion: found where the source has them, and placed in the data set."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import Literal

import cv2

from cmpose.convert.report import ConvertReport
from cmpose.convert.sources import Draft
from cmpose.data.formats.messages import short
from cmpose.data.frames import FrameFolder, nearly_there
from cmpose.data.numbering import FrameName
from cmpose.data.pictures import look, read_picture
from cmpose.data.sequence import AnnotationError
from cmpose.files import remove, whole_file, writing

_QUALITY = {
    ".jpg": [
        *(cv2.IMWRITE_JPEG_QUALITY, 95),
        *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
    ],
    ".webp": [cv2.IMWRITE_WEBP_QUALITY, 101],
}
"""Of pictures that are written upright: JPEGs nearly as they were, WebP without loss."""


class SourcePictures:
    """Finds the pictures of drafts; each folder is listed once.

    Args:
        images: folder that the source's file names are relative to.
        report: is told what is missing.
        numbered: a draft with a frame number names its folder only, as a CSV does.
        outside: whether pictures may lie elsewhere than below ``images``.
    """

    def __init__(
        self, images: Path, report: ConvertReport, *, numbered: bool, outside: bool
    ) -> None:
        self.images, self.report, self.numbered, self.outside = images, report, numbered, outside
        self._folders: dict[Path, FrameFolder] = {}
        self._found: dict[Path, Draft] = {}
        self._root = Path(os.path.realpath(images))

    def folder(self, path: Path) -> FrameFolder:
        """What lies in a folder."""
        if path not in self._folders:
            self._folders[path] = FrameFolder(path)
        return self._folders[path]

    def frame_name(self, picture: Path) -> FrameName | None:
        """What a picture's name says beside the others of its folder; None without a number."""
        return self.folder(picture.parent).frame_names.get(picture.name)

    def video(self, picture: Path) -> dict[int, Path]:
        """Frame number → picture, of a picture's folder, whose names differ in the number only.

        Raises:
            AnnotationError: two of them have one number, or another one may be meant.
        """
        folder, own = self.folder(picture.parent), self.frame_name(picture)
        numbered: dict[int, Path] = {}
        if own is None:
            return {}
        if own.doubt:
            raise AnnotationError(f"{picture}: {own.doubt}; --group still if they are no video")
        for name in folder.videos[own.video]:
            number = folder.frame_names[name].number
            if number in numbered:
                raise AnnotationError(
                    f"{picture.parent}: {numbered[number].name} and {name} both are frame "
                    f"{number}; keep one of them, or --group still if they are no video"
                )
            numbered[number] = picture.with_name(name)
        return numbered

    def find(self, draft: Draft) -> Path | None:
        """A draft's picture; None if it is missing and the report's ``on_error`` is ``skip``.

        Raises:
            AnnotationError: it is missing, lies outside of ``images``, or is another draft's too.
        """
        if self._leads_out(draft.file_name):
            self._report_outside(draft)
            return None
        names_its_folder = (
            self.numbered and draft.number is not None and draft.file_name == draft.video
        )
        if not draft.file_name or names_its_folder:
            path = self._find_number(draft)
        else:
            path = self._find_name(draft)
        if path is None:
            return None
        real = Path(os.path.realpath(path))
        if not self.outside and self._root not in real.parents:
            self._report_outside(draft)
            return None
        # A link to a file is a picture of its own, as where equal frames are stored once.
        location = Path(os.path.realpath(path.parent), path.name)
        other = self._found.setdefault(location, draft)
        if other is not draft:
            raise AnnotationError(
                f"{draft.where}: {path} is also at {other.where}; list each picture once"
            )
        name = self.frame_name(path)
        draft.named_number = None if name is None else name.number
        return path

    def _leads_out(self, name: str) -> bool:
        path = PurePosixPath(name)
        absolute = path.is_absolute() or re.match(r"[A-Za-z]:", name)
        return "\0" in name or (not self.outside and bool(absolute or ".." in path.parts))

    def _report_outside(self, draft: Draft) -> None:
        self.report.error(
            "picture outside of --images",
            f"{draft.where}: {short(draft.file_name)} leads out of {self.images}; name files below "
            "--images, or give --outside true if you trust the source",
        )

    def _find_name(self, draft: Draft) -> Path | None:
        path = self.images / draft.file_name
        if path.name in self.folder(path.parent).names:
            return path
        why = nearly_there(self.images, draft.file_name)
        why = why or "is --images the folder that file names start from?"
        if path.parent != self.images and path.name in self.folder(self.images).names:
            why = (
                f"there is a {path.name} in --images itself, but it need not be the same picture: "
                "name the folder that file names start from, or take the folder out of them"
            )
        self.report.error(
            "picture missing",
            f"{draft.where}: {short(draft.file_name)} is not below {self.images}; {why}",
        )
        return None

    def _find_number(self, draft: Draft) -> Path | None:
        folder = self.folder(self.images / draft.file_name)
        matches = [n for n, frame in folder.frame_names.items() if frame.number == draft.number]
        if len(matches) == 1:
            return folder.path / matches[0]
        hint = nearly_there(self.images, draft.file_name) or "one is expected (--images)"
        self.report.error(
            "picture missing",
            f"{draft.where}: frame: {folder.path} has {len(matches)} pictures of number "
            f"{draft.number}; {hint}",
        )
        return None


def placed_name(index: int, picture: Path) -> str:
    """A frame's file name in the data set: ``000012.jpg``."""
    return f"{index:06d}{picture.suffix.lower()}"


def place_pictures(pictures: list[Path], folder: Path, how: Literal["copy", "link"]) -> None:
    """Puts the pictures of a sequence into its folder, numbered from 0.

    Args:
        pictures: in order.
        folder: the sequence's; made if absent.
        how: copies or links. A picture with an orientation tag is written upright without it.

    Raises:
        AnnotationError: the pictures lie in that very folder, under other numbers.
        OutputError: the disk is full, and the like.
    """
    placed = {placed_name(index, picture): picture for index, picture in enumerate(pictures)}
    same_folder = folder.resolve() == pictures[0].parent.resolve()
    if same_folder and any(
        name != picture.name or look(picture).orientation != 1 for name, picture in placed.items()
    ):
        raise AnnotationError(
            f"{folder}: the pictures already lie where they are to be written, under other "
            "numbers or not upright; move them and name their folder with --images"
        )
    for name, picture in placed.items():
        if look(picture).orientation == 1:
            _place(picture, folder / name, how)
        else:
            _place_upright(picture, folder / name)


def _place(picture: Path, target: Path, how: Literal["copy", "link"]) -> None:
    """Copies or links one picture, whole or not at all; one that is there already is kept."""
    state = picture.stat()
    if target.is_file():
        placed = target.stat()
        if (placed.st_size, placed.st_mtime_ns) == (state.st_size, state.st_mtime_ns):
            return
    _unlink_link(target)
    again = "run the same command again"
    with whole_file(target, again, durable=False, keep_mode=True) as partial:
        if how == "link":
            partial.symlink_to(picture.resolve())
        else:
            shutil.copy2(picture, partial)


def _place_upright(picture: Path, target: Path) -> None:
    """Writes a turned picture in the same format, upright and without an orientation tag.

    Raises:
        AnnotationError: OpenCV does not write that format.
    """
    quality = _QUALITY.get(target.suffix.replace(".jpeg", ".jpg"), [])
    try:
        data = cv2.imencode(target.suffix, read_picture(picture), quality)[1].tobytes()
    except cv2.error as error:
        raise AnnotationError(
            f"{picture}: has an orientation tag, and cannot be written upright as {target.suffix}; "
            "turn it yourself, or save it as .jpg or .png"
        ) from error
    _unlink_link(target)
    with whole_file(target, "run the same command again", durable=False) as partial:
        partial.write_bytes(data)


def _unlink_link(target: Path) -> None:
    """A link is replaced, and not what it points to."""
    if target.is_symlink():
        with writing(target):
            remove(target)
