"""Videos, frame by frame: files, streams, cameras, and pictures in order."""

from __future__ import annotations

import glob
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
from av.error import FFmpegError

from cmpose.data.container import read_container
from cmpose.data.decoder import Decoder, to_bgr
from cmpose.data.formats.messages import short
from cmpose.data.numbering import FrameName, number_pictures
from cmpose.data.picture_header import read_header
from cmpose.data.pictures import (
    LIMIT,
    PICTURES,
    FrameError,
    is_picture,
    look,
    picture_size,
    pixel_limit,
    read_picture,
)
from cmpose.data.sequence import split_frame_name
from cmpose.data.timeline import Timeline, findings

NOT_DECODED = np.zeros((0, 0, 3), np.uint8)
"""The picture of a frame that was passed over."""

Source = str | Path | int | Sequence[str | Path] | np.ndarray | Sequence[np.ndarray]
"""What ``open_video`` opens."""

_RATE = 25.0
_LEAST_RATE, _MOST_RATE = 0.01, 1000.0


def _rate_or_default(rate: float) -> float:
    """``rate``, or 25 where no video has it: a damaged header or time stamp may say anything."""
    return rate if _LEAST_RATE <= rate <= _MOST_RATE else _RATE


_NO_FRAME = (
    "FFmpeg finds no frame in it; is it a video, and whole? (re-encoding it, e.g. as H.264 in MP4, "
    "often helps)"
)


class VideoError(RuntimeError):
    """A video that cannot be read or written; the message names it and says what to do."""


@dataclass(frozen=True)
class VideoInfo:
    """What is known of a video: from its header at first, then from decoding it.

    Attributes:
        source: as the user named it.
        name: what its results are called, e.g. the file's name without ending, or ``camera0``.
        width: of every frame, pixels.
        height: likewise.
        fps: frames a second; 25 where nothing says. By the header until it was decoded, then by
            the frames' time stamps where those say something else.
        frames: number of frames; 0 where it is not known.
        live: whether it is a camera or stream, which cannot be read a second time.
        numbers: of its frames, ascending, by the names of its pictures; empty where frames count
            from 0. Inside the program they are counted from 0 in any case.
        counted: whether the frames were counted. If not, their number is the header's, which is
            often wrong.
        missing: how many frames more the header names, of a file that is cut off or damaged.
        cut_off: for people, what is known of a file that ends too early; else empty.
        notes: for people, what else they should know, each a sentence without a full stop.
        picture: how a picture's name ends that is given alone, such as ``.jpg``; else empty.
    """

    source: str
    name: str
    width: int
    height: int
    fps: float
    frames: int
    live: bool = False
    numbers: tuple[int, ...] = ()
    counted: bool = False
    missing: int = 0
    cut_off: str = ""
    notes: tuple[str, ...] = ()
    picture: str = ""

    def number(self, position: int) -> int:
        """A frame's number for people and files, by its position."""
        return self.numbers[position] if self.numbers else position


class VideoFrame(NamedTuple):
    """A frame and its position.

    Attributes:
        number: from 0, without holes; see ``VideoInfo.numbers``.
        picture: uint8 [H, W, 3], BGR; empty for a frame that was passed over.
        readable: False where the picture before stands in for one that could not be read.
    """

    number: int
    picture: np.ndarray
    readable: bool = True


