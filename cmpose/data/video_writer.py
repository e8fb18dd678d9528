"""Writing a video that browsers play: H.264 in an MP4, which gets its name once it is whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.error import FFmpegError
from av.video.stream import VideoStream

from cmpose import files
from cmpose.data.video import VideoError
from cmpose.files import writing

ROOM = 32 << 20
"""Bytes that are left free on the disk, for what the encoder holds back to its end."""

_LOOK_EVERY = 16  # frames between two looks at the free space

_ENCODERS: tuple[tuple[str, dict[str, str]], ...] = (
    ("libx264", {"preset": "superfast", "crf": "20", "bf": "0"}),
    ("libopenh264", {"b": "8M"}),
    ("mpeg4", {"q:v": "3", "qmin": "3", "qmax": "3"}),
)
"""Encoders of FFmpeg, best first, and their options. Those of video cards are not tried: they are
in many builds without their driver. Without frames that are coded ahead (``bf``) time stamps begin
at 0, and no reader needs an edit list to put them right."""

_THREADS = 4
"""Of the encoder. What it writes depends on their number, so that no machine decides it."""

_BT601 = 6
"""The matrix, primaries and transfer of Rec. 601. OpenCV takes every file for one of these."""


def encoder() -> str:
    """FFmpeg's encoder that videos are written by; empty where this build of PyAV has none."""
    return next((name for name, _ in _ENCODERS if _encodes(name)), "")


def _encodes(name: str) -> bool:
    try:
        return av.Codec(name, "w").is_encoder
    except ValueError:  # it is not there, or decodes alone
        return False


def note_of_encoder() -> str:
    """For people: that browsers will not play what is written, where that is so."""
    if encoder() != "mpeg4":
        return ""
    return (
        "this PyAV has no H.264 encoder: drawn videos are MPEG-4 Part 2, which VLC plays and "
        "browsers do not; pip install --force-reinstall av brings a PyAV with one"
    )


def part_of(path: Path) -> Path:
    """Where ``path`` lies while it is not whole: ``a.mp4`` → ``a.part.mp4``."""
    return path.with_name(f"{path.stem}.part{path.suffix}")


class VideoWriter:
    """Writes ``part_of(path)``, which ``close`` renames to ``path``.

    H.264 of 4:2:0 halves the colours' resolution, so that frames of an odd width or height get one
    column or row more, a copy of the last.

    Args:
        path: the MP4 file.
        size: (width, height) of its frames, pixels.
        fps: frames a second.

    Raises:
        OutputError: nothing can be written there.
        VideoError: FFmpeg cannot write an MP4 of this size.
    """

    def __init__(self, path: Path, size: tuple[int, int], fps: float) -> None:
        self.path, self.part, self.frames = path, part_of(path), 0
        self._odd = size[0] % 2, size[1] % 2
        self._open = True
        with writing(path):
            self.part.unlink(missing_ok=True)
            self.part.touch()
            self._check_room()
            with self._said():
                # The index stands before the frames: a browser plays while it still loads.
                self._container = av.open(
                    str(self.part), "w", format="mp4", options={"movflags": "faststart"}
                )
        try:
            name = encoder()
            if not name:
                raise LookupError("this PyAV has no encoder")
            rate = Fraction(fps).limit_denominator(1001)
            stream = self._container.add_stream(name, rate, dict(_ENCODERS)[name])
            assert isinstance(stream, VideoStream)
            stream.width, stream.height = size[0] + self._odd[0], size[1] + self._odd[1]
            stream.pix_fmt, stream.thread_count = "yuv420p", _THREADS
            context = stream.codec_context
            context.color_primaries = context.color_trc = context.colorspace = _BT601
            context.open()
        except (LookupError, FFmpegError) as error:
            self._open = False
            raise VideoError(
                f"{path}: FFmpeg cannot write an MP4 video of {size[0]}×{size[1]} pixels there "
                f"({error}); leave video out of --outputs"
            ) from error
        self._stream, self._tick = stream, 1 / rate

    @contextmanager
    def _said(self) -> Iterator[None]:
        """FFmpeg's failures, as Python's that name the file."""
        try:
            yield
        except FFmpegError as error:
            raise OSError(error.errno, error.strerror, str(self.part)) from error

    def _check_room(self) -> None:
        if shutil.disk_usage(self.part.parent).free < ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.part))

    def write(self, picture: np.ndarray) -> None:
        """Appends a frame, uint8 [H, W, 3] BGR.

        Raises:
            OutputError: less than ``ROOM`` is left on the disk.
        """
        if any(self._odd):
            right, below = self._odd
            picture = cv2.copyMakeBorder(picture, 0, below, 0, right, cv2.BORDER_REPLICATE)
        frame = av.VideoFrame.from_ndarray(picture, format="bgr24").reformat(
            format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG"
        )
        frame.pts, frame.time_base = self.frames, self._tick
        with writing(self.path), self._said():
            if self.frames % _LOOK_EVERY == 0:
                self._check_room()
            self._container.mux(self._stream.encode(frame))
        self.frames += 1

    def stop(self) -> None:
        """Ends the file where it is; it can be played, and keeps its name as a part.

        Raises:
            OutputError: the disk is full.
        """
        if not self._open:
            return
        self._open = False
        with writing(self.path), self._said():
            try:
                self._container.mux(self._stream.encode(None))
            finally:
                self._container.close()

    def close(self) -> None:
        """Ends the file and gives it its name.

        Raises:
            OutputError: not all frames are in it.
        """
        self.stop()
        with writing(self.path):
            written = _frames_in(self.part)
            if written != self.frames:
                reason = f"{written} of {self.frames} frames reached the disk"
                raise OSError(errno.EIO, reason, str(self.part))
            files.rename(self.part, self.path)


def _frames_in(path: Path) -> int:
    """How many frames a file has by its index."""
    try:
        with av.open(str(path)) as container:
            return container.streams.video[0].frames
    except (FFmpegError, IndexError):
        return 0


@contextmanager
def video_writer(path: Path, size: tuple[int, int], fps: float) -> Iterator[VideoWriter]:
    """An MP4 of frames of ``size`` (width, height); after an exception it stays a part."""
    writer = VideoWriter(path, size, fps)
    try:
        yield writer
        writer.close()
    finally:
        writer.stop()
