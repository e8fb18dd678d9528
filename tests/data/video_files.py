"""Small video files of every kind, made frame by frame."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np
from av.stream import Disposition

GREY, STEP = 20, 11


class Stream(NamedTuple):
    """A stream to be written; frame number n is a picture of grey ``GREY + STEP · n``.

    ``times`` are in ms; ``unit`` is that of the encoder, in seconds; ``shape`` a pixel's width by
    its height.
    """

    times: Sequence[int]
    size: tuple[int, int] = (64, 48)
    codec: str = "mpeg4"
    format: str = "yuv420p"
    options: dict[str, str] = {}  # noqa: RUF012 - never changed
    default: bool = True
    unit: Fraction = Fraction(1, 25)
    shape: Fraction = Fraction(1)


def write_video(path: Path, *streams: Stream, **options: Any) -> Path:
    """Writes a file of the kind that its name says; ``options`` are the container's."""
    with av.open(str(path), "w", **options) as container:
        opened = []
        for stream in streams:
            out = container.add_stream(stream.codec, rate=25, options=stream.options)
            out.width, out.height = stream.size
            out.pix_fmt = stream.format
            out.codec_context.time_base = stream.unit
            out.codec_context.sample_aspect_ratio = stream.shape
            out.disposition = Disposition.default.value if stream.default else 0
            opened.append(out)
        for out, stream in zip(opened, streams, strict=True):
            for number, time in enumerate(stream.times):
                picture = np.full((*stream.size[::-1], 3), GREY + STEP * number, np.uint8)
                frame = av.VideoFrame.from_ndarray(picture, "bgr24").reformat(format=stream.format)
                frame.pts, frame.time_base = time, Fraction(1, 1000)
                container.mux(out.encode(frame))
            container.mux(out.encode(None))
    return path


def numbers_of(pictures: Sequence[np.ndarray]) -> list[int]:
    """The number of each frame of ``write_video``, told by its grey."""
    return [round((picture.mean() - GREY) / STEP) for picture in pictures]


def boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, start and end of the boxes of an MP4 in a part of it."""
    while start < end:
        (size,) = struct.unpack_from(">I", data, start)
        yield data[start + 4 : start + 8], start, start + size
        start += size


def box(name: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return struct.pack(">I", 8 + len(body)) + name + body


def edit_list(path: Path, milliseconds: int) -> None:
    """Cuts an MP4 as phones do: an edit list shows its first part alone."""
    data = bytearray(path.read_bytes())
    at = data.index(b"elst") + 12
    struct.pack_into(">I", data, at, milliseconds)  # in the movie's unit, which is 1 ms
    path.write_bytes(data)


def display_matrix(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Writes an MP4's display matrix, which turns and mirrors pictures."""
    data = bytearray(path.read_bytes())
    one = 1 << 16
    at = data.index(b"tkhd") + 44
    struct.pack_into(">9i", data, at, a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def cover_first(path: Path, jpeg: bytes) -> None:
    """Gives an MP4 a cover picture that stands before the video, as its first stream."""
    data = path.read_bytes()
    start, end = next((a, b) for name, a, b in boxes(data, 0, len(data)) if name == b"moov")
    assert end == len(data), "offsets in it would have to be moved"
    cover = box(b"covr", box(b"data", struct.pack(">II", 13, 0), jpeg))
    handler = box(b"hdlr", struct.pack(">II", 0, 0), b"mdirappl", bytes(9))
    meta = box(b"meta", bytes(4), handler, box(b"ilst", cover))
    parts = [data[a:b] for name, a, b in boxes(data, start + 8, end) if name != b"udta"]
    path.write_bytes(data[:start] + box(b"moov", parts[0], box(b"udta", meta), *parts[1:]))