class Video(ABC):
    """An open video; its frames can be read once."""

    info: VideoInfo

    def scan(self, most: int | None = None) -> None:  # noqa: B027 - most kinds know it all
        """Decodes a file once, to its end or up to ``most`` frames: ``info`` is right then.

        Files alone need it: pictures are counted, and what is live cannot be read twice.
        """

    @abstractmethod
    def frames(self, skip: int = 0) -> Iterator[VideoFrame]:
        """All frames in order; the first ``skip`` come with an empty picture.

        After the last one ``info`` says what decoding has told.

        Raises:
            VideoError: a frame of another size than the first, or an unreadable picture.
        """

    @abstractmethod
    def signature(self) -> dict[str, Any]:
        """Plain data (for JSON) by which another video of the same name can be told apart."""

    def files(self) -> list[Path]:
        """The files that it is read from; a camera or a stream has none."""
        return []

    def frame_name(self, number: int) -> str:
        """``NAME/000012.jpg``; for a frame that is a file, its folder and name.

        A file whose frame number is not the last number in its name gets such a name too, as what
        is written must be read again by that number.
        """
        return f"{self.info.name}/{self.info.number(number):06d}.jpg"

    def frame_source(self, number: int) -> str:
        """The folder and name of a frame that is a file, where ``frame_name`` is another."""
        return ""

    def close(self) -> None:  # noqa: B027 - pictures hold nothing open
        """Closes the file or device."""

    def _check(self, picture: np.ndarray, where: str) -> None:
        size, first = picture.shape[1::-1], (self.info.width, self.info.height)
        if size != first:
            raise VideoError(
                f"{where}: is {size[0]}×{size[1]} pixels, the first frame was "
                f"{first[0]}×{first[1]}; frames of one size are needed"
            )


class _File(Video):
    """A video file, decoded by FFmpeg."""

    def __init__(self, path: Path, source: str, name: str, fps: float | None) -> None:
        self.path, self.fps, self.most_pixels = path, fps, pixel_limit()
        try:
            self.decoder = Decoder(path, self.most_pixels)
        except LookupError:
            raise VideoError(
                f"{path}: holds no video that FFmpeg decodes; sound and a cover picture are none"
            ) from None
        except FFmpegError as error:
            raise VideoError(f"{path}: {_NO_FRAME} ({error.strerror})") from error
        width, height = self.decoder.size
        if width * height > self.most_pixels:
            self.close()
            raise VideoError(
                f"{path}: {width}×{height} pixels by its header, more than the "
                f"{self.most_pixels:,} that are decoded; make it smaller, or raise {LIMIT}"
            )
        self.decoded = iter(self.decoder)
        first = next(self.decoded, None)
        if first is None:
            self.close()
            raise VideoError(f"{path}: {_NO_FRAME}")
        self.first = first
        height, width = to_bgr(first[0]).shape[:2]
        self.rate = _rate_or_default(self.decoder.rate)
        self.info = VideoInfo(
            source,
            name,
            width,
            height,
            fps or self.rate,
            self.decoder.frames,
            notes=self._header_notes(),
        )

    def _header_notes(self) -> tuple[str, ...]:
        """What is said of a file with several streams, or with pixels that are not square."""
        notes, decoder = [], self.decoder
        if decoder.streams > 1:
            notes.append(
                f"{self.path} has {decoder.streams} video streams; the one that players show is "
                f"read, number {decoder.stream}. ffmpeg -i FILE -map 0:N -c copy NEW takes out "
                "another"
            )
        shape = decoder.pixel_shape
        if shape != 1:
            width, height = decoder.size
            notes.append(
                f"{self.path} has pixels that are {float(shape):.3g} times as wide as high: "
                f"players show {round(width * shape)}×{height}, boxes and poses are of the stored "
                f"{width}×{height} pixels, in which people look squeezed. ffmpeg -i FILE -vf "
                "scale=iw*sar:ih,setsar=1 NEW makes the pixels square"
            )
        return tuple(notes)

    def scan(self, most: int | None = None) -> None:
        decoder, timeline = Decoder(self.path, self.most_pixels), Timeline()
        for frame, lost in decoder:
            timeline.add(frame, lost=lost)
            if timeline.frames == most:
                break
        else:
            self._learn(timeline)
        decoder.close()
        self.info = replace(self.info, fps=self.fps or _rate_or_default(timeline.rate(self.rate)))

    def frames(self, skip: int = 0) -> Iterator[VideoFrame]:
        timeline = Timeline()
        for frame, lost in chain([self.first], self.decoded):
            number = timeline.frames
            timeline.add(frame, lost=lost)
            # Seeking is inexact in many formats, so frames are decoded one by one.
            picture = NOT_DECODED if number < skip else to_bgr(frame)
            if number >= skip:
                self._check(picture, f"{self.info.source}: frame {number}")
            yield VideoFrame(number, picture)
        self._learn(timeline)

    def _learn(self, timeline: Timeline) -> None:
        """Puts what the whole of the file told in place of what its header says."""
        source, container = self.info.source, read_container(self.path)
        facts = findings(source, timeline, container, self.decoder.frames, self.rate)
        self.info = replace(
            self.info,
            frames=timeline.frames,
            fps=self.fps or _rate_or_default(timeline.rate(self.rate)),
            counted=True,
            missing=facts.missing,
            cut_off=facts.cut_off,
            notes=self._header_notes() + facts.notes,
        )

    def files(self) -> list[Path]:
        return [self.path]

    def signature(self) -> dict[str, Any]:
        return {
            "video bytes": self.path.stat().st_size,
            "video checksum": _ends_checksum(self.path, 1 << 20),
        }

    def close(self) -> None:
        self.decoder.close()


