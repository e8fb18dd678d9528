"""The picture of ``docs/rendered.md``: ``python -m cmpose.render.montage DATA PICTURE``."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import cv2
import numpy as np

from cmpose.data.pictures import is_picture, read_picture
from cmpose.files import write_bytes
from cmpose.render.settings import SPLITS


def write_montage(
    root: str | os.PathLike[str], path: str | os.PathLike[str], *, split: str = "val"
) -> None:
    """Writes a small picture of a rendered split: the middle frame of its first nine sequences.

    Args:
        root: the data set's folder.
        path: PNG file to write; colours are coarsened to keep it small.
        split: ``train`` or ``val``.

    Raises:
        OutputError: the picture cannot be written.
        FrameError: a frame cannot be read.
        ValueError: the split has fewer than nine sequences, or one without frames.
    """
    folders = sorted(p for p in (Path(root) / "images" / split).glob("[0-9]*") if p.is_dir())
    if len(folders) < 9:
        raise ValueError(f"root: {root} has {len(folders)} {split} sequences, a montage needs 9")
    cells = []
    for folder in folders[:9]:
        files = sorted(file for file in folder.glob("*.jpg") if is_picture(file.name))
        if not files:
            raise ValueError(f"root: no frame in {folder}")
        cell = read_picture(files[len(files) // 2])
        cells.append(cv2.resize(cell, (224, 126), interpolation=cv2.INTER_AREA))
    rows = [cv2.hconcat(cells[i : i + 3]) for i in (0, 3, 6)]
    coarse = np.asarray(cv2.vconcat(rows), np.uint8) & 0xF0 | 0x08
    _, data = cv2.imencode(".png", coarse, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    write_bytes(path, data.tobytes())


def main(arguments: list[str] | None = None) -> None:
    """Writes the middle frame of a rendered split's first nine sequences as one PNG."""
    parser = argparse.ArgumentParser(
        prog="python -m cmpose.render.montage", description=main.__doc__
    )
    parser.add_argument("data", help="folder that cmpose render has made")
    parser.add_argument("picture", help="the PNG file")
    parser.add_argument("--split", default="val", choices=list(SPLITS))
    args = parser.parse_args(arguments)
    write_montage(args.data, args.picture, split=args.split)


if __name__ == "__main__":
    main()
