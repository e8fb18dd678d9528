"""The one door through which picture files are decoded: upright, 8 bits, within a limit.

Every picture of the product comes through here. ``docs/data.md`` says what becomes of each kind.
"""

from __future__ import annotations

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import cv2
import numpy as np

from cmpose.data.picture_header import PictureHeader, read_header

PICTURES = frozenset(
    (
        *(".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"),
        *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2"),
    )
)
"""How the names of pictures end, in lower case."""

LIMIT = "CMPOSE_MAX_PIXELS"
"""The variable of the environment that sets how many pixels a picture may have."""

_SEVERAL = {
    "PNG": "is an animated PNG, a video: cmpose frames makes pictures of it",
    "WebP": "is an animated WebP, of which FFmpeg decodes no frame: take it apart first, e.g. by "
    "ImageMagick's magick FILE.webp -coalesce frames/%06d.png",
    "TIFF": "holds several pages, and one picture is expected: take them apart first, e.g. by "
    "ImageMagick's magick FILE.tif frames/%06d.png",
}
"""What is said of a file with several pictures, by its format."""

_DEFAULT_LIMIT, _OPENCV_LIMIT = 100_000_000, 1 << 30


class FrameError(RuntimeError):
    """A frame that is missing, unreadable or of the wrong size; the message names the file.

    Attributes:
        reason: what went wrong in few words, as counters of what was left out name it.
    """

    def __init__(self, message: str, reason: str = "frame unreadable") -> None:
        super().__init__(message)
        self.reason = reason


def is_picture(name: str) -> bool:
    """Whether a file's name is a picture's: ``._1.jpg``, ``.DS_Store`` and ``Thumbs.db`` are none.

    Hidden files are never a picture of a set: systems leave them beside pictures, under their
    names and endings.
    """
    return name[:1] != "." and os.path.splitext(name)[1].lower() in PICTURES


def pixel_limit() -> int:
    """How many pixels a picture may have.

    Raises:
        ValueError: ``CMPOSE_MAX_PIXELS`` is no such number.
    """
    text = os.environ.get(LIMIT) or str(_DEFAULT_LIMIT)
    limit = int(text) if text.isdecimal() and len(text) < 12 else 0
    if not 1 <= limit <= _OPENCV_LIMIT:
        raise ValueError(
            f"{LIMIT}={text}: expected a number of pixels from 1 to {_OPENCV_LIMIT}, which is "
            "OpenCV's own limit"
        )
    return limit


def look(path: str | os.PathLike[str]) -> PictureHeader:
    """A picture's header, which is read without decoding the picture.

    Raises:
        FrameError: the file is missing, not a picture, has more pixels than the limit, or holds
            several pictures.
    """
    with _open(path) as file:
        return _checked(path, file)


def picture_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(width, height) of a picture as it stands upright, from its header.

    Raises:
        FrameError: as :func:`look`.
    """
    return look(path).size


def read_picture(path: str | os.PathLike[str]) -> np.ndarray:
    """Decodes a picture → uint8 [h, w, 3], BGR, turned upright by its orientation tag.

    Raises:
        FrameError: the file is missing, not a picture, has more pixels than the limit, holds
            several pictures, or is a JPEG that is cut off, whose rest OpenCV would fill with grey,
            with no more than a warning.
    """
    return read_with_header(path)[0]


def read_with_header(
    path: str | os.PathLike[str], factor: int = 1
) -> tuple[np.ndarray, PictureHeader]:
    """:func:`read_picture`, and the header, which tells the picture's own size.

    Args:
        path: of the file.
        factor: 1, 2, 4 or 8: the picture is shrunk by it, and its sides are rounded up. An upright
            JPEG is decoded at that size from fewer of its frequencies, which takes less time; its
            pixels are nearly the means of factor × factor pixels.
    """
    with _open(path) as file:
        header = _checked(path, file)
        file.seek(0)
        if header.format != "JPEG" or header.orientation != 1:
            return shrink_picture(_decode(path, file.read(), header), factor), header
        return _decode(path, file.read(), header, factor), header


def check_picture(path: str | os.PathLike[str]) -> PictureHeader:
    """A picture's header, once it is known to be whole.

    Raises:
        FrameError: as :func:`read_picture`. Of a JPEG only the ends are looked at, which is quick.
    """
    with _open(path) as file:
        header = _checked(path, file)
        file.seek(0)
        data = file.read()
    if header.format == "JPEG":
        _check_jpeg(path, data, header)
    else:
        _decode(path, data, header)
    return header


def decode_picture(data: bytes, name: str) -> np.ndarray:
    """:func:`read_picture` of a file's content; ``name`` is what messages call it."""
    return _decode(name, data, _checked(name, io.BytesIO(data)))


