"""Draws what a pose was read from: heatmaps, causal tokens, and clusters of the other tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from cmpose.data.skeleton import POSETRACK, Skeleton
from cmpose.files import whole_file
from cmpose.viz.draw import SIDE_COLORS, cluster_colors, draw_skeleton, keypoint_colors
from cmpose.viz.labels import Label, write_label
from cmpose.viz.record import WEAK, make_record, write_record
from cmpose.viz.tokens import Tokens

WIDTH, HEIGHT = 1600, 1000
_INK, _FAINT, _PAPER = (28, 31, 36), (107, 114, 128), 255
_LARGE = 448
"""Crops are enlarged to this height in pixels before anything is drawn on them."""


def explain_figure(
    crop: np.ndarray,
    heatmaps: np.ndarray,
    keypoints: np.ndarray,
    scores: np.ndarray,
    tokens: Tokens | None = None,
    *,
    title: str = "",
    path: str | Path | None = None,
    skeleton: Skeleton = POSETRACK,
) -> np.ndarray:
    """Draws the key frame, the heatmaps, each keypoint's causal tokens, and the clusters.

    Args:
        crop: uint8 [H, W, 3] RGB, the key frame's.
        heatmaps: [K, h, w].
        keypoints: [K, 2] crop pixels.
        scores: [K].
        tokens: None for a model without Fine Token Enhancement.
        title: of the picture, for instance video, frame and person.
        path: if given, the picture is also written here, as PNG or JPEG by the name's ending.
            The record that it was drawn from (``cmpose.viz.record``) is written beside it, with
            the ending ``.json``. Each file is whole or not there.
        skeleton: what the keypoints are.

    Returns:
        uint8 [1000, 1600, 3] RGB.

    Raises:
        ValueError: a wrong shape, or a token index out of range.
        OutputError: ``path`` cannot be written.
    """
    if crop.ndim != 3 or crop.shape[2] != 3 or crop.dtype != np.uint8:
        raise ValueError(f"crop must be uint8 [H, W, 3], got {crop.dtype} {crop.shape}")
    count = len(skeleton)
    for name, array, shape in (
        ("keypoints", keypoints, (count, 2)),
        ("scores", scores, (count,)),
    ):
        if np.shape(array) != shape:
            raise ValueError(f"{name} must have shape {shape}, got {np.shape(array)}")
    if heatmaps.ndim != 3 or len(heatmaps) != count:
        raise ValueError(f"heatmaps must be [{count}, h, w], got {heatmaps.shape}")
    if tokens is not None:
        tokens.check(count)

    picture = _Picture(crop, heatmaps, keypoints, scores, skeleton)
    image = np.full((HEIGHT, WIDTH, 3), _PAPER, np.uint8)
    write_label(image, Label(title or "CM-Pose", 20, 33, 15, _INK, bold=True))
    _draw_key(image, picture)
    for panels, labels in (_large_panels(picture, tokens), _joint_panels(picture, tokens)):
        for panel in panels:
            _paste(image, panel)
        for label in labels:
            write_label(image, label)
    if path is not None:
        path = Path(path)
        written, data = cv2.imencode(path.suffix, image[..., ::-1])
        assert written
        with whole_file(path, durable=False) as partial:
            partial.write_bytes(data.tobytes())
        record = make_record(
            crop, heatmaps, keypoints, scores, tokens, title=title, skeleton=skeleton
        )
        write_record(path.with_suffix(".json"), record)
    return image


class _Picture:
    """The enlarged crop and everything that is drawn on it, in pixels of the enlarged crop."""

    def __init__(
        self,
        crop: np.ndarray,
        heatmaps: np.ndarray,
        keypoints: np.ndarray,
        scores: np.ndarray,
        skeleton: Skeleton,
    ) -> None:
        self.skeleton, self.colors = skeleton, keypoint_colors(skeleton)
        height, width = crop.shape[:2]
        self.scale = _LARGE / height
        self.size = round(width * self.scale), _LARGE  # (width, height)
        self.crop = cv2.resize(crop, self.size, interpolation=cv2.INTER_CUBIC)
        self.grey = np.repeat(cv2.cvtColor(self.crop, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=2)
        self.keypoints = (np.asarray(keypoints, np.float64) + 0.5) * self.scale - 0.5
        self.scores = np.asarray(scores, np.float64)
        # Heatmap pixel p lies at crop pixel stride * p: no half-pixel shift as in cv2.resize.
        stretch = self.size[0] / heatmaps.shape[2], self.size[1] / heatmaps.shape[1]
        matrix = np.array([[stretch[0], 0, 0], [0, stretch[1], 0]])
        self.heatmaps = np.stack(
            [
                cv2.warpAffine(np.maximum(h, 0).astype(np.float32), matrix, self.size)
                for h in np.asarray(heatmaps, np.float32)
            ]
        )
        self.peaks = [float(heatmap.max()) for heatmap in self.heatmaps]

    def cell(self, token: int, grid: tuple[int, int]) -> tuple[int, int, int, int]:
        """Left, top, right, bottom of a token's cell."""
        row, column = divmod(int(token), grid[1])
        xs = np.round(np.array([column, column + 1]) * self.size[0] / grid[1]).astype(int)
        ys = np.round(np.array([row, row + 1]) * self.size[1] / grid[0]).astype(int)
        return int(xs[0]), int(ys[0]), int(xs[1]), int(ys[1])

    def blank(self, brightness: float = 0.45) -> np.ndarray:
        """The crop in dark grey, to paint on."""
        return (self.grey * brightness).astype(np.uint8)

    def colored_heatmap(self, joints: Sequence[int], base: np.ndarray) -> np.ndarray:
        """Heatmaps in their joints' colours over ``base``.

        Each is scaled to its own maximum, so that weak ones show. One that is much weaker than
        the strongest stays faint, because its noise would fill the picture otherwise.
        """
        owner = np.zeros(base.shape[:2], np.uint16)  # the joint whose colour a pixel takes
        cover = np.zeros(base.shape[:2], np.float32)
        for j in joints:
            peak = max(self.peaks[j], WEAK * max(self.peaks))
            if peak <= 0:
                continue
            share = self.heatmaps[j] / peak
            np.copyto(owner, j, where=share > cover)
            np.maximum(cover, share, out=cover)
        cover[cover < 0.1] = 0.0
        alpha = 0.9 * np.sqrt(cover)
        paint = np.array(self.colors, np.uint8)[owner]
        return cv2.blendLinear(base, paint, 1 - alpha, alpha)


