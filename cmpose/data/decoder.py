"""Decodes the video stream of a file with FFmpeg, through PyAV.

OpenCV is not used for files: it decodes the first stream, be it a cover picture, shows nothing of
interlaced video but black or what lies in memory, and takes damage for the end.
``docs/decisions.md`` has more.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from av.stream import Disposition
from av.video.stream import VideoStream

_OPENING: dict[str, Any] = (
    {} if int(av.__version__.partition(".")[0]) >= 19 else {"metadata_errors": "ignore"}
)
"""Titles and the like may be in any encoding; PyAV before 19 decodes them when it opens a file."""

_NO_RATE = 1000.0
"""A rate in a header from here on is no rate, but the unit of its time stamps in place of one."""


class Decoder:
    """An open file, of which frames are decoded from the first on, once.

    Frames of more than ``most_pixels`` are lost as if they were damaged.

    Attributes:
        rate: frames a second by the header; 0 where it does not say.
        frames: how many there are by the header; 0 where it does not say.
        streams: video streams; a picture such as a cover is none.
        size: (width, height) of frames by the header, before they are turned.
        pixel_shape: a pixel's width divided by its height; 1 where nothing says.

    Raises:
        FFmpegError: it cannot be opened.
        LookupError: there is no video stream in it that FFmpeg decodes.
    """

    def __init__(self, path: Path, most_pixels: int) -> None:
        self._container = av.open(str(path), **_OPENING)
        try:
            self._stream = self._choose()
        except LookupError:
            self.close()
            raise
        # With threads for whole frames, how many are lost at damage depends on their number.
        self._stream.thread_type = "SLICE"
        context = self._stream.codec_context
        context.options = {"max_pixels": str(most_pixels)}
        self.size = context.width, context.height
        self.pixel_shape = self._stream.sample_aspect_ratio or Fraction(1)
        rate = float(self._stream.average_rate or self._stream.guessed_rate or 0)
        self.rate = rate if rate < _NO_RATE else 0.0
        seconds = (self._container.duration or 0) / av.time_base
        self.frames = self._stream.frames or max(0, round(seconds * self.rate))

    def _choose(self) -> VideoStream:
        """The stream that players show: FFmpeg's best one."""
        videos = [
            stream
            for stream in self._container.streams.video
            if stream.codec_context is not None  # FFmpeg knows its codec
            and not stream.disposition & Disposition.attached_pic
        ]
        self.streams = len(videos)
        best = self._container.streams.best("video")
        if best in videos:
            assert isinstance(best, VideoStream)
            return best
        if not videos:
            raise LookupError
        return videos[0]

    @property
    def stream(self) -> int:
        """The number of the stream that is decoded, as FFmpeg counts."""
        return self._stream.index

    def __iter__(self) -> Iterator[tuple[av.VideoFrame, bool]]:
        """Frames, and whether some before them were lost because they could not be decoded."""
        lost = False
        packets = self._container.demux(self._stream)
        while True:
            try:
                packet = next(packets, None)
            except FFmpegError:  # the file ends in the middle of a packet
                return
            if packet is None:
                return
            try:
                frames = packet.decode()
            except FFmpegError:
                lost = True
                continue
            for frame in frames:
                yield frame, lost
                lost = False

    def close(self) -> None:
        self._container.close()


def to_bgr(frame: av.VideoFrame) -> np.ndarray:
    """A frame as uint8 [H, W, 3] BGR, upright and mirrored as its display matrix says."""
    return upright(frame.to_ndarray(format="bgr24"), _display_matrix(frame))


def _display_matrix(frame: av.VideoFrame) -> np.ndarray | None:
    data: Any = frame.side_data.get("DISPLAYMATRIX")
    return None if data is None else np.frombuffer(bytes(data), np.int32).reshape(3, 3)


def upright(picture: np.ndarray, matrix: np.ndarray | None) -> np.ndarray:
    """Applies the turn, by quarters, and the mirroring of a display matrix.

    Args:
        picture: [H, W, 3].
        matrix: [3, 3] of a ``tkhd`` box (ISO/IEC 14496-12): it takes row vectors (x, y, 1), with
            y downwards, to where they are shown. None leaves the picture.
    """
    if matrix is None:
        return picture
    (a, b), (c, d) = np.sign(matrix[:2, :2] * (np.abs(matrix[:2, :2]) > 1 << 15))
    if a == 0 and d == 0 and b and c:  # x is shown downwards or upwards
        picture, a, d = picture.transpose(1, 0, 2), c, b
    return np.ascontiguousarray(picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])
