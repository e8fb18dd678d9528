"""Keeps what a prediction has done so far: one JSON line for each frame, and its settings.

A run that was killed goes on behind its last whole line. ``docs/predict.md`` describes the lines.
"""

from __future__ import annotations

import errno
import json
import os
import time
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
from cmpose.predict.detect import Detection
from cmpose.predict.frame import PredictedFrame, PredictedPerson

SETTINGS, FRAMES, FINISHED = "settings.json", "frames.jsonl", "finished.json"
_SYNC_SECONDS = 5.0
"""A power cut loses at most so many seconds of work."""


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
        finished: what ``finish`` was given when the results were written, or None.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / FRAMES
        self.done, self.ended = 0, False
        self.finished: dict[str, Any] | None = None
        if (folder / FINISHED).exists():
            self.finished = read(folder / FINISHED, dict[str, Any], JournalError, _ANEW)
            return
        size = 0
        with writing(self.path), open(self.path, "a+b") as file:
            file.seek(0)
            for line in file:
                if line == _end(self.done):
                    self.ended = True
                elif not _is_whole(line, self.done):
                    # Torn by a kill or a power cut; but of what comes behind, nothing is whole.
                    if any(map(_is_whole, file)):
                        raise JournalError(
                            f"{self.path}: line {self.done + 1}: damaged, and behind it are whole "
                            f"lines; delete it and those behind it to go on from there, or {_ANEW}"
                        )
                    break
                else:
                    self.done += 1
                size += len(line)
                if self.ended:
                    break
        with writing(self.path):
            self._file = open(self.path, "r+b", buffering=0)  # noqa: SIM115
            self._file.truncate(size)
            self._file.seek(size)
        self._size, self._synced = size, time.monotonic()

    def frames(self) -> Iterator[PredictedFrame]:
        """The frames from the first on, without their pictures, read as they are asked for.

        Raises:
            JournalError: a line is damaged; the message names it.
        """
        num_keypoints = None
        with open(self.path, "rb") as file:
            for number in range(self.done):
                where = f"{self.path}: line {number + 1}"
                document = parse(file.readline(), where, JournalError, _ANEW)
                line = convert(document, FrameLine, where, JournalError, remedy=_ANEW)
                for i, person in enumerate(line.people):
                    num_keypoints = num_keypoints or len(person.keypoints)
                    if (len(person.keypoints), len(person.scores)) != (num_keypoints,) * 2:
                        raise JournalError(
                            f"{where}: people[{i}]: {len(person.keypoints)} keypoints and "
                            f"{len(person.scores)} scores, expected {num_keypoints}; {_ANEW}"
                        )
                yield _frame(line)

    def append(self, frames: Sequence[PredictedFrame]) -> None:
        """Adds the next frames.

        Raises:
            OutputError: the disk is full; none of ``frames`` is there then, all before are.
        """
        lines = [json.dumps(_line(frame), allow_nan=False).encode() + b"\n" for frame in frames]
        self._write(b"".join(lines))
        self.done += len(frames)

    def end(self) -> None:
        """Notes that there are no more frames."""
        self._write(_end(self.done))
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


def _line(frame: PredictedFrame) -> dict[str, Any]:
    """A frame as plain data; its number comes first, by which a line is told to be whole."""
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
    line: dict[str, Any] = {"frame": frame.number, "people": people}
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


def _is_whole(line: bytes, frame: int | None = None) -> bool:
    """Whether a line is that of a frame (None is any), and has its end."""
    start = b'{"frame": ' if frame is None else _start(frame)
    return line.startswith(start) and line.endswith(b"}\n")


def _start(frame: int) -> bytes:
    return b'{"frame": %d,' % frame


def _end(frames: int) -> bytes:
    return b'{"end": %d}\n' % frames


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
        JournalError: the journal that is there is damaged, or has other settings.
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
        write_json(path, settings)
        return
    before = read(path, dict[str, Any], JournalError, _ANEW)
    now = json.loads(json.dumps(settings))
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            raise JournalError(
                f"{path} holds a run with other settings ({key} was {short(before.get(key))}, "
                f"is {short(now.get(key))}): give them as they were to go on with it, another "
                "--out, or --overwrite to start anew"
            )