class _Panel(NamedTuple):
    """An image and its room in the figure, in pixels from the figure's upper left corner."""

    image: np.ndarray
    x: float
    y: float
    width: float
    height: float


def _paste(figure: np.ndarray, panel: _Panel) -> None:
    """Puts a panel's image in the middle of its room, as large as fits."""
    height, width = panel.image.shape[:2]
    scale = min(panel.width / width, panel.height / height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    x = round(panel.x + (panel.width - size[0]) / 2)
    y = round(panel.y + (panel.height - size[1]) / 2)
    image = cv2.resize(panel.image, size, interpolation=cv2.INTER_AREA)
    figure[y : y + size[1], x : x + size[0]] = image


_Parts = tuple[list[_Panel], list[Label]]
"""What a row of the picture is made of."""


def _large_panels(picture: _Picture, tokens: Tokens | None) -> _Parts:
    """The upper row: pose, heatmaps, causal tokens, the other tokens."""
    labels = []
    skeleton = draw_skeleton(
        picture.crop.copy(),
        picture.keypoints,
        picture.scores,
        width=4,
        min_score=0.1,
        skeleton=picture.skeleton,
    )
    overlay = picture.colored_heatmap(range(len(picture.skeleton)), picture.blank(0.6))
    panels: list[tuple[str, str, np.ndarray]] = [
        ("Pose", "key frame and predicted joints", skeleton),
        ("Heatmaps", "all joints, each in its colour", overlay),
    ]
    if tokens is not None:
        causal = _causal_map(picture, tokens)
        caption = f"{len(tokens.causal)} of {tokens.scores.shape[1]}, colour: best joint"
        panels.append(("Causal tokens", caption, causal))
        if tokens.assignment is not None and tokens.centers is not None:
            caption = f"{len(tokens.noncausal)} tokens in {len(tokens.centers)} clusters, ○ centre"
            panels.append(("The rest, clustered", caption, _cluster_map(picture, tokens)))
        else:
            panels.append(("The rest", "discarded by this model", _discarded_map(picture, tokens)))
    else:
        note = "This model has no Fine Token Enhancement:\nevery token goes to the head as it is."
        labels.append(Label(note, 720, 324, 11, _FAINT))
    left, top, pitch = 20, 100, 350
    for i, (name, caption, _) in enumerate(panels):
        x = left + i * pitch
        labels += [
            Label(name, x, 68, 13, _INK, bold=True),
            Label(caption, x, 89, 10, _FAINT),
        ]
    rooms = [
        _Panel(image, left + i * pitch, top, 336, _LARGE) for i, (*_, image) in enumerate(panels)
    ]
    return rooms, labels


def _causal_map(picture: _Picture, tokens: Tokens) -> np.ndarray:
    """Causal tokens' cells in the colour of the joint that ranks them best, the rest in grey."""
    ranks = np.argsort(np.argsort(-tokens.scores, axis=1, kind="stable"), axis=1)
    # If several joints rank a token equally well, it is the one with the highest score.
    best = np.lexsort((-tokens.scores, ranks), axis=0)[0]
    image = picture.blank(0.5)
    for token in tokens.causal:
        x1, y1, x2, y2 = picture.cell(token, tokens.grid)
        color = np.array(picture.colors[best[token]], np.float64)
        inside = picture.crop[y1:y2, x1:x2]
        image[y1:y2, x1:x2] = (0.5 * inside + 0.5 * color).astype(np.uint8)
        cv2.rectangle(image, (x1, y1), (x2 - 1, y2 - 1), color.tolist(), 2)
    return _with_joint_dots(image, picture)


def _with_joint_dots(image: np.ndarray, picture: _Picture) -> np.ndarray:
    """The image with a dot at every predicted joint."""
    for j in range(len(picture.skeleton)):
        if np.isfinite(picture.keypoints[j]).all():
            _dot(image, picture.keypoints[j], picture.colors[j], 4)
    return image


def _dot(image: np.ndarray, xy: np.ndarray, color: Sequence[int], radius: int) -> None:
    center = (int(np.clip(round(xy[0]), -9999, 9999)), int(np.clip(round(xy[1]), -9999, 9999)))
    cv2.circle(image, center, radius + 2, (0, 0, 0), cv2.FILLED, cv2.LINE_AA)
    cv2.circle(image, center, radius + 1, (255, 255, 255), cv2.FILLED, cv2.LINE_AA)
    cv2.circle(image, center, radius - 1, tuple(color), cv2.FILLED, cv2.LINE_AA)


def _cluster_map(picture: _Picture, tokens: Tokens) -> np.ndarray:
    """The cells of each cluster in one colour, with borders between clusters, rings at centres."""
    assert tokens.assignment is not None
    assert tokens.centers is not None
    colors = cluster_colors(len(tokens.centers))
    image = picture.blank(0.25)
    label = np.full(image.shape[:2], -1)
    for token, cluster in zip(tokens.noncausal, tokens.assignment, strict=True):
        x1, y1, x2, y2 = picture.cell(token, tokens.grid)
        color = colors[cluster].astype(np.float64)
        image[y1:y2, x1:x2] = 0.5 * picture.grey[y1:y2, x1:x2] * (color / 255) + 0.5 * color
        label[y1:y2, x1:x2] = cluster
    edge = np.zeros(label.shape, bool)
    edge[:, 1:] |= label[:, 1:] != label[:, :-1]
    edge[1:] |= label[1:] != label[:-1]
    image[edge] = 20
    for token in tokens.noncausal[tokens.centers]:
        x1, y1, x2, y2 = picture.cell(token, tokens.grid)
        center = ((x1 + x2) // 2, (y1 + y2) // 2)
        radius = max(4, (x2 - x1) // 5)
        cv2.circle(image, center, radius, (0, 0, 0), 5, cv2.LINE_AA)
        cv2.circle(image, center, radius, (255, 255, 255), 2, cv2.LINE_AA)
    return image


def _discarded_map(picture: _Picture, tokens: Tokens) -> np.ndarray:
    """The cells of discarded tokens in dark grey."""
    image = picture.crop.copy()
    for token in tokens.noncausal:
        x1, y1, x2, y2 = picture.cell(token, tokens.grid)
        image[y1:y2, x1:x2] = picture.grey[y1:y2, x1:x2] // 4
    return image


def _draw_key(image: np.ndarray, picture: _Picture) -> None:
    """The colours and scores of joints, and the colours of limbs, right of the large panels."""
    left, top = 1424, 60
    names = picture.skeleton.keypoints
    order = list(range(len(names)))
    if picture.skeleton == POSETRACK:
        order = [14, 13, 12, 8, 7, 6, 9, 10, 11, 2, 1, 0, 3, 4, 5]  # from head to foot
    labels = [
        Label("Joint", 0, 8, 13, _INK, bold=True, va="center"),
        Label("score", 160, 8, 10, _FAINT, ha="right", va="center"),
    ]
    squares = []
    for row, j in enumerate(order):
        y = 36 + 25 * min(1.0, 15 / len(order)) * row
        squares.append((0, y - 8, 16, 16, picture.colors[j]))
        labels += [
            Label(names[j].replace("_", " "), 22, y, 10, _INK, va="center"),
            Label(f"{picture.scores[j]:.2f}", 160, y, 10, _INK, ha="right", va="center"),
        ]
    y = 36 + 25 * 15 + 22
    labels.append(Label("Limbs", 0, y, 11, _INK, bold=True, va="center"))
    for x, (side, color) in zip((0, 46, 100), SIDE_COLORS.items(), strict=True):
        squares.append((x, y + 18, 12, 8, color))
        labels.append(Label(side, x + 15, y + 22, 9.5, _INK, va="center"))
    labels.append(Label("left, right: the person's", 0, y + 42, 9, _FAINT, va="center"))
    for x, y, width, height, color in squares:
        corner = round(left + x), round(top + y)
        opposite = corner[0] + width - 1, corner[1] + height - 1
        cv2.rectangle(image, corner, opposite, color, cv2.FILLED)
    for label in labels:
        write_label(image, label._replace(x=left + label.x, y=top + label.y))


def _joint_panels(picture: _Picture, tokens: Tokens | None) -> _Parts:
    """The lower rows: for every joint its heatmap, and below it the joint's causal tokens."""
    left, pitch = 20, 1566 / max(15, len(picture.skeleton))
    width = pitch - 6.4
    height = min(round(width * picture.size[1] / picture.size[0]), 148)
    top = 624
    below = top + height + 34
    labels = [Label("Each joint's heatmap", 20, top - 50, 13, _INK, bold=True)]
    if tokens is not None:
        count = tokens.top.shape[1]
        own = "causal token" if count == 1 else f"{count} causal tokens"
        caption = f"Each joint's {own}, and where the joint was predicted"
        rest = _DISCARDED if tokens.assignment is None else _MERGED
        labels += [
            Label(caption, 20, below - 8, 13, _INK, bold=True),
            Label(_CAUSAL + rest, 20, HEIGHT - 16, 10, _FAINT),
        ]
    panels = []
    dark, darker = picture.blank(0.5), picture.blank(0.4)
    for j, name in enumerate(picture.skeleton.keypoints):
        x = left + j * pitch
        ink = tuple(int(0.72 * channel) for channel in picture.colors[j])
        words, middle = name.replace("_", "\n"), x + width / 2
        labels.append(Label(words, middle, top - 5, 10, ink, bold=True, ha="center", va="bottom"))
        panels.append(_Panel(picture.colored_heatmap([j], dark), x, top, width, height))
        if tokens is not None:
            panels.append(
                _Panel(_own_tokens(picture, tokens, j, darker.copy()), x, below, width, height)
            )
    return panels, labels


_CAUSAL = "Causal: tokens that rank best in some joint's row of scores; they keep their own cell. "
_MERGED = (
    "The rest are merged, cluster by cluster, into one token each,\n"
    "weighted by their scores; a merged token stands in all cells of its cluster when the head "
    "reads the grid."
)
_DISCARDED = "This model discards the rest."


def _own_tokens(picture: _Picture, tokens: Tokens, joint: int, image: np.ndarray) -> np.ndarray:
    """The cells of a joint's causal tokens, framed; a dot where the joint was predicted."""
    for token in tokens.top[joint]:
        x1, y1, x2, y2 = picture.cell(token, tokens.grid)
        image[y1:y2, x1:x2] = picture.crop[y1:y2, x1:x2]
        cv2.rectangle(image, (x1 + 2, y1 + 2), (x2 - 3, y2 - 3), picture.colors[joint], 6)
    if np.isfinite(picture.keypoints[joint]).all():
        _dot(image, picture.keypoints[joint], picture.colors[joint], 9)
    return image
