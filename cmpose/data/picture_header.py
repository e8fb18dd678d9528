"""What a picture's header says before anything is decoded: its size, depth and orientation.

Each format's reader takes a file that stands behind the magic bytes. A field that is cut off reads
as 0, and a picture of width or height 0 counts as one without a header.
"""

from __future__ import annotations

import io
import re
from typing import BinaryIO, Literal, NamedTuple

_ENDS: dict[bytes, Literal["little", "big"]] = {b"II": "little", b"MM": "big"}
_MOST = 1 << 16
"""More segments, chunks, tags or boxes than this are no picture."""
_PAGES = 16
"""So many lists of tags of a TIFF are looked at for a second picture."""
_FAR = 1 << 40
"""No picture is as long; systems refuse to look farther."""


class PictureHeader(NamedTuple):
    """A picture's header.

    Attributes:
        format: ``JPEG``, ``PNG``, ``WebP``, ``TIFF``, ``BMP``, ``PNM`` or ``JPEG 2000``.
        width: of the stored pixels.
        height: likewise.
        orientation: the EXIF tag, 1 to 8; 1 is upright, and what a file without it has.
        white: the largest value that a sample can have: 255, 65535, or what a PNM says.
        patches: of a TIFF, positions and the bytes to put there, so that OpenCV decodes the pixels
            as they are stored: else it turns them, and darkens them by an alpha channel.
        least_bytes: fewer bytes cannot hold a JPEG of this size.
        several: whether there is more than one picture in it: an animated PNG or WebP, a TIFF of
            pages. Reduced ones, such as previews, are not counted.
    """

    format: str
    width: int
    height: int
    orientation: int = 1
    white: int = 255
    patches: tuple[tuple[int, bytes], ...] = ()
    least_bytes: int = 0
    several: bool = False

    @property
    def stored_size(self) -> tuple[int, int]:
        """(width, height) of the pixels in the file."""
        return self.width, self.height

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the upright picture."""
        return (self.height, self.width) if self.orientation >= 5 else (self.width, self.height)


def read_header(file: BinaryIO) -> PictureHeader | None:
    """The header of a picture; None for what is none of the formats, or is cut off in it.

    Args:
        file: at its beginning, seekable. Wherever possible pixels are passed over, not read.
    """
    start = file.read(12)
    header = None
    if start[:2] == b"\xff\xd8":
        file.seek(2)
        header = _jpeg(file)
    elif start[:8] == b"\x89PNG\r\n\x1a\n":
        file.seek(8)
        header = _png(file)
    elif start[:4] == b"RIFF" and start[8:] == b"WEBP":
        header = _webp(file)
    elif start[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        file.seek(0)
        header = _tiff(file)
    elif start[:2] == b"BM":
        file.seek(14)
        header = _bmp(file)
    elif re.match(rb"P[1-6]\s", start):
        file.seek(0)
        header = _pnm(file)
    elif start[:4] == b"\xff\x4f\xff\x51" or start[4:] == b"jP  \r\n\x87\n":
        file.seek(0)
        header = _jpeg2000(file)
    return header if header and header.width > 0 and header.height > 0 else None


def _int(file: BinaryIO, count: int, end: Literal["little", "big"] = "big") -> int:
    return int.from_bytes(file.read(count), end)


def _orientation(exif: bytes) -> int:
    """The orientation in an EXIF block, which is a TIFF without a picture; 1 if there is none."""
    header = _tiff(io.BytesIO(exif)) if exif[:2] in _ENDS else None
    return header.orientation if header else 1


def _jpeg(file: BinaryIO) -> PictureHeader | None:
    orientation, has_exif = 1, False
    for _ in range(_MOST):
        marker = file.read(1)
        if not marker:
            break
        if marker != b"\xff":  # decoders pass over bytes between segments
            continue
        while marker == b"\xff":  # fill bytes may stand before a marker
            marker = file.read(1)
        code = int.from_bytes(marker, "big")
        if code in (0x00, 0x01) or 0xD0 <= code <= 0xD8:
            continue  # they have no length
        if code in (0xD9, 0xDA):  # the end, or pixels
            break
        length = _int(file, 2) - 2
        if length < 0:
            break
        # These segments hold the size, one for each way of coding; C4, C8 and CC do not.
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            file.read(1)
            height, width = _int(file, 2), _int(file, 2)
            parts = file.read(3 * _int(file, 1))
            least = _least_bytes(width, height, parts[1::3]) if code in (0xC0, 0xC1, 0xC2) else 0
            return PictureHeader("JPEG", width, height, orientation, least_bytes=least)
        if code == 0xE1 and not has_exif:
            block = file.read(length)
            has_exif = block[:5] == b"Exif\0"
            if has_exif:
                orientation = _orientation(block[6:])
        else:
            file.seek(length, io.SEEK_CUR)
    return None


def _least_bytes(width: int, height: int, factors: bytes) -> int:
    """A Huffman code has a bit at least, and each 8×8 block of each channel one code at least.

    Args:
        width: of the picture.
        height: likewise.
        factors: of each channel: how often it is sampled across and down, four bits each.
    """
    across, down = [f >> 4 for f in factors], [f & 15 for f in factors]
    bits = 0
    for x, y in zip(across, down, strict=True):
        bits += width * x // (8 * max(1, *across)) * (height * y // (8 * max(1, *down)))
    return bits // 8


def _png(file: BinaryIO) -> PictureHeader | None:
    file.seek(4, io.SEEK_CUR)
    if file.read(4) != b"IHDR":
        return None
    width, height, depth = _int(file, 4), _int(file, 4), _int(file, 1)
    file.seek(8, io.SEEK_CUR)
    white, orientation, several = 65535 if depth == 16 else 255, 1, False
    for _ in range(_MOST):  # the tag may stand before the pixels or behind them
        length, kind = _int(file, 4), file.read(4)
        if kind in (b"", b"IEND"):
            break
        after = file.tell() + length + 4
        if kind == b"acTL":
            several = _int(file, 4) > 1
        elif kind == b"eXIf":
            orientation = _orientation(file.read(min(length, _MOST)))
        file.seek(after)
    return PictureHeader("PNG", width, height, orientation, white, several=several)


def _webp(file: BinaryIO) -> PictureHeader | None:
    width = height = frames = 0
    orientation = 1
    for _ in range(_MOST):
        kind, length = file.read(4), _int(file, 4, "little")
        if len(kind) < 4:
            break
        after = file.tell() + length + length % 2
        if kind == b"VP8X":
            file.seek(4, io.SEEK_CUR)
            width, height = _int(file, 3, "little") + 1, _int(file, 3, "little") + 1
        elif kind == b"VP8 " and not width:
            file.seek(6, io.SEEK_CUR)
            width, height = _int(file, 2, "little") & 0x3FFF, _int(file, 2, "little") & 0x3FFF
            break  # a file without VP8X has no EXIF block
        elif kind == b"VP8L" and not width:
            file.seek(1, io.SEEK_CUR)
            bits = _int(file, 4, "little")
            width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
            break
        elif kind == b"ANMF":
            frames += 1
        elif kind == b"EXIF":
            orientation = _orientation(file.read(min(length, _MOST)).removeprefix(b"Exif\0\0"))
        file.seek(after)
    return PictureHeader("WebP", width, height, orientation, several=frames > 1)


_SIZES = {1: 1, 3: 2, 4: 4, 16: 8}
"""Bytes of a TIFF value by its type: BYTE, SHORT, LONG and LONG8, which sizes can have."""


class _Page(NamedTuple):
    """A list of a TIFF's tags: their numbers, where some values stand, and where the next list is.

    Attributes:
        tags: tag → the first of its values, if that is a number.
        patches: see :class:`PictureHeader`.
        next: 0 behind the last page.
    """

    tags: dict[int, int]
    patches: tuple[tuple[int, bytes], ...]
    next: int


def _page(file: BinaryIO, end: Literal["little", "big"], *, big: bool) -> _Page:
    word = 8 if big else 4
    tags: dict[int, int] = {}
    patches = []
    for _ in range(min(_int(file, 8 if big else 2, end), _MOST)):
        tag, kind, count = _int(file, 2, end), _int(file, 2, end), _int(file, word, end)
        value = file.tell()
        size = _SIZES.get(kind, 0)
        if size * count > word:
            file.seek(min(_int(file, word, end), _FAR))
        if size and count and tag not in tags:
            if tag in (274, 338):  # upright; colours that alpha has been applied to
                patches.append((file.tell(), (1).to_bytes(size, end)))
            tags[tag] = _int(file, size, end)
        file.seek(value + word)
    return _Page(tags, tuple(patches), _int(file, word, end))


def _tiff(file: BinaryIO) -> PictureHeader | None:
    """A TIFF, a BigTIFF, or the block of EXIF tags in another file: the first list of tags."""
    end = _ENDS[file.read(2)]
    big = _int(file, 2, end) == 43
    if big:
        file.seek(4, io.SEEK_CUR)
    file.seek(min(_int(file, 8 if big else 4, end), _FAR))
    first = page = _page(file, end, big=big)
    several = False
    for _ in range(_PAGES):
        if several or not 0 < page.next < _FAR:
            break
        file.seek(page.next)
        page = _page(file, end, big=big)
        # A reduced picture, or the mask of another one, is none of its own.
        several = page.tags.get(256, 0) > 0 and not page.tags.get(254, 0) & 0b101
    orientation = first.tags.get(274, 1)
    return PictureHeader(
        "TIFF",
        first.tags.get(256, 0),
        first.tags.get(257, 0),
        orientation if 1 <= orientation <= 8 else 1,
        65535 if first.tags.get(258, 1) > 8 else 255,
        first.patches,
        several=several,
    )


def _bmp(file: BinaryIO) -> PictureHeader | None:
    size = _int(file, 4, "little")
    count = 2 if size == 12 else 4
    width, height = (
        int.from_bytes(file.read(count), "little", signed=count == 4) for _ in range(2)
    )
    return PictureHeader("BMP", width, abs(height))  # a negative height counts from the top


def _pnm(file: BinaryIO) -> PictureHeader | None:
    text = re.sub(rb"#[^\r\n]*", b"", file.read(4096))
    kind, bitmap = text[1:2], text[1:2] in b"14"
    words = text[2:].split(maxsplit=3)[: 2 if bitmap else 3]
    if not all(word.isdigit() and len(word) < 10 for word in words):
        return None
    width, height, white = (*map(int, words), 255, 0, 0)[:3]
    if not 1 <= white <= 65535:
        return None
    if kind in b"23" and white < 255:  # of text OpenCV makes 0 to 255 itself
        white = 255
    return PictureHeader("PNM", width, height, white=white)


def _jpeg2000(file: BinaryIO) -> PictureHeader | None:
    if file.read(4) != b"\xff\x4f\xff\x51":  # boxes, one of which holds the stream of pixels
        file.seek(0)
        for _ in range(_MOST):
            begin = file.tell()
            length, kind = _int(file, 4), file.read(4)
            if length == 1:
                length = _int(file, 8)
            if kind == b"jp2c":
                file.seek(4, io.SEEK_CUR)
                break
            if length < 8:
                return None
            file.seek(min(begin + length, _FAR))
    file.seek(4, io.SEEK_CUR)
    right, bottom, left, top = (_int(file, 4) for _ in range(4))
    file.seek(18, io.SEEK_CUR)
    depth = (_int(file, 1) & 0x7F) + 1
    return PictureHeader("JPEG 2000", right - left, bottom - top, white=65535 if depth > 8 else 255)
