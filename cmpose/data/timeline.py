"""How many frames a video has, how far they are apart, and where it could not be decoded."""

from __future__ import annotations

import math
from typing import NamedTuple

import av

from cmpose.data.container import Container


class Timeline:
    """What decoding a video from its start tells; frames are added one by one.

    Attributes:
        frames: so many were decoded.
        seconds: from the first frame to the last; where time stamps go back, as in streams that
            were joined, and where frames were lost, nothing is added.
        shortest: seconds between two frames; infinite before there are two.
        longest: likewise; 0 before.
        holes: how often frames were lost because they could not be decoded.
        partly: frames that were decoded in part.
        interlaced: frames of two fields.
        first_damaged: number of the first frame that is one of ``partly`` or behind a hole.
    """

    def __init__(self) -> None:
        self.frames = self.holes = self.partly = self.interlaced = 0
        self.first_damaged: int | None = None
        self.seconds, self.shortest, self.longest = 0.0, math.inf, 0.0
        self._last = math.nan
        self._gaps = 0
        self._squares = 0.0

    def add(self, frame: av.VideoFrame, *, lost: bool) -> None:
        """Adds the next frame; ``lost`` says that some before it could not be decoded."""
        self.holes += lost
        self.partly += frame.is_corrupt
        self.interlaced += frame.interlaced_frame
        if (lost or frame.is_corrupt) and self.first_damaged is None:
            self.first_damaged = self.frames
        self.frames += 1
        seconds = math.nan if frame.time is None else frame.time
        gap = seconds - self._last
        self._last = seconds
        if gap >= 0 and not lost:  # not so for the first, which is NaN
            self._gaps += 1
            self.seconds += gap
            self._squares += gap * gap
            self.shortest, self.longest = min(self.shortest, gap), max(self.longest, gap)

    def rate(self, header: float) -> float:
        """Frames a second: the header's, or by the time stamps if they say something else."""
        if not self.seconds:
            return header
        # Many containers round time stamps to milliseconds.
        if abs(self._gaps / header - self.seconds) <= max(0.002, 0.005 * self.seconds):
            return header
        return self._gaps / self.seconds

    @property
    def length(self) -> float:
        """Seconds that the frames are shown, the last one as long as they all on average."""
        return self.seconds * (1 + 1 / self._gaps) if self._gaps else 0.0

    @property
    def varies(self) -> bool:
        """Whether the rate is variable: frames' distances deviate by more than a tenth."""
        if not self.seconds:
            return False
        mean = self.seconds / self._gaps
        return self._squares / self._gaps - mean * mean > (0.1 * mean) ** 2


class Findings(NamedTuple):
    """What is known of a file once it was decoded, beside its frames.

    Attributes:
        notes: for people, each a sentence without a full stop.
        cut_off: for people, what is known of a file that ends too early; else empty.
        missing: how many frames more the header names, of a file that is cut off or damaged.
    """

    notes: tuple[str, ...]
    cut_off: str = ""
    missing: int = 0


def findings(
    source: str, timeline: Timeline, container: Container, header_frames: int, header_rate: float
) -> Findings:
    """Compares what was decoded with what the file says of itself.

    Args:
        source: the file, as messages name it.
        timeline: of all its frames.
        container: its length in bytes.
        header_frames: how many frames its header names; 0 where it does not say.
        header_rate: frames a second by the header.
    """
    count, rate, notes = timeline.frames, timeline.rate(header_rate), []
    if timeline.varies:
        notes.append(
            f"{source} has a variable rate: its frames are {timeline.shortest * 1e3:.0f} to "
            f"{timeline.longest * 1e3:.0f} ms apart, {rate:.2f} a second on average"
        )
    if timeline.interlaced:
        notes.append(
            f"{source} is interlaced: what moves has combs, for two moments share a picture; "
            "ffmpeg -i FILE -vf bwdif NEW takes them apart"
        )
    if container.joined > 1:
        notes.append(
            f"{source} is {container.joined} files one behind the other, of which only the first "
            "can be read; ffmpeg -f concat joins videos"
        )
    missing, header_seconds = max(0, header_frames - count), header_frames / header_rate
    if container.cut_off and (missing or not header_frames):
        cut_off = (
            f"{source} is cut off: {container.bytes} bytes are there, its header promises "
            f"{container.promised}; {count} frames can be decoded"
        )
        cut_off += f" of about {header_frames}" if header_frames else ""
        return Findings(tuple(notes), cut_off, missing)
    if timeline.first_damaged is not None:
        notes.append(
            f"{source} is damaged, first at frame {timeline.first_damaged} ({timeline.holes} gaps, "
            f"{timeline.partly} frames decoded in part); lost frames have no number, those behind "
            "are counted on"
        )
        return Findings(tuple(notes), missing=missing)
    # The last frame may stand longer than the others.
    if timeline.seconds and timeline.length + 2 / rate < 0.95 * header_seconds:
        notes.append(
            f"the header of {source} names {header_frames} frames, {header_seconds:.2f} s; {count} "
            f"can be decoded, {timeline.length:.2f} s. The file is not known to be cut off: frames "
            "were taken out of it, or are damaged, or the last one stands that long"
        )
    return Findings(tuple(notes))
