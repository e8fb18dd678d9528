"""Frames on disk: which files a clip is made of, and what they must be to fit their labels.

The rules for clip borders and missing files are in ``docs/data.md``.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Collection, Hashable
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from cmpose.data.formats.messages import ONLY_NEARLY, nearly, short
from cmpose.data.numbering import FrameName, number_pictures
from cmpose.data.pictures import FrameError, look, read_with_header
from cmpose.data.sequence import Frame, Sequence, split_frame_name

Key = TypeVar("Key", bound=Hashable)


class FrameFolder:
    """The numbered pictures of one folder, listed once.

    Attributes:
        path: the folder.
        names: all file names in it; empty if there is no such folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: set[str] = set()
        self._numbered: dict[tuple[str, str], dict[int, str]] = {}
        if os.path.isdir(path):
            with os.scandir(path) as entries:
                self.names = {entry.name for entry in entries}

    @cached_property
    def frame_names(self) -> dict[str, FrameName]:
        """What the pictures' names say beside one another."""
        return number_pictures(self.names)

    @cached_property
    def videos(self) -> dict[tuple[str, str], list[str]]:
        """``FrameName.video`` → the pictures that have it, sorted."""
        videos: dict[tuple[str, str], list[str]] = {}
        for name in sorted(self.frame_names):
            videos.setdefault(self.frame_names[name].video, []).append(name)
        return videos

    def numbered_otherwise(self, file_name: str) -> list[str]:
        """The files that differ from ``file_name`` in a number before its last one.

        ``frame0001_cam1.jpg`` beside ``frame0000_cam1.jpg``; empty where the last number is what
        files differ in.
        """
        names = self.frame_names
        own, parts = names.get(file_name), split_frame_name(file_name)
        if own is None or parts is None or own.video == (parts[0], parts[2]):
            return []
        return sorted(
            n for n, other in names.items() if n != file_name and other.video == own.video
        )

    def like(self, file_name: str) -> dict[int, str]:
        """Frame number → name, of the files that differ from ``file_name`` in the number only.

        Any zero padding is understood.

        Raises:
            FrameError: two files have the same number.
        """
        parts = split_frame_name(file_name)
        if parts is None:
            return {}
        prefix, _, suffix = parts
        if (prefix, suffix) not in self._numbered:
            numbered: dict[int, str] = {}
            for name in sorted(self.names):
                other = split_frame_name(name)
                if other is None or (other[0], other[2]) != (prefix, suffix):
                    continue
                number = int(other[1])
                if number in numbered:
                    raise FrameError(
                        f"{self.path}: {numbered[number]} and {name} both are frame {number}; "
                        "keep one of them",
                        "frame number ambiguous",
                    )
                numbered[number] = name
            self._numbered[prefix, suffix] = numbered
        return self._numbered[prefix, suffix]


def nearly_there(root: Path, name: str) -> str:
    """A hint, of a file that is missing: one whose name is nearly the same; empty without.

    Args:
        root: folder that ``name`` is relative to.
        name: of the file or folder, with ``/``.
    """
    path = root
    missing = PurePosixPath(name)
    for part in missing.parts:
        names = os.listdir(path) if path.is_dir() else []
        entry = part if part in names else nearly(part, names)
        if entry is None:
            return ""
        path /= entry
    near = path.relative_to(root).as_posix()
    return "" if near == missing.as_posix() else f"{short(near)} {ONLY_NEARLY}"


def neighbor_name(file_name: str, number: int) -> str:
    """``file_name`` with another frame number, padded with zeros to the same width."""
    prefix, digits, suffix = split_frame_name(file_name) or ("", "", "")
    return f"{prefix}{number:0{len(digits)}d}{suffix}"


class Support(NamedTuple):
    """The T frame numbers of a clip.

    Attributes:
        numbers: T frame numbers that exist on disk, the key frame in the middle.
        lost: wanted numbers that should exist but do not: the annotation lists them, or they
            lie between frames that are on disk or listed. A nearer frame stands in.
        short: wanted numbers that are beyond the files on disk, though the annotation's
            ``nframes`` says that the video goes on. A nearer frame stands in.
    """

    numbers: tuple[int, ...]
    lost: tuple[int, ...]
    short: tuple[int, ...]


