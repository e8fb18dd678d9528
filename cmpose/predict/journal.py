"""Keeps what a prediction has done so far: one JSON line for each frame, and its settings.

Each line ends in a checksum of itself. A run that was killed goes on behind the last line that is
as it was written. ``docs/predict.md`` describes the lines.
"""

from __future__ import annotations

import errno
import json
import os
import re
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from msgspec import Struct, field

from cmpose.data.formats.messages import short
from cmpose.data.formats.reader import Count, Number, Whole, convert, parse, read
from cmpose.data.video import NOT_DECODED
from cmpose.files import claim, write_json, writing
from cmpose.predict.detectors.detect import Detection
from cmpose.predict.frame import PredictedFrame, PredictedPerson

SETTINGS, FRAMES, FINISHED = "settings.json", "frames.jsonl", "finished.json"
FORMAT = 2
"""Of the lines: 2 is with checksums. ``settings.json`` holds it as ``journal``."""

_SYNC_SECONDS = 5.0
"""A power cut loses at most so many seconds of work."""

_CHECKSUM = re.compile(rb', "crc32": "([0-9a-f]{8})"}\n', re.ASCII)
"""The end of a line: the checksum of what stands before it."""


class JournalError(RuntimeError):
    """A journal that is damaged or of something else; the message says what to do."""


_ANEW = "run with --overwrite to start anew"


class PersonInLine(Struct):
    """A person of a line, as :class:`PredictedPerson` has it."""

    track_id: Whole
    score: Number
    box: tuple[Number, Number, Number, Number]
    keypoints: list[tuple[Number, Number]]
    scores: list[Number]
    interpolated: bool = False


class FrameLine(Struct):
    """A line: a frame, its people, and the detector's boxes in it (x, y, w, h, score)."""

    frame: Count
    people: list[PersonInLine]
    detections: list[tuple[Number, Number, Number, Number, Number]] | None = field(
        default=None, name="found"
    )
    unreadable: bool = False
    explained: list[str] = []


