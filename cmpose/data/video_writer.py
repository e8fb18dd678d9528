"""Writing a video: an MP4 that gets its name once it is whole."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np

from cmpose import files
from cmpose.data.video import VideoError
from cmpose.files import writing

ROOM = 32 << 20
"""Bytes that are left free on the disk: OpenCV does not tell when it runs out of space."""

_LOOK_EVERY = 16  # frames between two looks at the free space


def part_of(path: Path) -> Path:
    """Where ``path`` lies while it is not whole: ``a.mp4`` → ``a.part.mp4``."""
    return path.with_name(f"{path.stem}.part{path.suffix}")


class VideoWriter:
    """Writes ``part_of(path)``, which ``close`` renames to ``path``.

    Args:
        path: the MP4 file.
        size: (width, height) of its frames, pixels.
        fps: frames a second.

    Raises:
        OutputError: nothing can be written there.
        VideoError: OpenCV cannot write an MP4.
    """

    def __init__(self, path: Path, size: tuple[int, int], fps: float) -> None:
        self.path, self.part, self.frames = path, part_of(path), 0
        with writing(path):
            self.part.unlink(missing_ok=True)
            self.part.touch()  # which tells why it cannot, unlike OpenCV
            self._check_room()
        self._writer = cv2.VideoWriter(str(self.part), cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
        if not self._writer.isOpened():
            raise VideoError(f"{path}: OpenCV cannot write an MP4 video there")

    def _check_room(self) -> None:
        if shutil.disk_usage(self.part.parent).free < ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.part))

    def write(self, picture: np.ndarray) -> None:
        """Appends a frame, uint8 [H, W, 3] BGR.

        Raises:
            OutputError: less than ``ROOM`` is left on the disk.
        """
        with writing(self.path):
            if self.frames % _LOOK_EVERY == 0:
                self._check_room()
            self._writer.write(picture)
        self.frames += 1

    def stop(self) -> None:
        """Ends the file where it is; it can be played, and keeps its name as a part."""
        self._writer.release()

    def close(self) -> None:
        """Ends the file and gives it its name.

        Raises:
            OutputError: not all frames are in it.
        """
        self.stop()
        capture = cv2.VideoCapture(str(self.part))
        there = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 0
        capture.release()
        with writing(self.path):
            if there != self.frames:
                reason = f"{there} of {self.frames} frames reached the disk"
                raise OSError(errno.EIO, reason, str(self.part))
            files.rename(self.part, self.path)


@contextmanager
def video_writer(path: Path, size: tuple[int, int], fps: float) -> Iterator[VideoWriter]:
    """An MP4 of frames of ``size`` (width, height); after an exception it stays a part."""
    writer = VideoWriter(path, size, fps)
    try:
        yield writer
        writer.close()
    finally:
        writer.stop()
