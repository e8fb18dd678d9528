"""What a video file says of its own length in bytes, by which a file that was cut off is told.

Nothing is decoded. MP4 (ISO/IEC 14496-12), Matroska and WebM (RFC 9559) and AVI (RIFF) say how
long their parts are. MPEG streams do not, nor do files that were written while they were sent.
"""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO, NamedTuple

_FIRST_BOXES = (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp")
_EBML, _SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"
_MOST_PARTS = 1 << 20
"""So many parts of a file are walked through at most; an MP4 in fragments has very many."""


class Container(NamedTuple):
    """What was found.

    Attributes:
        bytes: how long the file is.
        promised: how long it should be at least; 0 where it does not say.
        joined: how many videos lie in it one behind the other, of which players read the first.
    """

    bytes: int
    promised: int
    joined: int = 1

    @property
    def cut_off(self) -> bool:
        return self.bytes < self.promised


def read_container(path: Path) -> Container:
    """Walks through the outermost parts of a file; of an unknown kind it says nothing."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(12)
        if head[4:8] in _FIRST_BOXES:
            return _walk_mp4(file, size)
        if head[:4] == _EBML:
            return Container(size, _matroska_end(file, size))
        if head[:4] == b"RIFF" and head[8:] == b"AVI ":
            return _walk_riff(file, size)
    return Container(size, 0)


def _walk_mp4(file: BinaryIO, size: int) -> Container:
    """Boxes: 4 bytes of length, 4 of name; 1 is a length of 8 bytes behind, 0 up to the end."""
    at = movies = 0
    for _ in range(_MOST_PARTS):
        file.seek(min(at, size))
        head = file.read(16)
        if len(head) < 8:
            return Container(size, at, max(1, movies))
        length, name = int.from_bytes(head[:4], "big"), head[4:8]
        if length == 1:
            length = int.from_bytes(head[8:], "big")
        if length < 8 or not name.isascii() or not name.decode("ascii").isprintable():
            break
        movies += name == b"moov"
        at += length
    return Container(size, 0, max(1, movies))


def _matroska_end(file: BinaryIO, size: int) -> int:
    """The end of the last segment; what ``cat`` joined is read as one video."""
    at = end = 0
    for _ in range(_MOST_PARTS):
        file.seek(min(at, size))
        head = file.read(12)
        if head[:4] not in (_EBML, _SEGMENT):
            return end
        width = 9 - head[4].bit_length() if len(head) > 4 and head[4] else 0
        digits = head[4 : 4 + width]
        length = int.from_bytes(digits, "big") - (1 << 7 * width)
        if not width or len(digits) < width or length == (1 << 7 * width) - 1:
            return 0  # all ones: of unknown length, as in a recording that is sent
        at += 4 + width + length
        end = at
    return 0


def _walk_riff(file: BinaryIO, size: int) -> Container:
    """RIFF chunks: AVI, then AVIX where it is longer than 1 GB; another AVI is another video."""
    at = movies = 0
    for _ in range(_MOST_PARTS):
        file.seek(at)
        head = file.read(12)
        length = int.from_bytes(head[4:8], "little")
        if head[:4] != b"RIFF" or length in (0, 0xFFFFFFFF):
            return Container(size, at, max(1, movies))
        movies += head[8:] == b"AVI "
        at += 8 + length + length % 2
    return Container(size, 0)
