"""``cmpose frames``: a video's frames as JPEGs, to be labelled and trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from cmpose.data.formats.reader import read
from cmpose.data.video import VideoError, open_video
from cmpose.files import Interrupted, OutputError, claim, stop_requests, whole_file, write_json

INDEX = "frames.json"


class FramesSummary(NamedTuple):
    """What was extracted.

    Attributes:
        folder: of the pictures.
        frames: pictures there.
        written: of them, those that are new.
        width: of the pictures, pixels.
        height: likewise.
        notes: what else there is to know of the video, each a sentence without a full stop.
    """

    folder: Path
    frames: int
    written: int
    width: int
    height: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self.frames} frames of {self.width}×{self.height}, "
            f"{self.written} of them new" + "".join(f"\nnote: {note}" for note in self.notes)
        )


def extract_frames(
    video: str | Path, folder: str | Path, *, every: int = 1, quality: int = 95
) -> FramesSummary:
    """Writes every n-th frame as ``folder/000000.jpg`` and so on, named by its number in the video.

    Numbers are those of ``cmpose predict`` and its detection files: decoded frames, from 0. Frames
    are turned upright as the header says. An interrupted run goes on when the command is repeated.
    ``frames.json`` says what the frames are of.

    Args:
        video: any file that FFmpeg reads.
        folder: made if it is not there.
        every: n ≥ 1.
        quality: of the JPEGs, 1 to 100.

    Raises:
        FileExistsError: the folder holds frames of another video, or of other settings.
        InUse: another process is writing there.
        Interrupted: asked to stop; the frames that are written are kept.
        OutputError: the disk is full, and the like.
        ValueError: an argument out of range.
        VideoError: the video cannot be read, or the file is cut off.
    """
    video, folder = Path(video), Path(folder)
    if every < 1:
        raise ValueError(f"every: expected at least 1, got {every}")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality: expected 1 to 100, got {quality}")
    if not video.is_file():
        raise VideoError(f"{video}: no such video")
    with open_video(video) as opened:
        state = video.stat()
        made_of = {
            "video": video.name,
            "bytes": state.st_size,
            "modified_ns": state.st_mtime_ns,
            "every": every,
            "quality": quality,
        }
        _check_folder(folder, made_of)
        with claim(folder, "frames", "folder"), stop_requests() as stop:
            if not (folder / INDEX).exists():
                write_json(folder / INDEX, made_of)
            written = present = 0
            for frame in opened.frames():
                if stop.is_set():
                    raise Interrupted(
                        f"{folder}: stopped; {present} pictures are there: run the same command "
                        "again, it goes on from them"
                    )
                if frame.number % every:
                    continue
                if not (folder / INDEX).is_file():
                    raise OutputError(
                        f"{folder / INDEX}: is not there any more; run the same command again to "
                        "extract the frames anew"
                    )
                present += 1
                path = folder / f"{frame.number:06d}.jpg"
                if not path.exists():
                    _write_jpeg(path, frame.picture, quality)
                    written += 1
            info = opened.info
            if info.cut_off:
                raise VideoError(f"{info.cut_off}; these are in {folder}")
            finished = {"fps": info.fps, "frames": info.frames, "finished": True}
            write_json(folder / INDEX, made_of | finished | {"notes": info.notes})
    return FramesSummary(folder, present, written, info.width, info.height, info.notes)


def _check_folder(folder: Path, made_of: dict[str, Any]) -> None:
    """Raises FileExistsError if the folder is for something else."""
    index = folder / INDEX
    if index.is_file():
        earlier = read(index, dict[str, Any], FileExistsError, "give another folder, or delete it")
        for key, value in made_of.items():
            if earlier.get(key) != value:
                raise FileExistsError(
                    f"{folder} holds frames of another video or setting: {key} was "
                    f"{earlier.get(key)!r}, is {value!r}; give another folder, or delete it"
                )
    # A hidden file may be what a killed run has left.
    elif folder.is_dir() and any(path.name[0] != "." for path in folder.iterdir()):
        raise FileExistsError(
            f"{folder} holds files that are not this command's: give another folder"
        )


def _write_jpeg(path: Path, picture: np.ndarray, quality: int) -> None:
    encoded, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not encoded:
        raise VideoError(f"{path}: the frame could not be encoded as a JPEG")
    with whole_file(path, "run the same command again", durable=False) as partial:
        partial.write_bytes(data.tobytes())
