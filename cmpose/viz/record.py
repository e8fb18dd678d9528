"""A person in a clip as data: crop, pose, heatmaps, causal tokens and clusters, in one JSON file.

``cmpose predict --explain`` writes such a record beside each picture, and ``cmpose report`` puts
records into its page. A record names its joints and limbs itself, so that a reader need not know
the data set. Fields:

``version``   1
``title``     whose pose it is
``size``      [H, W] of the crop in pixels
``joints``    [K] names; ``limbs`` [[a, b]]: the joints that drawings connect
``colors``    [K] ``#rrggbb``, one for each joint; ``limb_colors``: one for each limb
``crop``      the key frame's crop, a JPEG as a data URI
``keypoints`` [K] predicted joints: [x, y] in crop pixels, or null if not finite
``scores``    [K] the heatmaps' maxima
``truth``     [K] annotated joints: [x, y] or null; or null for all if nothing is annotated
``heatmaps``  ``size`` [h, w]; ``sheet``: all K in a column, as a PNG [K·h, w] in a data URI. It is
              white; its alpha channel says how opaque to paint them, see ``heatmap_alpha``
``tokens``    null without Fine Token Enhancement, else ``grid`` [rows, columns], ``scores`` [K][N],
              ``top`` [K][n], ``causal``, ``noncausal``, and null or ``assignment``, ``centers``
              and ``cluster_colors``, as in ``cmpose.viz.tokens.Tokens``
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import msgspec
import numpy as np
from msgspec import Struct

from cmpose.data.formats.messages import short
from cmpose.data.formats.reader import Count, Number, Whole, convert, parse_file, refuse_os_error
from cmpose.data.skeleton import POSETRACK, Skeleton
from cmpose.files import whole_file
from cmpose.viz.draw import cluster_colors, keypoint_colors, limb_color
from cmpose.viz.tokens import Tokens

VERSION = 1
QUALITY = 82
"""Of the JPEGs. Artefacts are not visible at the sizes at which pages show them."""

WEAK = 0.3
"""A heatmap whose maximum is below this share of the strongest one's stays faint. Otherwise its
noise would fill the picture."""

FAINT = 0.25
"""So does one whose maximum is below this, where all are weak: a right one's is near 1."""


class RecordError(ValueError):
    """A file is no record of this version; the message names it and says what to do."""


class RecordedHeatmaps(Struct):
    """``heatmaps`` of a record."""

    size: tuple[Whole, Whole]
    sheet: str


class RecordedTokens(Struct):
    """``tokens`` of a record."""

    grid: tuple[Count, Count]
    scores: list[list[Number]]
    top: list[list[Count]]
    causal: list[Whole]
    noncausal: list[Whole]
    assignment: list[Count] | None
    centers: list[Count] | None
    cluster_colors: list[str] | None


class Record(Struct):
    """A record as a file holds it, see the module's docstring."""

    version: Whole
    title: str
    size: tuple[Whole, Whole]
    joints: list[str]
    limbs: list[tuple[Whole, Whole]]
    colors: list[str]
    limb_colors: list[str]
    crop: str
    keypoints: list[tuple[Number, Number] | None]
    scores: list[Number]
    truth: list[tuple[Number, Number] | None] | None
    heatmaps: RecordedHeatmaps
    tokens: RecordedTokens | None


def jpeg_uri(image: np.ndarray, quality: int = QUALITY) -> str:
    """An RGB picture, uint8 [H, W, 3], as ``data:image/jpeg;base64,...``."""
    written, data = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    assert written
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()


def heatmap_alpha(heatmaps: np.ndarray) -> np.ndarray:
    """How opaque each heatmap is to be painted: float32 [K, h, w] → uint8 of the same shape.

    What stands out of a heatmap's median is divided by its own maximum, so that weak ones show, but
    by no less than ``WEAK`` times the largest maximum and ``FAINT``. Where less than a tenth is
    left, nothing is painted. A heatmap that is the same everywhere thus paints nothing.
    """
    heatmaps = np.maximum(np.asarray(heatmaps, np.float32), 0)
    heatmaps = np.maximum(heatmaps - np.median(heatmaps, axis=(1, 2), keepdims=True), 0)
    peaks = heatmaps.max(axis=(1, 2), keepdims=True)
    share = heatmaps / np.maximum(peaks, max(WEAK * peaks.max(), FAINT))
    return np.where(share < 0.1, 0, 230 * np.sqrt(share)).astype(np.uint8)


def _sheet_uri(heatmaps: np.ndarray) -> str:
    alpha = heatmap_alpha(heatmaps)
    sheet = np.full((alpha.shape[0] * alpha.shape[1], alpha.shape[2], 4), 255, np.uint8)
    sheet[..., 3] = alpha.reshape(sheet.shape[:2])
    written, data = cv2.imencode(".png", sheet, [cv2.IMWRITE_PNG_COMPRESSION, 9])
    assert written
    return "data:image/png;base64," + base64.b64encode(data.tobytes()).decode()


def hex_color(color: Sequence[float] | np.ndarray) -> str:
    """(r, g, b) in 0..255 → ``#rrggbb``."""
    return "#" + "".join(f"{int(channel):02x}" for channel in color)