def support_frames(
    key: int,
    num_frames: int,
    on_disk: Collection[int],
    listed: Collection[int],
    nframes: int | None = None,
) -> Support:
    """Chooses the frames of a clip by number: key − ω … key + ω.

    Where the wanted frame is not on disk, the nearest frame towards the key frame stands in. At a
    video's borders that repeats the first or the last frame (the key frame itself at T = 3).

    Args:
        key: number of the key frame, which must be on disk.
        num_frames: T = 2ω + 1.
        on_disk: numbers of the files in the key frame's folder.
        listed: frame numbers that the annotation lists.
        nframes: how many frames the video has according to the annotation, if it says so.
    """
    first = min(min(on_disk), min(listed, default=key))
    last = max(max(on_disk), max(listed, default=key))
    end = last if nframes is None else first + nframes - 1
    numbers, lost, short = [], [], []
    for offset in range(-(num_frames // 2), num_frames // 2 + 1):
        wanted = number = key + offset
        while number not in on_disk:
            number += -1 if offset > 0 else 1
        numbers.append(number)
        if number != wanted:
            if wanted in listed or first < wanted < last:
                lost.append(wanted)
            elif last < wanted <= end:
                short.append(wanted)
    return Support(tuple(numbers), tuple(lost), tuple(short))


class ClipFiles:
    """Finds the files of clips; each folder is listed once.

    Args:
        root: folder that ``file_name`` is relative to.
        num_frames: T.
        on_error: ``raise`` refuses a clip whose support frame is lost (see :class:`Support`);
            ``skip`` lets a nearer frame stand in.
    """

    def __init__(self, root: Path, num_frames: int, on_error: Literal["raise", "skip"]) -> None:
        self.root, self.num_frames, self.on_error = root, num_frames, on_error
        self._folders: dict[Path, FrameFolder] = {}
        self._sizes: dict[Path, tuple[int, int]] = {}

    def of(
        self, sequence: Sequence, frame: Frame, listed: Collection[int]
    ) -> tuple[tuple[str, ...], str]:
        """Paths of a clip's T frames; and what to note about them, empty for nothing.

        Args:
            sequence: the video.
            frame: the key frame.
            listed: numbers of the frames that the annotation lists.

        Raises:
            FrameError: the key frame is not on disk or its name leads out of the root, two files
                have one number, another number than the last in its name is the frame's, or a
                support frame is lost and ``on_error`` is ``raise``.
        """
        relative = PurePosixPath(frame.file_name)
        if relative.is_absolute() or ".." in relative.parts:
            raise FrameError(
                f"{sequence.source}: file_name {frame.file_name!r} leads out of the root "
                f"{self.root}; set data.root to a folder that holds all pictures, and name them "
                "below it",
                "frame outside of the root",
            )
        path = self.root / relative.parent
        if path not in self._folders:
            self._folders[path] = FrameFolder(path)
        folder = self._folders[path]
        if relative.name not in folder.names:
            hint = nearly_there(self.root, frame.file_name) or f"is the root {self.root} right?"
            raise FrameError(
                f"{path / relative.name}: no such file, but {sequence.source} names it (file_name "
                f"{frame.file_name!r}); {hint}; data.on_error=skip leaves such clips out",
                "key frame missing",
            )
        names = folder.like(relative.name)
        if len(names) == 1 and self.num_frames > 1 and sequence.nframes != 1:
            others = folder.numbered_otherwise(relative.name)
            if others:
                raise FrameError(
                    f"{path / relative.name}: its frame number is the last number in its name, but "
                    f"{others[0]} differs from it in another one; name frames by number "
                    "(000000.jpg), as cmpose convert does",
                    "frame number ambiguous",
                )
        support = support_frames(frame.index, self.num_frames, names, listed, sequence.nframes)
        note = ""
        if support.lost:
            if self.on_error == "raise":
                missing = path / neighbor_name(relative.name, support.lost[0])
                raise FrameError(
                    f"{missing}: no such file, but {frame.file_name} needs it as a neighbour, and "
                    f"{sequence.source} lists it or frames beyond it; data.on_error=skip lets a "
                    "nearer frame stand in",
                    "support frame missing",
                )
            note = "support frame missing, a nearer one repeated"
        elif support.short:
            note = "support frame beyond the files on disk, a nearer one repeated"
        return tuple(str(path / names[number]) for number in support.numbers), note

    def picture_size(self, frame: Frame, key_file: str) -> tuple[int, int]:
        """(width, height) of the frames: the annotation's, else the folder's first key frame's.

        Raises:
            FrameError: the annotation does not say, and ``key_file`` is unreadable, or nothing
                tells whether its labels are of upright pixels.
        """
        if frame.width is not None and frame.height is not None:
            return frame.width, frame.height
        folder = Path(key_file).parent
        if folder not in self._sizes:
            header = look(key_file)
            if header.orientation != 1:
                raise _turned(key_file, header.orientation)
            self._sizes[folder] = header.size
        return self._sizes[folder]


def read_frame(file: str, size: tuple[int, int], source: str, factor: int = 1) -> np.ndarray:
    """Decodes a frame of a data set → uint8 [h, w, 3], BGR, upright.

    A picture with an orientation tag is taken only where the size proves that its labels are of
    the upright picture.

    Args:
        file: the picture.
        size: (width, height) that the boxes are given for.
        source: who says so, for messages.
        factor: 1, 2, 4 or 8; the frame is shrunk by it, as ``pictures.read_with_header`` does.

    Raises:
        FrameError: unreadable, of another size, or its labels may be of the pixels as stored.
    """
    picture, header = read_with_header(file, factor)
    if header.orientation != 1 and (header.size != size or header.stored_size == size):
        raise _turned(file, header.orientation)
    if header.size != tuple(size):
        raise FrameError(
            f"{file}: is {header.size[0]}×{header.size[1]} pixels, but {source} or the sequence's "
            f"other frames say {size[0]}×{size[1]}; the boxes would not fit it"
        )
    return picture


def _turned(file: str, orientation: int) -> FrameError:
    return FrameError(
        f"{file}: has the orientation tag {orientation}, and nothing proves that its labels are of "
        "the picture turned by it. cmpose convert --exif makes a data set of either kind; or turn "
        "the pixels (mogrify -auto-orient), or delete the tag, whichever the labels fit",
        "orientation tag",
    )


class PictureCache:
    """The last decoded pictures of this process, up to a number of bytes.

    The people of one frame share it, and so do neighbouring clips: when clips are read in order,
    as in evaluation, each frame is decoded once. In training's random order a frame is wanted
    again only after it was dropped, unless the whole data set fits; ``docs/data.md`` has the
    numbers.

    Attributes:
        limit: bytes that are kept; the newest picture is kept in any case.
        decoded: number of pictures that were decoded so far.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.decoded = 0
        self._bytes = 0
        self._pictures: OrderedDict[Hashable, np.ndarray] = OrderedDict()

    def read(self, key: Key, decode: Callable[[Key], np.ndarray]) -> np.ndarray:
        """``decode(key)``, or what it gave before; the array must not be written to."""
        if key in self._pictures:
            self._pictures.move_to_end(key)
            return self._pictures[key]
        image = decode(key)
        self.decoded += 1
        self._pictures[key] = image
        self._bytes += image.nbytes
        while self._bytes > self.limit and len(self._pictures) > 1:
            self._bytes -= self._pictures.popitem(last=False)[1].nbytes
        return image

    def __getstate__(self) -> dict[str, int]:
        return {"limit": self.limit}

    def __setstate__(self, state: dict[str, int]) -> None:
        self.__init__(state["limit"])  # type: ignore[misc]