class _Capture(Video):
    """A camera or a stream, read by ``cv2.VideoCapture``."""

    def __init__(
        self, address: str | int, source: str, name: str, fps: float | None, unreadable: str
    ) -> None:
        self.capture = cv2.VideoCapture(address)
        decoded, self.first = self.capture.read()
        if not decoded:
            self.capture.release()
            raise VideoError(unreadable)
        rate = self.capture.get(cv2.CAP_PROP_FPS)
        frames = self.capture.get(cv2.CAP_PROP_FRAME_COUNT)
        count = int(frames) if np.isfinite(frames) and 0 < frames < 2**31 else 0
        self.info = VideoInfo(
            source=source,
            name=name,
            width=self.first.shape[1],
            height=self.first.shape[0],
            fps=fps or _rate_or_default(rate),
            frames=0 if isinstance(address, int) else count,
            live=isinstance(address, int) or not count,
        )

    def frames(self, skip: int = 0) -> Iterator[VideoFrame]:
        yield VideoFrame(0, NOT_DECODED if skip else self.first)
        number = 1
        while number < skip:
            # Seeking is inexact in many formats, so frames are grabbed one by one.
            if not self.capture.grab():
                return
            yield VideoFrame(number, NOT_DECODED)
            number += 1
        while True:
            decoded, picture = self.capture.read()
            if not decoded:
                return
            self._check(picture, f"{self.info.source}: frame {number}")
            yield VideoFrame(number, picture)
            number += 1

    def signature(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.capture.release()


def _ends_checksum(path: Path, reach: int, crc: int = 0) -> int:
    """A checksum of a file's first and last ``reach`` bytes, which goes on from ``crc``."""
    with open(path, "rb") as file:
        crc = zlib.crc32(file.read(reach), crc)
        file.seek(max(0, path.stat().st_size - reach))
        return zlib.crc32(file.read(), crc)


class _Pictures(Video):
    """Picture files, each a frame."""

    def __init__(
        self,
        files: list[Path],
        source: str,
        name: str,
        fps: float | None,
        *,
        skip_unreadable: bool,
        numbers: tuple[int, ...],
    ) -> None:
        self.paths, self.skip_unreadable = files, skip_unreadable
        try:
            width, height = picture_size(files[0])
            read_picture(files[0])
        except FrameError as error:
            raise VideoError(f"{error} (the first picture tells the video's size)") from error
        last = [split_frame_name(file.name) for file in files]
        self.own_names = len({parts and int(parts[1]) for parts in last} - {None}) == len(files)
        self.info = VideoInfo(
            source,
            name,
            width,
            height,
            fps or _RATE,
            len(files),
            numbers=numbers,
            counted=True,
            notes=_note_of_tags(files),
        )

    def frames(self, skip: int = 0) -> Iterator[VideoFrame]:
        before = NOT_DECODED
        for number, file in enumerate(self.paths):
            if number < skip:
                yield VideoFrame(number, NOT_DECODED)
                continue
            readable = True
            try:
                picture = read_picture(file)
                self._check(picture, str(file))
            except (FrameError, VideoError) as error:
                if not self.skip_unreadable:
                    raise VideoError(f"{error} (--on_error skip goes on without it)") from error
                readable = False
                picture = before if before.size else self._nearest(number)
            yield VideoFrame(number, picture, readable)
            before = picture

    def files(self) -> list[Path]:
        return self.paths

    def _nearest(self, number: int) -> np.ndarray:
        """The last readable picture before frame ``number``: at least the first was readable."""
        for file in reversed(self.paths[:number]):
            try:
                picture = read_picture(file)
                self._check(picture, str(file))
            except (FrameError, VideoError):
                continue
            return picture
        raise VideoError(f"{self.paths[0]}: is no longer readable")

    def signature(self) -> dict[str, Any]:
        crc = 0
        for file in self.paths:
            crc = zlib.crc32(f"{file.name}:{file.stat().st_size};".encode(), crc)
            crc = _ends_checksum(file, 1 << 12, crc)
        numbered = "by their names" if self.info.numbers else "from 0"
        return {
            "pictures": len(self.paths),
            "pictures' names and contents": crc,
            "frames are numbered": numbered,
        }

    def frame_name(self, number: int) -> str:
        if not self.own_names:
            return super().frame_name(number)
        return self._file_name(number)

    def frame_source(self, number: int) -> str:
        return "" if self.own_names else self._file_name(number)

    def _file_name(self, number: int) -> str:
        return "/".join(self.paths[number].absolute().parts[-2:])


class _Arrays(Video):
    """Frames that the caller has in memory."""

    def __init__(self, frames: Iterable[np.ndarray], fps: float | None) -> None:
        """
        Args:
            frames: each uint8 [H, W, 3], RGB.
            fps: frames a second; None is 25.

        Raises:
            VideoError: another shape or dtype, or no frame.
        """
        self.pictures = [np.asarray(frame) for frame in frames]
        if not self.pictures:
            raise VideoError("video: an array of no frames")
        for number, frame in enumerate(self.pictures):
            if frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3 or not frame.size:
                raise VideoError(
                    f"video: frame {number} is {frame.dtype} {list(frame.shape)}; frames are uint8 "
                    "[H, W, 3], RGB"
                )
        height, width = self.pictures[0].shape[:2]
        self.info = VideoInfo(
            source=f"{len(self.pictures)} frames in memory",
            name="frames",
            width=width,
            height=height,
            fps=fps or _RATE,
            frames=len(self.pictures),
            counted=True,
        )

    def frames(self, skip: int = 0) -> Iterator[VideoFrame]:
        for number, frame in enumerate(self.pictures):
            self._check(frame, f"frame {number}")
            passed = number < skip
            yield VideoFrame(
                number, NOT_DECODED if passed else np.ascontiguousarray(frame[..., ::-1])
            )

    def signature(self) -> dict[str, Any]:
        crc = 0
        for frame in self.pictures:
            crc = zlib.crc32(frame.tobytes(), crc)
        return {"frames' contents": crc}


def _note_of_tags(files: list[Path]) -> tuple[str, ...]:
    tagged = []
    for file in files:
        with suppress(FrameError):
            if look(file).orientation != 1:
                tagged.append(file)
    if not tagged:
        return ()
    return (
        f"{len(tagged)} of {len(files)} pictures have an orientation tag, e.g. {tagged[0]}: they "
        "are turned upright, and boxes are taken for those of the upright pictures",
    )


def _in_order(files: list[Path]) -> tuple[list[Path], tuple[int, ...]]:
    """Pictures by the frame numbers of their names, and these; else in natural order, and none.

    Names tell if they differ in a number and their ending alone, within one folder.

    Raises:
        VideoError: two pictures have one number; or most names are alike but for numbers and a
            few are not.
    """
    files = sorted(files, key=natural_order)
    names = number_pictures([file.name for file in files])
    frames = {file: names[file.name] for file in files if file.name in names}
    if len({file.parent for file in files}) > 1:
        return files, ()
    _refuse_strays(files, frames)
    videos = {(f.video[0], f.video[1].rpartition(".")[0]) for f in frames.values()}
    alike = len(frames) == len(files) and len(videos) == 1
    if not alike or any(frame.doubt for frame in frames.values()):
        return files, ()
    files.sort(key=lambda file: frames[file].number)
    for first, second in pairwise(files):
        if frames[first].number == frames[second].number:
            raise VideoError(
                f"{second}: has the frame number {frames[second].number}, as {first.name} has; "
                "move one of them"
            )
    numbers = tuple(frames[file].number for file in files)
    return files, () if numbers == tuple(range(len(files))) else numbers


def _refuse_strays(files: list[Path], frames: dict[Path, FrameName]) -> None:
    """Raises VideoError if most names are alike but for numbers and a few are not.

    Positions in place of numbers would give boxes to other pictures without a word.
    """
    shapes: dict[tuple[str, ...], list[Path]] = {}
    for file, frame in frames.items():
        before, behind = frame.video
        key = re.sub(r"\d+", "0", before), re.sub(r"\d+", "0", behind.rpartition(".")[0])
        shapes.setdefault(key, []).append(file)
    usual = max(shapes.values(), key=len, default=[])
    if len(usual) < 2 or not len(files) / 2 < len(usual) < len(files):
        return
    strays = [file.name for file in files if file not in set(usual)]
    example = usual[0]
    shown = ", ".join(strays[:5]) + (", …" if len(strays) > 5 else "")
    raise VideoError(
        f"{example.parent}: {len(usual)} of {len(files)} pictures are numbered like "
        f"{example.name}, but not {shown}: move these, or give a pattern that leaves them "
        "out, such as 'frames/0*.jpg' or frames/%06d.jpg"
    )


def natural_order(path: Path) -> list[Any]:
    """A sorting key by which ``frame10`` comes after ``frame9``."""
    parts = re.split(r"(\d+)", str(path))
    return [(int(part), part) if part.isdecimal() else (0, part) for part in parts]


def _numbered(pattern: Path) -> list[Path]:
    """The files that a pattern with one number names, such as ``%06d.jpg`` or ``f%d.png``."""
    before, _, rest = pattern.name.partition("%")
    width = re.match(r"0?(\d{0,3})d", rest)
    if width is None or not pattern.parent.is_dir():
        return []
    digits = int(width[1] or 1)
    name = re.compile(re.escape(before) + r"(\d+)" + re.escape(rest[width.end() :]))
    matches = ((file, name.fullmatch(file.name)) for file in pattern.parent.iterdir())
    return [file for file, match in matches if match and match[1] == f"{int(match[1]):0{digits}d}"]


@contextmanager
def open_video(
    source: Source,
    *,
    fps: float | None = None,
    on_error: Literal["raise", "skip"] = "raise",
) -> Iterator[Video]:
    """Opens a video in any form that FFmpeg or OpenCV reads.

    Args:
        source: a video file; a folder of pictures or a pattern such as ``frames/*.jpg``, by the
            frame numbers of their names where these differ in a number alone, else in natural
            order; a camera's number; an address (``rtsp://…``) or a GStreamer pipeline (with
            ``!``); a numbered sequence such as ``frames/%06d.jpg``; a list of pictures' paths, in
            this order; frames in memory, uint8 RGB [T, H, W, 3], a list of [H, W, 3], or one.
        fps: frames a second, in place of what the video says; pictures have 25 by default.
        on_error: ``skip`` lets the picture before stand in for an unreadable one; for pictures.

    Raises:
        VideoError: nothing there, or no frame in it.
        ValueError: ``fps`` is not positive.
    """
    if fps is not None and not _LEAST_RATE <= fps <= _MOST_RATE:
        raise ValueError(
            f"--fps {fps}: must be between {_LEAST_RATE} and {_MOST_RATE:.0f} frames a second"
        )
    skip = on_error == "skip"
    if isinstance(source, str | Path | int):
        video = _open(str(source), fps, skip=skip)
    else:
        video = _given(source, fps, skip=skip)
    try:
        yield video
    finally:
        video.close()


def _given(source: Any, fps: float | None, *, skip: bool) -> Video:
    """Opens frames in memory, or a list of pictures' paths."""
    if hasattr(source, "detach"):  # a tensor of torch's
        source = source.detach().cpu().numpy()
    if isinstance(source, np.ndarray):
        if source.ndim != 3:
            return _Arrays(source, fps)
        video = _Arrays(source[None], fps)
        video.info = replace(video.info, picture=".png")
        return video
    items = list(source) if isinstance(source, Sequence) else []
    if items and all(isinstance(item, str | Path) for item in items):
        return _listed([Path(item) for item in items], fps, skip=skip)
    if items and not any(isinstance(item, str | Path) for item in items):
        return _Arrays(items, fps)
    raise VideoError(
        f"video: {short(source)} is none: give a path, a camera's number, an address, a list of "
        "pictures' paths, or uint8 RGB frames [T, H, W, 3]"
    )


def _listed(files: list[Path], fps: float | None, *, skip: bool) -> Video:
    """Pictures in the order of a list; their names number them if that is their order."""
    for file in files:
        if not file.is_file():
            raise VideoError(f"{file}: no such picture; a list is of pictures, each a frame")
        with open(file, "rb") as opened:
            if not is_picture(file.name) and read_header(opened) is None:
                raise VideoError(f"{file}: is no picture; a list is of pictures, each a frame")
    name = files[0].resolve().parent.name
    try:
        in_order, numbers = _in_order(files)
    except VideoError:
        in_order, numbers = [], ()
    return _Pictures(
        files,
        f"{files[0]} and {len(files) - 1} more",
        name,
        fps,
        skip_unreadable=skip,
        numbers=numbers if in_order == files else (),
    )


def _open(text: str, fps: float | None, *, skip: bool) -> Video:
    path = Path(text)
    if path.is_dir():
        name, files = path.resolve().name, list(path.iterdir())
    elif path.is_file():
        with open(path, "rb") as file:
            header = read_header(file)
        animated = header is not None and header.format == "PNG" and header.several
        if animated or not (header or is_picture(path.name)):
            return _File(path, text, path.stem, fps)
        # A picture alone is frame 0, whatever its name.
        video = _Pictures([path], text, path.stem, fps, skip_unreadable=skip, numbers=())
        video.info = replace(video.info, picture=path.suffix.lower())
        return video
    elif re.fullmatch(r"\d{1,4}", text):
        why = "OpenCV gets no frame from it; is it plugged in, and free of other programs?"
        return _Capture(int(text), text, f"camera{text}", fps, f"camera {text}: {why}")
    elif "://" in text or " ! " in text:
        tail = re.sub(r"[?#].*", "", text).rstrip("/").rsplit("/", 1)[-1]
        name = re.sub(r"[^\w.-]+", "_", Path(tail).stem).strip("._")[:60] or "stream"
        why = "OpenCV gets no frame from it; is the address right, and the stream running?"
        return _Capture(text, text, name, fps, f"{text}: {why}")
    elif glob.has_magic(text):
        name, files = path.parent.resolve().name, [Path(file) for file in glob.glob(text)]
    elif "%" in path.name:
        name, files = path.parent.resolve().name, _numbered(path)
    else:
        raise VideoError(f"{path}: no such video")
    pictures = [file for file in files if is_picture(file.name) and file.is_file()]
    if not pictures:
        raise VideoError(
            f"{path}: no pictures there ({', '.join(sorted(PICTURES))}); give a video's file, or "
            "a folder of pictures"
        )
    pictures, numbers = _in_order(pictures)
    return _Pictures(pictures, text, name, fps, skip_unreadable=skip, numbers=numbers)