@contextmanager
def _open(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    try:
        # A pipe would be waited for, and a folder has a message of its own.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise FrameError(f"{path}: cannot be read: it is no file")
        with open(path, "rb") as file:
            yield file
    except OSError as error:
        raise FrameError(f"{path}: cannot be read: {error.strerror or error}") from error


def _checked(name: str | os.PathLike[str], file: BinaryIO) -> PictureHeader:
    header = read_header(file)
    if header is None:
        raise _unreadable(name, file.seek(0, io.SEEK_END))
    limit = pixel_limit()
    if header.width * header.height > limit:
        raise FrameError(
            f"{name}: {header.width}×{header.height} pixels by its header, more than the "
            f"{limit:,} that are decoded; make it smaller, or raise {LIMIT}",
            "picture too large",
        )
    if header.several:
        raise FrameError(f"{name}: {_SEVERAL[header.format]}", "several pictures in a file")
    return header


def _unreadable(name: str | os.PathLike[str], size: int) -> FrameError:
    return FrameError(f"{name}: not a readable picture ({size} bytes); extract it again")


def _check_jpeg(name: str | os.PathLike[str], data: bytes, header: PictureHeader) -> None:
    """Refuses what OpenCV would fill up with grey."""
    if data.rfind(b"\xff\xd9") < data.rfind(b"\xff\xda"):
        raise FrameError(f"{name}: the JPEG is cut off after {len(data)} bytes; extract it again")
    if len(data) < header.least_bytes:
        raise FrameError(
            f"{name}: its header says {header.width}×{header.height} pixels, for which {len(data)} "
            "bytes are too few; extract it again"
        )


def _check_png(name: str | os.PathLike[str], data: bytes) -> None:
    """Refuses a part that is longer than the file: OpenCV would take memory for it first."""
    at = 8
    while data[at + 4 : at + 8] not in (b"", b"IEND"):
        at += 12 + int.from_bytes(data[at : at + 4], "big")  # length, kind, checksum
    if at > len(data):
        raise FrameError(
            f"{name}: the PNG is damaged, or cut off after {len(data)} bytes; extract it again"
        )


_REDUCED = {
    1: cv2.IMREAD_COLOR,
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


def _decode(
    name: str | os.PathLike[str], data: bytes, header: PictureHeader, factor: int = 1
) -> np.ndarray:
    if header.format == "JPEG":
        _check_jpeg(name, data, header)
    if header.format == "PNG":
        _check_png(name, data)
    for at, patch in header.patches:
        data = data[:at] + patch + data[at + len(patch) :]
    flags = _REDUCED[factor] | cv2.IMREAD_IGNORE_ORIENTATION
    if header.white != 255:
        flags |= cv2.IMREAD_ANYDEPTH
    try:
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise FrameError(f"{name}: OpenCV does not decode it: {error.err or error}") from error
    if image is None:
        raise _unreadable(name, len(data))
    if image.shape[1::-1] != shrunk_size(header.stored_size, factor) or image.dtype not in (
        np.uint8,
        np.uint16,
    ):
        raise FrameError(
            f"{name}: its header says {header.width}×{header.height} pixels, it decodes to "
            f"{image.shape[1]}×{image.shape[0]} of {image.dtype}; save it again, with 8 or 16 bits"
        )
    return turn_picture(_eight_bits(image, header.white), header.orientation)


def _eight_bits(image: np.ndarray, white: int) -> np.ndarray:
    """Samples of more than 8 bits scaled to 0 to 255.

    Files of 16 bits often hold 10, 12 or 14, and few say so: white is the largest value of the
    fewest of 8, 10, 12, 14 and 16 bits that the picture's brightest sample needs.
    """
    if image.dtype == np.uint8 and white >= 255:
        return image
    if white == 65535:
        bits = max(8, int(image.max()).bit_length())
        white = (1 << bits + bits % 2) - 1
    return cv2.convertScaleAbs(image, alpha=255 / white)


def shrunk_size(picture_size: tuple[int, int], factor: int) -> tuple[int, int]:
    """(width, height) of a picture shrunk by a whole factor.

    The last row and column may stand for fewer than ``factor`` of the picture's.
    """
    return -(-picture_size[0] // factor), -(-picture_size[1] // factor)


def shrink_picture(picture: np.ndarray, factor: int) -> np.ndarray:
    """A picture [h, w, 3] shrunk by a whole factor: pixels are means of factor × factor pixels."""
    if factor == 1:
        return picture
    height, width = picture.shape[:2]
    size = shrunk_size((width, height), factor)
    below, right = size[1] * factor - height, size[0] * factor - width
    picture = cv2.copyMakeBorder(picture, 0, below, 0, right, cv2.BORDER_REPLICATE)
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def turn_picture(picture: np.ndarray, orientation: int) -> np.ndarray:
    """Stored pixels [h, w, 3] → upright ones.

    Args:
        picture: as in the file.
        orientation: EXIF's tag: 1 upright, 2 mirrored, 3 upside down, 4 mirrored and upside down,
            5 mirrored and 8, 6 to be turned clockwise, 7 mirrored and 6, 8 anticlockwise.
    """
    if orientation >= 5:
        picture = cv2.transpose(picture)
    flip = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}.get(orientation)
    return picture if flip is None else cv2.flip(picture, flip)


def turn_points(points: np.ndarray, orientation: int, size: tuple[int, int]) -> np.ndarray:
    """Points of stored pixels → the same points of the upright picture.

    Args:
        points: [..., 2], x and y; a pixel's coordinates are those of its centre.
        orientation: as in :func:`turn_picture`.
        size: (width, height) of the stored pixels.

    Returns:
        float64 [..., 2].
    """
    x, y = np.moveaxis(np.asarray(points, np.float64), -1, 0)
    width, height = size
    if orientation >= 5:
        x, y, width, height = y, x, height, width
    if orientation in (2, 3, 6, 7):
        x = width - 1 - x
    if orientation in (3, 4, 7, 8):
        y = height - 1 - y
    return np.stack([x, y], axis=-1)


def turn_box(box: np.ndarray, orientation: int, size: tuple[int, int]) -> np.ndarray:
    """A box x, y, width, height of stored pixels → float64 [4] of the upright picture.

    It covers whole pixels, from x to x + width − 1.
    """
    low = np.asarray(box[:2], np.float64)
    corners = turn_points(np.stack([low, low + box[2:] - 1]), orientation, size)
    low = corners.min(axis=0)
    return np.concatenate([low, corners.max(axis=0) - low + 1])


def is_mirrored(orientation: int) -> bool:
    """Whether the stored pixels show a mirrored picture, in which left and right are swapped."""
    return orientation in (2, 4, 5, 7)
