"""Text on pictures, in matplotlib's font: each text is drawn once, and kept.

A figure of matplotlib with some eighty texts takes longer than all else in a picture, and most of
its texts are those of the picture before.
"""

from __future__ import annotations

import functools
import math
from typing import Literal, NamedTuple

import numpy as np

_DPI = 100
_KEPT = 1024
"""Texts that are kept; a picture has about 80."""


class Label(NamedTuple):
    """A text, and where it stands.

    Attributes:
        text: one line or several.
        x: of the point that ``ha`` and ``va`` speak of, in pixels from the left.
        y: likewise, from the top.
        size: of the letters, in points; 100 pixels are an inch.
        color: RGB.
        bold: whether the letters are.
        ha: which part of the text lies at ``x``.
        va: which at ``y``.
    """

    text: str
    x: float
    y: float
    size: float
    color: tuple[int, ...]
    bold: bool = False
    ha: Literal["left", "center", "right"] = "left"
    va: Literal["baseline", "center", "bottom"] = "baseline"


def write_label(image: np.ndarray, label: Label) -> None:
    """Writes a text into ``image``, uint8 [H, W, 3] RGB; what lies outside is cut off."""
    ink, left, top = _ink(label.text, label.size, label.bold, label.ha, label.va)
    x, y = round(label.x) + left, round(label.y) + top
    ink = ink[max(0, -y) :, max(0, -x) :]
    room = image[max(0, y) : max(0, y + len(ink)), max(0, x) : max(0, x + ink.shape[1])]
    ink = ink[: room.shape[0], : room.shape[1]]
    room[:] = np.round(room * (1 - ink) + np.array(label.color, np.float32) * ink)


@functools.lru_cache(maxsize=_KEPT)
def _ink(text: str, size: float, bold: bool, ha: str, va: str) -> tuple[np.ndarray, int, int]:
    """How much of each pixel a text covers, float32 [h, w, 1], and its corner from its point."""
    # matplotlib takes long to import, and most commands draw nothing.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    artist = figure.text(
        *(0, 0, text),
        parse_math=False,
        color="black",
        size=size,
        weight="bold" if bold else "normal",
        linespacing=0.95 if bold else 1.35,
        ha=ha,
        va=va,
    )
    box = artist.get_window_extent(canvas.get_renderer())
    # Letters may reach a little out of the box that their layout has.
    left, bottom = math.floor(box.x0) - 2, math.floor(box.y0) - 2
    width, height = math.ceil(box.x1) + 2 - left, math.ceil(box.y1) + 2 - bottom
    figure.set_size_inches(width / _DPI, height / _DPI)
    artist.set_position((-left / width, -bottom / height))
    canvas.draw()
    grey = np.asarray(canvas.buffer_rgba())[..., :1]
    return 1 - grey.astype(np.float32) / 255, left, -bottom - height
