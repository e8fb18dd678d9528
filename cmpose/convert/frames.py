"""``cmpose frames``: a video's frames as JPEGs, to be labelled and trained on."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import cv2

from cmpose.data.video import VideoError, open_video
from cmpose.files import write_text

INDEX = "frames.json"


class FramesSummary(NamedTuple):
    """What was extracted: ``written`` of ``frames`` pictures are new."""

    folder: Path
    frames: int
    written: int
    width: int
    height: int

    def __str__(self) -> str:
        return (
            f"{self.folder}: {self.frames} frames of {self.width}×{self.height}, "
            f"{self.written} of them new"
        )


def extract_frames(
    video: str | Path, folder: str | Path, *, every: int = 1, quality: int = 95
) -> FramesSummary:
    """Writes every n-th frame as ``folder/000000.jpg`` and so on, named by its number in the video.

    Numbers are those of ``cmpose predict`` and its detection files: decoded frames, from 0. Frames
    are turned upright as the header says. Each is written beside and renamed; an interrupted
    run goes on when the command is repeated. ``frames.json`` says what the frames are of.

    Args:
        video: any file that OpenCV reads.
        folder: made if it is not there.
        every: n ≥ 1.
        quality: of the JPEGs, 1 to 100.

    Raises:
        VideoError: the video cannot be read, or not to the end that its header promises.
        FileExistsError: the folder holds frames of another video, or of other settings.
        ValueError: an argument out of range.
        OSError: a frame cannot be written.
    """
    video, folder = Path(video), Path(folder)
    if every < 1:
        raise ValueError(f"every: expected at least 1, got {every}")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality: expected 1 to 100, got {quality}")
    if not video.is_file():
        raise VideoError(f"{video}: no such video")
    with open_video(video) as opened:
        info, stat = opened.info, video.stat()
        made_of = {
            "video": video.name,
            "bytes": stat.st_size,
            "modified_ns": stat.st_mtime_ns,
            "every": every,
            "quality": quality,
        }
        _claim(folder, made_of)
        written = kept = decoded = 0
        for shot in opened.shots():
            decoded = shot.number + 1
            if shot.number % every:
                continue
            kept += 1
            path = folder / f"{shot.number:06d}.jpg"
            if not path.exists():
                _write_jpeg(path, shot.picture, quality)
                written += 1
        # Headers count a frame or two too many at times; many are a file that was cut off.
        if decoded < 0.95 * info.frames - 2:
            raise VideoError(
                f"{video}: {decoded} frames can be decoded of the {info.frames} that its header "
                f"promises; is it whole? Those decoded are in {folder}"
            )
    finished = made_of | {"fps": info.fps, "frames": decoded, "finished": True}
    write_text(folder / INDEX, json.dumps(finished, indent=1) + "\n")
    return FramesSummary(folder, kept, written, info.width, info.height)


def _claim(folder: Path, made_of: dict[str, Any]) -> None:
    """Notes what the folder is for, unless it is for something else."""
    index = folder / INDEX
    if index.is_file():
        try:
            there = json.loads(index.read_text())
        except ValueError:
            there = {}
        for key, value in made_of.items():
            if there.get(key) != value:
                raise FileExistsError(
                    f"{folder} holds frames of another video or setting: {key} was "
                    f"{there.get(key)!r}, is {value!r}; give another folder, or delete it"
                )
    elif folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} holds files that are not this command's: give another folder"
        )
    else:
        write_text(index, json.dumps(made_of, indent=1) + "\n")


def _write_jpeg(path: Path, picture: Any, quality: int) -> None:
    encoded, data = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not encoded:
        raise OSError(f"{path}: the frame could not be encoded")
    partial = path.with_name(f".{path.name}.tmp")
    try:
        partial.write_bytes(data.tobytes())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
