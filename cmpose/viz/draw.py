"""Draws skeletons, boxes and colour keys on pictures, and sheets of crops.

Pictures are uint8 [H, W, 3]. Colours are given in RGB; ``order="bgr"`` draws them on a picture in
OpenCV's order of channels. Left limbs are orange, right limbs blue, head and neck green. Left and
right are the person's, not the picture's.
"""

from __future__ import annotations

import colorsys
from typing import Literal

import cv2
import numpy as np

from cmpose.data.skeleton import POSETRACK, Side, Skeleton

Order = Literal["rgb", "bgr"]
Color = tuple[int, int, int]

SIDE_COLORS: dict[Side, Color] = {
    "left": (255, 140, 40),
    "right": (50, 150, 255),
    "middle": (95, 215, 90),
}

JOINT_COLORS: tuple[Color, ...] = (
    (40, 70, 230),  # right ankle
    (50, 130, 255),  # right knee
    (70, 190, 255),  # right hip
    (255, 165, 60),  # left hip
    (255, 95, 50),  # left knee
    (225, 30, 45),  # left ankle
    (145, 85, 255),  # right wrist
    (0, 205, 215),  # right elbow
    (110, 225, 240),  # right shoulder
    (255, 200, 90),  # left shoulder
    (255, 130, 175),  # left elbow
    (255, 50, 150),  # left wrist
    (60, 190, 75),  # head bottom
    (170, 230, 70),  # nose
    (250, 240, 70),  # head top
)
"""A colour for each joint of PoseTrack: blue to violet on the right side, red to orange on the
left, green to yellow in the middle."""


def cluster_colors(count: int) -> np.ndarray:
    """[count, 3] distinct uint8 RGB colours.

    Hues are a golden ratio apart, so that neighbours differ much, in three strengths.
    """
    colors = [
        colorsys.hsv_to_rgb(
            (i * 0.61803398875) % 1.0, (0.75, 0.5, 0.95)[i % 3], (1.0, 0.95, 0.75)[i % 3]
        )
        for i in range(count)
    ]
    return (np.array(colors).reshape(count, 3) * 255).astype(np.uint8)


_SHIFT = 4
"""OpenCV draws at fixed-point coordinates; with a shift of 4 they are sixteenths of a pixel."""

_FONT = cv2.FONT_HERSHEY_SIMPLEX


def keypoint_colors(skeleton: Skeleton) -> tuple[Color, ...]:
    """A colour for each keypoint: ``JOINT_COLORS``, or for other skeletons hues at equal steps."""
    if skeleton == POSETRACK:
        return JOINT_COLORS
    hues = [colorsys.hsv_to_rgb(j / len(skeleton), 0.75, 1.0) for j in range(len(skeleton))]
    return tuple((round(255 * r), round(255 * g), round(255 * b)) for r, g, b in hues)


def limb_color(a: int, b: int, skeleton: Skeleton = POSETRACK) -> Color:
    """The colour of the limb between two joints: their side's, or the middle's if sides differ."""
    first, second = skeleton.sides[a], skeleton.sides[b]
    return SIDE_COLORS[first if first == second else "middle"]


def _ordered(color: Color, order: Order) -> Color:
    return color if order == "rgb" else (color[2], color[1], color[0])


def _point(xy: np.ndarray) -> tuple[int, int]:
    # Far outside a picture OpenCV's fixed-point numbers would overflow.
    x, y = np.clip(np.round(xy * 2**_SHIFT), -(2**24), 2**24).astype(int)
    return int(x), int(y)


def _check_image(image: np.ndarray) -> None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"image must be uint8 [H, W, 3], got {image.dtype} {image.shape}")