def _points(points: np.ndarray) -> list[list[float] | None]:
    """[K, 2] → K pairs rounded to hundredths of a pixel, None for those that are not finite."""
    return [
        [round(float(x), 2), round(float(y), 2)] if np.isfinite([x, y]).all() else None
        for x, y in points
    ]


def make_record(
    crop: np.ndarray,
    heatmaps: np.ndarray,
    keypoints: np.ndarray,
    scores: np.ndarray,
    tokens: Tokens | None = None,
    *,
    title: str = "",
    truth: np.ndarray | None = None,
    skeleton: Skeleton = POSETRACK,
) -> dict[str, Any]:
    """Makes a record; its fields are in the module's docstring.

    Args:
        crop: uint8 [H, W, 3] RGB, the key frame's.
        heatmaps: [K, h, w].
        keypoints: [K, 2] crop pixels; may hold NaN.
        scores: [K] heatmap maxima.
        tokens: None for a model without Fine Token Enhancement.
        title: whose pose it is.
        truth: [K, 2] annotated joints in crop pixels, NaN where there is none.
        skeleton: what the K keypoints are.
    """
    return {
        "version": VERSION,
        "title": title,
        "size": list(crop.shape[:2]),
        "joints": list(skeleton.keypoints),
        "limbs": [list(limb) for limb in skeleton.limbs],
        "colors": [hex_color(color) for color in keypoint_colors(skeleton)],
        "limb_colors": [hex_color(limb_color(a, b, skeleton)) for a, b in skeleton.limbs],
        "crop": jpeg_uri(crop),
        "keypoints": _points(keypoints),
        "scores": [round(float(score), 4) for score in scores],
        "truth": None if truth is None else _points(truth),
        "heatmaps": {"size": list(heatmaps.shape[1:]), "sheet": _sheet_uri(heatmaps)},
        "tokens": None if tokens is None else _tokens(tokens),
    }


def _tokens(tokens: Tokens) -> dict[str, Any]:
    record: dict[str, Any] = {
        "grid": list(tokens.grid),
        "scores": [[float(f"{score:.3g}") for score in row] for row in tokens.scores],
        "top": tokens.top.tolist(),
        "causal": tokens.causal.tolist(),
        "noncausal": tokens.noncausal.tolist(),
        "assignment": None,
        "centers": None,
        "cluster_colors": None,
    }
    if tokens.assignment is not None and tokens.centers is not None:
        record["assignment"] = tokens.assignment.tolist()
        record["centers"] = tokens.centers.tolist()
        record["cluster_colors"] = [hex_color(c) for c in cluster_colors(len(tokens.centers))]
    return record


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Writes a record, whole or not at all.

    Raises:
        OutputError: ``path`` cannot be written.
    """
    text = json.dumps(record, separators=(",", ":"), allow_nan=False)
    with whole_file(path, durable=False) as partial:
        partial.write_text(text, encoding="utf-8")


def read_record(path: Path) -> dict[str, Any]:
    """Reads a record that ``write_record`` wrote.

    Raises:
        RecordError: no JSON, another version, or a field that is missing or does not fit.
    """
    again = "write it again with cmpose predict --explain"
    try:
        document = parse_file(path, RecordError, again)
    except FileNotFoundError as error:
        raise refuse_os_error(path, error, RecordError, again) from error
    version = document.get("version") if isinstance(document, dict) else None
    if version != VERSION:
        raise RecordError(f"{path}: version {short(version)}, this cmpose reads {VERSION}; {again}")
    record = convert(document, Record, str(path), RecordError, remedy=again)
    wrong = _misfit(record)
    if wrong:
        raise RecordError(f"{path}: not a whole record ({wrong}); {again}")
    return msgspec.json.decode(msgspec.json.encode(record))


def _misfit(record: Record) -> str:
    """Says what in a record contradicts something else in it; empty if nothing does."""
    K = len(record.joints)
    lengths = {
        "colors": len(record.colors),
        "keypoints": len(record.keypoints),
        "scores": len(record.scores),
        "truth": K if record.truth is None else len(record.truth),
    }
    tokens = record.tokens
    if tokens is not None:
        lengths |= {"tokens.scores": len(tokens.scores), "tokens.top": len(tokens.top)}
        rows, columns = tokens.grid
        for name, indices in (("causal", tokens.causal), ("noncausal", tokens.noncausal)):
            if any(not 0 <= token < rows * columns for token in indices):
                return f"tokens.{name} leaves its grid of {rows} × {columns}"
        if tokens.assignment is not None:
            if len(tokens.assignment) != len(tokens.noncausal):
                return "tokens.assignment and tokens.noncausal differ in length"
            if max(tokens.assignment, default=0) >= len(tokens.cluster_colors or ()):
                return "tokens.assignment names a cluster that is not there"
    for name, length in lengths.items():
        if length != K:
            return f"{name} has {length} entries, joints {K}"
    if len(record.limbs) != len(record.limb_colors):
        return "limbs and limb_colors differ in length"
    if any(not 0 <= joint < K for limb in record.limbs for joint in limb):
        return "limbs name a joint that is not there"
    for name, uri in (("crop", record.crop), ("heatmaps.sheet", record.heatmaps.sheet)):
        if not uri.startswith("data:image/"):
            return f"{name} is no data:image/ URI"
    if min(*record.size, *record.heatmaps.size) < 1:
        return "an empty size"
    return ""
