"""What a prediction has done so far, on disk: one JSON line a frame, and the settings it is of.

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

from cmpose.data.video import NOT_DECODED, Shot
from cmpose.files import claim, write_json, writing
from cmpose.predict.detect import Detection
from cmpose.predict.frame import PredictedFrame, PredictedPerson

SETTINGS, FRAMES, FINISHED = "settings.json", "frames.jsonl", "finished.json"
_SYNC_SECONDS = 5.0


class JournalError(RuntimeError):
    """A journal that is damaged or of something else; the message says what to do."""


class Journal:
    """The lines of one video's prediction.

    Attributes:
        folder: it lies in.
        done: frames that have a line.
        ended: the video's last frame has its line.
        finished: what ``finish`` was given when the results were written, or None.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / FRAMES
        self.done, self.ended = 0, False
        self.finished: dict[str, Any] | None = None
        if (folder / FINISHED).exists():
            self.finished = json.loads((folder / FINISHED).read_text())
            return
        size = 0
        with writing(self.path), open(self.path, "a+b") as file:
            file.seek(0)
            for line in file:
                if line == _end(self.done):
                    self.ended = True
                elif not (line.startswith(_start(self.done)) and line.endswith(b"}\n")):
                    break  # torn by a kill or a power cut, and whatever comes behind it
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

    def lines(self) -> Iterator[dict[str, Any]]:
        """The frames' lines from the first on, read as they are asked for."""
        with open(self.path, "rb") as file:
            for _ in range(self.done):
                yield json.loads(file.readline())

    def frames(self) -> Iterator[PredictedFrame]:
        """The frames from the first on, without their pictures, read as they are asked for."""
        return map(_frame, self.lines())

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
    line: dict[str, Any] = {"frame": frame.shot.number, "people": people}
    if frame.detections is not None:
        line["found"] = [[*d.box.tolist(), d.score] for d in frame.detections]
    if not frame.shot.readable:
        line["unreadable"] = True
    if frame.explained:
        line["explained"] = list(frame.explained)
    return line


def _frame(line: dict[str, Any]) -> PredictedFrame:
    """The frame that ``_line`` made this of, without its picture."""
    people = [
        PredictedPerson(
            track_id=entry["track_id"],
            score=entry["score"],
            box=np.array(entry["box"], np.float64),
            keypoints=np.array(entry["keypoints"], np.float64),
            scores=np.array(entry["scores"], np.float64),
            interpolated="interpolated" in entry,
        )
        for entry in line["people"]
    ]
    detections = None
    if "found" in line:
        detections = [Detection(np.array(v[:4]), v[4]) for v in line["found"]]
    shot = Shot(line["frame"], NOT_DECODED, readable="unreadable" not in line)
    return PredictedFrame(shot, people, detections, explained=line.get("explained", ()))


def _start(frame: int) -> bytes:
    return b'{"frame": %d,' % frame


def _end(frames: int) -> bytes:
    return b'{"end": %d}\n' % frames


@contextmanager
def open_journal(
    folder: Path, settings: dict[str, Any], *, overwrite: bool = False
) -> Iterator[Journal]:
    """The journal in ``folder``: a new one, or the one of an interrupted run of equal settings.

    Args:
        folder: of this video's journal; made if absent.
        settings: plain data, all that the results depend on; keys are what messages call them.
        overwrite: throws away what is there.

    Raises:
        JournalError: what is there is of other settings.
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
    try:
        before = json.loads(path.read_text())
    except ValueError as error:
        raise JournalError(f"{path}: damaged ({error}): run with --overwrite to start anew") from (
            error
        )
    now = json.loads(json.dumps(settings))
    for key in {**before, **now}:
        if before.get(key) != now.get(key):
            raise JournalError(
                f"{folder} holds a run with other settings ({key} was {before.get(key)!r}, is "
                f"{now.get(key)!r}): give them as they were to go on with it, another --out, or "
                "--overwrite to start anew"
            )