def line_width(keypoints: np.ndarray, image: np.ndarray) -> int:
    """A width of limbs in pixels that suits a person of this size.

    It is at least 1, and at most a hundredth of the image's longer side.
    """
    finite = keypoints[np.isfinite(keypoints).all(axis=1)]
    extent = float(np.ptp(finite, axis=0).max()) if len(finite) else 0.0
    return int(np.clip(round(extent / 70), 1, max(1, max(image.shape[:2]) // 100)))


# Many parameters: each is one thing to draw or one way to draw it, and callers name them.
def draw_skeleton(
    image: np.ndarray,
    keypoints: np.ndarray,
    scores: np.ndarray | None = None,
    *,
    min_score: float = 0.1,
    box: np.ndarray | None = None,
    track_id: int | None = None,
    width: int | None = None,
    color: Color | None = None,
    order: Order = "rgb",
    skeleton: Skeleton = POSETRACK,
) -> np.ndarray:
    """Draws a person into an image, with smooth edges.

    Args:
        image: uint8 [H, W, 3], drawn into.
        keypoints: [K, 2] pixels; those that are not finite are left out.
        scores: [K]; joints below ``min_score`` and their limbs are left out.
        min_score: the least score of a joint that is drawn.
        box: [4] x, y, width, height in pixels; drawn if given.
        track_id: a number to write at the box, or above the pose if there is no box.
        width: of the limbs in pixels; None takes ``line_width``.
        color: one colour for all joints and limbs; None takes those of the sides.
        order: of the image's channels.
        skeleton: what the keypoints are.

    Returns:
        ``image``.

    Raises:
        ValueError: a wrong shape or dtype.
    """
    _check_image(image)
    keypoints = np.asarray(keypoints, np.float64)
    count = len(skeleton)
    if keypoints.shape != (count, 2):
        raise ValueError(f"keypoints must be [{count}, 2], got {keypoints.shape}")
    shown = np.isfinite(keypoints).all(axis=1)
    if scores is not None:
        if np.shape(scores) != (count,):
            raise ValueError(f"scores must be [{count}], got {np.shape(scores)}")
        shown &= np.asarray(scores) >= min_score
    width = width or line_width(keypoints[shown], image)
    if box is not None:
        _draw_box(image, np.asarray(box, np.float64), max(1, width // 2), order)
    limbs = [
        (_point(keypoints[a]), _point(keypoints[b]), color or limb_color(a, b, skeleton))
        for a, b in skeleton.limbs
        if shown[a] and shown[b]
    ]
    _draw_limbs(image, limbs, width, order)
    for j in np.flatnonzero(shown):
        tint = _ordered(color or SIDE_COLORS[skeleton.sides[j]], order)
        _draw_joint(image, _point(keypoints[j]), 0.8 * width + 1, tint)
    if track_id is not None and (shown.any() or box is not None):
        top = np.asarray(box[:2]) if box is not None else keypoints[shown].min(axis=0)
        _draw_label(image, str(track_id), top, width)
    return image


def _draw_limbs(
    image: np.ndarray,
    limbs: list[tuple[tuple[int, int], tuple[int, int], Color]],
    width: int,
    order: Order,
) -> None:
    """Lines from point to point in a colour, on a dark rim that shows on any background."""
    for start, end, _ in limbs:
        cv2.line(image, start, end, (0, 0, 0), width + 2, cv2.LINE_AA, _SHIFT)
    for start, end, color in limbs:
        cv2.line(image, start, end, _ordered(color, order), width, cv2.LINE_AA, _SHIFT)


def _draw_joint(image: np.ndarray, center: tuple[int, int], radius: float, tint: Color) -> None:
    """A dot in a white ring, on a dark rim."""
    for r, fill in ((radius + 1, (0, 0, 0)), (radius, (255, 255, 255)), (0.6 * radius, tint)):
        cv2.circle(image, center, round(r * 2**_SHIFT), fill, cv2.FILLED, cv2.LINE_AA, _SHIFT)


def _draw_box(image: np.ndarray, box: np.ndarray, width: int, order: Order) -> None:
    x, y, w, h = box
    corners = _point(np.array([x, y])), _point(np.array([x + w, y + h]))
    for tint, line in (((0, 0, 0), width + 2), (_ordered((235, 235, 235), order), width)):
        cv2.rectangle(image, *corners, tint, line, cv2.LINE_AA, _SHIFT)


def _draw_label(image: np.ndarray, text: str, corner: np.ndarray, width: int) -> None:
    """White text on black. Its lower left corner is ``corner``, moved so that all is visible."""
    scale = 0.35 + 0.12 * width
    thickness = max(1, round(1.6 * scale))
    (w, h), below = cv2.getTextSize(text, _FONT, scale, thickness)
    pad = max(2, h // 4)
    x = int(np.clip(corner[0], 0, max(0, image.shape[1] - w - 2 * pad)))
    y = int(np.clip(corner[1], h + below + pad, image.shape[0]))
    cv2.rectangle(image, (x, y - h - below - pad), (x + w + 2 * pad, y), (0, 0, 0), cv2.FILLED)
    origin = (x + pad, y - below)
    cv2.putText(image, text, origin, _FONT, scale, (255, 255, 255), thickness, cv2.LINE_AA)


def draw_key(
    image: np.ndarray, *, note: str = "", order: Order = "rgb", skeleton: Skeleton = POSETRACK
) -> np.ndarray:
    """Writes what the colours mean, and a note, into the lower left corner of ``image``.

    Returns:
        ``image``.

    Raises:
        ValueError: a wrong shape or dtype.
    """
    _check_image(image)
    scale = max(0.35, min(image.shape[:2]) / 1100)
    thickness = max(1, round(1.6 * scale))
    entries: list[tuple[str, Color | None]] = [
        ("left", SIDE_COLORS["left"]),
        ("right", SIDE_COLORS["right"]),
        ("head" if skeleton == POSETRACK else "middle", SIDE_COLORS["middle"]),
    ]
    if note:
        entries.append((note, None))
    sizes = [cv2.getTextSize(text, _FONT, scale, thickness)[0] for text, _ in entries]
    h = max(height for _, height in sizes)
    pad = max(3, h // 2)
    total = pad + sum(
        w + 2 * pad + (h + pad if color else 0)
        for (w, _), (_, color) in zip(sizes, entries, strict=True)
    )
    top = image.shape[0] - h - 2 * pad
    strip = image[max(0, top) :, : max(1, total)]
    strip[:] = (strip * 0.35).astype(np.uint8)
    x, baseline = pad, image.shape[0] - pad
    for (text, color), (w, _) in zip(entries, sizes, strict=True):
        if color:
            cv2.rectangle(
                image, (x, baseline - h), (x + h, baseline), _ordered(color, order), cv2.FILLED
            )
            x += h + pad
        origin = (x, baseline)
        cv2.putText(image, text, origin, _FONT, scale, (255, 255, 255), thickness, cv2.LINE_AA)
        x += w + 2 * pad
    return image


_TILE_HEIGHT, _GAP = 256, 2
"""The height of a sheet's crops and the gap between them, in pixels."""


def montage(
    crops: np.ndarray,
    keypoints: np.ndarray,
    scores: np.ndarray,
    true_keypoints: np.ndarray | None = None,
    visible: np.ndarray | None = None,
    *,
    skeleton: Skeleton = POSETRACK,
) -> np.ndarray:
    """A sheet of crops of people: predicted poses in colour over the true ones in white.

    Args:
        crops: uint8 [B, H, W, 3] RGB, B ≥ 1.
        keypoints: [B, K, 2] predicted, crop pixels; those with a negative score are left out.
        scores: [B, K].
        true_keypoints: [B, K, 2], crop pixels.
        visible: [B, K]; true joints with 0 are left out.
        skeleton: what the keypoints are.

    Returns:
        uint8 RGB. Crops are 256 pixels high, in as many columns as make the sheet about 1.6 times
        as wide as high.

    Raises:
        ValueError: no crops, or shapes that do not fit together.
    """
    if crops.ndim != 4 or crops.shape[3] != 3 or crops.dtype != np.uint8 or len(crops) == 0:
        raise ValueError(
            f"crops must be uint8 [B, H, W, 3] with B >= 1, got {crops.dtype} {crops.shape}"
        )
    count, height, width = crops.shape[:3]
    for name, array in (("keypoints", keypoints), ("true_keypoints", true_keypoints)):
        if array is not None and array.shape != (count, len(skeleton), 2):
            expected = f"[{count}, {len(skeleton)}, 2]"
            raise ValueError(f"{name} must be {expected}, got {array.shape}")
    scale = _TILE_HEIGHT / height
    shift = (scale - 1) / 2  # pixel centres, as cv2.resize has them
    size = round(width * scale), _TILE_HEIGHT
    columns = min(count, max(1, round(np.sqrt(count * 1.6 * height / width))))
    rows = -(-count // columns)
    pitch = size[0] + _GAP, size[1] + _GAP
    sheet = np.full((rows * pitch[1] - _GAP, columns * pitch[0] - _GAP, 3), 24, np.uint8)
    for i in range(count):
        tile = cv2.resize(crops[i], size, interpolation=cv2.INTER_LINEAR)
        if true_keypoints is not None:
            truth = true_keypoints[i] * scale + shift
            if visible is not None:
                truth = np.where(visible[i][:, None] > 0, truth, np.nan)
            draw_skeleton(tile, truth, width=2, color=(255, 255, 255), skeleton=skeleton)
        predicted = keypoints[i] * scale + shift
        draw_skeleton(tile, predicted, scores[i], min_score=0.0, width=1, skeleton=skeleton)
        y, x = i // columns * pitch[1], i % columns * pitch[0]
        sheet[y : y + size[1], x : x + size[0]] = tile
    return sheet