class Journal:
    """The frames of one video that have been predicted, on disk.

    Attributes:
        folder: that it lies in.
        done: how many frames have a line.
        ended: whether the last frame of the video has one.
        dropped: for people, what was cut off because a line was not as it was written; or empty.
        finished: what ``finish`` was given when the results were written, or None.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / FRAMES
        self.done, self.ended, self.dropped = 0, False, ""
        self.finished: dict[str, Any] | None = None
        if (folder / FINISHED).exists():
            self.finished = read(folder / FINISHED, dict[str, Any], JournalError, _ANEW)
            return
        size = self._read()
        with writing(self.path):
            self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115
            self._file.truncate(size)
            self._file.seek(size)
        self._size, self._synced = size, time.monotonic()

    def _read(self) -> int:
        """Sets what is there, and returns how many bytes of it are to be kept."""
        whole_bytes = size = number = 0
        with writing(self.path), open(self.path, "a+b") as file:
            file.seek(0)
            for line in file:
                if not _is_whole(line, number):
                    number += 1
                    last = number + sum(1 for _ in file)
                    # A kill or a power cut leaves part of the last line, which is no news.
                    if last > number or line.endswith(b"\n"):
                        self.dropped = (
                            f"{self.path}: line {number} is not as it was written: lines "
                            f"{self.done + 1} to {last} are dropped, the run goes on from there"
                        )
                    break
                size += len(line)
                self.ended = line.startswith(b'{"end"')
                if self.ended:
                    return size
                number += 1
                # Frames that were predicted together are kept or dropped together: in other
                # batches the network's results differ in their last digits.
                if not line.startswith(_start(number - 1, more=True)):
                    self.done, whole_bytes = number, size
        return whole_bytes

    def frames(self) -> Iterator[PredictedFrame]:
        """The frames from the first on, without their pictures, read as they are asked for.

        Raises:
            JournalError: a line is damaged; the message names it.
        """
        with open(self.path, "rb") as file:
            for number in range(self.done):
                where = f"{self.path}: line {number + 1}"
                text = _CHECKSUM.sub(b"}", file.readline())
                document = parse(text, where, JournalError, _ANEW)
                line = convert(document, FrameLine, where, JournalError, remedy=_ANEW)
                yield _frame(line)

    def append(self, frames: Sequence[PredictedFrame]) -> None:
        """Adds the next frames, which were predicted together.

        Raises:
            OutputError: the disk is full; none of ``frames`` is there then, all before are.
        """
        last = len(frames) - 1
        lines = [with_checksum(_line(frame, last - i)) for i, frame in enumerate(frames)]
        self._write(b"".join(lines))
        self.done += len(frames)

    def end(self) -> None:
        """Notes that there are no more frames."""
        self._write(with_checksum({"end": self.done}))
        with writing(self.path):
            os.fsync(self._file.fileno())
        self.ended = True

    def finish(self, metrics: dict[str, Any]) -> None:
        """Notes that the results are written; the lines are no longer needed."""
        write_json(self.folder / FINISHED, metrics)
        self.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        if self.finished is None:
            self._file.close()

    def _write(self, data: bytes) -> None:
        """Appends ``data``, all or nothing of it."""
        view = memoryview(data)
        with writing(self.path):
            if not os.fstat(self._file.fileno()).st_nlink:
                # Someone deleted it. Writing would go on without an error, and all would be lost.
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))
            try:
                while view:  # an unbuffered file may take less than it is given
                    view = view[self._file.write(view) :]
                if time.monotonic() - self._synced > _SYNC_SECONDS:
                    os.fsync(self._file.fileno())
                    self._synced = time.monotonic()
            except OSError:
                self._file.truncate(self._size)
                self._file.seek(self._size)
                raise
        self._size += len(data)


def _line(frame: PredictedFrame, more: int) -> dict[str, Any]:
    """A frame as plain data; ``more`` frames follow that were predicted together with it."""
    people = []
    for person in frame.people:
        entry = {
            "track_id": person.track_id,
            "score": person.score,
            "box": person.box.tolist(),
            "keypoints": person.keypoints.tolist(),
            "scores": person.scores.tolist(),
        }
        people.append(entry | ({"interpolated": True} if person.interpolated else {}))
    line: dict[str, Any] = {"frame": frame.number}
    if more:
        line["more"] = more
    line["people"] = people
    if frame.detections is not None:
        line["found"] = [[*d.box.tolist(), d.score] for d in frame.detections]
    if not frame.readable:
        line["unreadable"] = True
    if frame.explained:
        line["explained"] = list(frame.explained)
    return line


def _frame(line: FrameLine) -> PredictedFrame:
    """The frame that ``_line`` made this of, without its picture."""
    people = [
        PredictedPerson(
            track_id=entry.track_id,
            score=entry.score,
            box=np.array(entry.box, np.float64),
            keypoints=np.array(entry.keypoints, np.float64),
            scores=np.array(entry.scores, np.float64),
            interpolated=entry.interpolated,
        )
        for entry in line.people
    ]
    detections = None
    if line.detections is not None:
        detections = [Detection(np.array(box), score) for *box, score in line.detections]
    return PredictedFrame(
        line.frame,
        NOT_DECODED,
        people,
        readable=not line.unreadable,
        detections=detections,
        explained=line.explained,
    )


def with_checksum(line: dict[str, Any]) -> bytes:
    """A line as it is written: JSON whose last key, ``crc32``, is of the text before it."""
    text = json.dumps(line, allow_nan=False).encode()[:-1]
    return text + b', "crc32": "%08x"}\n' % zlib.crc32(text)


def _start(frame: int, *, more: bool = False) -> bytes:
    return b'{"frame": %d, %s' % (frame, b'"more": ' if more else b"")


def _is_whole(line: bytes, frame: int) -> bool:
    """Whether a line is that of a frame, or ends the frames before it, as it was written."""
    end = _CHECKSUM.search(line)
    return (
        end is not None
        and end.end() == len(line)
        and int(end[1], 16) == zlib.crc32(line[: end.start()])
        and line.startswith((_start(frame), b'{"end": %d,' % frame))
    )


@contextmanager
def open_journal(
    folder: Path, settings: dict[str, Any], *, overwrite: bool = False
) -> Iterator[Journal]:
    """Opens the journal of an interrupted run with the same settings, or a new one.

    Args:
        folder: of this video's journal; made if absent.
        settings: everything that the results depend on, as plain data under the names that messages
            use.
        overwrite: deletes the journal that is there.

    Raises:
        JournalError: the journal that is there has other settings, is of an earlier version of
            cmpose, or its settings or end are damaged. Damaged lines raise nothing, see
            ``Journal.dropped``.
        InUse: another run is writing it.
        OutputError: the folder cannot be made or written.
    """
    with claim(folder, "predict", "--out"):
        if overwrite:
            with writing(folder):
                for name in (FINISHED, FRAMES, SETTINGS):
                    (folder / name).unlink(missing_ok=True)
        _check(folder, settings)
        journal = Journal(folder)
        try:
            yield journal
        finally:
            journal.close()


def _check(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / SETTINGS
    if not path.exists():
        write_json(path, {"journal": FORMAT} | settings)
        return
    before = read(path, dict[str, Any], JournalError, _ANEW)
    # Of a finished run no line is read any more.
    if before.pop("journal", None) != FORMAT and not (folder / FINISHED).exists():
        raise JournalError(
            f"{path} holds a run that an earlier version of cmpose began, whose lines have no "
            f"checksums: finish it with that version, give another --out, or {_ANEW}"
        )
    now = json.loads(json.dumps(settings))
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            raise JournalError(
                f"{path} holds a run with other settings ({key:.80} was {short(before.get(key))}, "
                f"is {short(now.get(key))}): give them as they were to go on with it, another "
                "--out, or --overwrite to start anew"
            )
