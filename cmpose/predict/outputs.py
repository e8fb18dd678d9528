"""The result files of ``cmpose predict``: which there are, and what must not be replaced."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cmpose.data.formats.run import writer_of
from cmpose.data.video import VideoInfo
from cmpose.data.video_writer import part_of
from cmpose.predict.journal import FRAMES, SETTINGS
from cmpose.predict.options import Options


class OutputsError(ValueError):
    """A file lies where a result is to be written, or a result is gone; with what to do."""


_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
"""How drawn pictures may end; of other formats they are PNGs."""


def drawn_file(out: Path, info: VideoInfo) -> Path:
    """What the frames are drawn to: an MP4, or of a picture alone a picture of its format."""
    if not info.picture:
        return out / f"{info.name}_poses.mp4"
    ending = info.picture if info.picture in _PICTURES else ".png"
    return out / f"{info.name}_poses{ending}"


def result_files(out: Path, info: VideoInfo, outputs: Iterable[str]) -> list[Path]:
    """The result files of a video without explaining pictures and ``metrics.json``."""
    paths = {
        "video": drawn_file(out, info),
        "poses": out / "poses" / f"{info.name}.json",
        "coco": out / "coco" / f"{info.name}.json",
        "csv": out / "csv" / f"{info.name}.csv",
    }
    return [path for output, path in paths.items() if output in outputs]


def refuse_others(
    out: Path, info: VideoInfo, options: Options, inputs: Iterable[Path], *, overwrite: bool
) -> None:
    """Checks, before anything is written, that no file is replaced that predict did not write.

    Args:
        out: the output folder.
        info: the video's.
        options: settled.
        inputs: files that are read. None of them is replaced, not even with ``overwrite``.
        overwrite: results of this video's names are replaced without a journal too.

    Raises:
        OutputsError: naming the first such file, or a result or its folder that is a link.
    """
    folder, remedy = out / "journal" / info.name, "move it, or give another --out"
    results = result_files(out, info, options.outputs)
    if options.explain_frames:
        name = re.compile(re.escape(info.name) + r"_\d+_\d+\.(png|json)")
        pictures = out / "explain"
        names = sorted(os.listdir(pictures)) if pictures.is_dir() else []
        results += [pictures / file for file in names if name.fullmatch(file)]
    if "video" in options.outputs and not info.picture:
        results.append(part_of(results[0]))
    metrics = out / "metrics.json"
    for each in (*sorted({path.parent for path in results} - {out}), folder.parent, folder):
        if each.is_symlink():
            raise OutputsError(
                f"{each}: is a link, and results would be written where it leads: {remedy}"
            )
    present = [p for p in (*results, folder / FRAMES, metrics) if os.path.lexists(p)]
    used = {_identity(path) for path in inputs} if present else set()
    for path in present:
        if path.is_symlink():
            raise OutputsError(f"{path}: is a link, and a result would be written there: {remedy}")
        if _identity(path) in used:
            raise OutputsError(
                f"{path}: is an input, and a result would be written there: {remedy}"
            )
    # Looked for last: a journal that another process begins meanwhile is there by now.
    own = overwrite or (folder / SETTINGS).exists()
    for path in present:
        if not (writer_of(path) == "predict" if path == metrics else own):
            raise OutputsError(f"{path}: is there already and is not of cmpose predict: {remedy}")


def missing_results(
    out: Path, info: VideoInfo, options: Options, metrics: dict[str, Any]
) -> list[Path]:
    """The results of a finished prediction that are not there any more."""
    # A camera that was gone on from cannot be drawn.
    outputs = [o for o in options.outputs if not (o == "video" and info.live)]
    paths = result_files(out, info, outputs)
    paths += [out / picture for picture in metrics.get("explained", [])]
    return [path for path in paths if not path.is_file()]


def _identity(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_dev, state.st_ino
