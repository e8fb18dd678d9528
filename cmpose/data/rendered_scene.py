"""Where rendered people move: backgrounds, foreground occluders, light and the camera."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np

from cmpose.data.rendered_draw import Layer

_SOFT = cv2.INTER_CUBIC


def _tone(
    rng: np.random.Generator, hue: tuple[int, int], sat: tuple[int, int], val: tuple[int, int]
):
    """A random colour, float32 BGR, from ranges of OpenCV's hue, saturation and value."""
    hsv = np.uint8([[[rng.integers(*hue) % 180, rng.integers(*sat), rng.integers(*val)]]])
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].astype(np.float32)


def _noise(rng: np.random.Generator, shape: tuple[int, int], cell: float, octaves: int = 3):
    """Smooth noise of unit strength: resized random grids, each finer and fainter; float32."""
    height, width = shape
    out = np.zeros(shape, np.float32)
    for k in range(octaves):
        size = cell / 2**k
        grid = rng.standard_normal((int(height / size) + 3, int(width / size) + 3))
        out += cv2.resize(grid.astype(np.float32), (width, height), interpolation=_SOFT) / 2**k
    return out


def _wash(
    picture: np.ndarray, rows: slice, top, bottom, grain: np.ndarray, strength: float
) -> None:
    """A vertical gradient with grain, into ``picture[rows]`` (float32)."""
    part = picture[rows]
    w = np.linspace(0, 1, part.shape[0], dtype=np.float32)[:, None, None]
    part[:] = (top * (1 - w) + bottom * w) * (1 + strength * grain[rows, :, None])


def _tree(
    picture: np.ndarray, rng: np.random.Generator, x: float, foot: float, size: float
) -> None:
    trunk = _tone(rng, (8, 18), (50, 130), (40, 100)).tolist()
    leaf = _tone(rng, (30, 70), (70, 190), (50, 140))
    w = size * 0.05
    corners = [(x - w, foot), (x + w, foot), (x + w * 0.6, foot - size * 0.7)]
    corners.append((x - w * 0.6, foot - size * 0.7))
    cv2.fillConvexPoly(picture, np.int32(corners), trunk, cv2.LINE_AA)
    for _ in range(26):
        dx, dy = rng.normal(0, size * 0.16), rng.normal(0, size * 0.16)
        shade = 1 - 0.35 * dy / (size * 0.3) + rng.uniform(-0.15, 0.15)
        centre = (int(x + dx), int(foot - size * 0.78 + dy))
        radius = int(size * rng.uniform(0.07, 0.15)) + 1
        cv2.circle(
            picture, centre, radius, (leaf * np.clip(shade, 0.4, 1.5)).tolist(), -1, cv2.LINE_AA
        )


def _building(
    picture: np.ndarray, rng: np.random.Generator, x: int, foot: int, width: int, height: int
) -> None:
    wall = _tone(rng, (0, 180), (5, 80), (90, 220))
    picture[max(foot - height, 0) : foot, max(x, 0) : x + width] = wall
    glass = _tone(rng, (95, 125), (20, 110), (50, 190)).tolist()
    step = int(rng.integers(22, 40))
    for wy in range(foot - height + step // 2, foot - step, step):
        for wx in range(x + step // 3, x + width - step // 2, step):
            corner = (wx + step // 2, wy + int(step * 0.6))
            cv2.rectangle(picture, (wx, wy), corner, glass, -1)
            cv2.rectangle(picture, (wx, wy), corner, (wall * 0.7).tolist(), 1)


def background(rng: np.random.Generator, size: tuple[int, int], horizon: int) -> np.ndarray:
    """A textured scene, uint8 [height, width, 3] BGR, with the ground below row ``horizon``."""
    height, width = size
    horizon = int(np.clip(horizon, height // 8, height - height // 8))
    picture = np.empty((height, width, 3), np.float32)
    coarse, fine = _noise(rng, size, 130), _noise(rng, size, 9, 2)
    kind = str(rng.choice(["field", "street", "room", "park", "court", "beach"]))
    above, below = slice(0, horizon), slice(horizon, height)
    if kind in ("field", "park", "beach", "street"):
        sky = _tone(rng, (96, 118), (20, 140), (150, 240))
        _wash(picture, above, sky, sky * 0.4 + 140, coarse, 0.05)
    if kind in ("field", "park"):
        grass = _tone(rng, (28, 62), (60, 160), (70, 160))
        _wash(picture, below, grass * 1.1, grass * 0.8, fine + coarse, 0.09)
    elif kind == "beach":
        sand = _tone(rng, (8, 26), (20, 90), (150, 225))
        _wash(picture, below, sand, sand * 0.85, fine + 0.5 * coarse, 0.05)
        picture[horizon - height // 22 : horizon] = _tone(rng, (90, 110), (80, 170), (90, 170))
    elif kind == "street":
        road = _tone(rng, (0, 180), (0, 25), (80, 160))
        _wash(picture, below, road, road * 0.85, fine + 0.4 * coarse, 0.05)
    elif kind == "court":
        wall, floor = (
            _tone(rng, (0, 180), (20, 120), (70, 190)),
            _tone(rng, (0, 180), (30, 150), (90, 200)),
        )
        _wash(picture, above, wall * 0.8, wall, coarse, 0.06)
        _wash(picture, below, floor * 1.05, floor * 0.85, fine, 0.03)
    else:
        wall, floor = (
            _tone(rng, (0, 180), (5, 80), (110, 225)),
            _tone(rng, (5, 20), (40, 130), (70, 160)),
        )
        _wash(picture, above, wall, wall * 0.88, coarse, 0.05)
        _wash(picture, below, floor, floor * 0.8, fine, 0.04)

    if kind in ("field", "park"):
        line = horizon - np.abs(_noise(rng, (1, width), 60)[0]) * height * 0.05 - 3
        far = _tone(rng, (35, 75), (50, 120), (50, 110))
        for x in range(width):
            picture[int(line[x]) : horizon, x] = far * (1 + 0.12 * fine[horizon - 1, x])
        for _ in range(int(rng.integers(1, 4)) + 4 * (kind == "park")):
            deep = rng.uniform(0.0, 0.25)
            _tree(
                picture,
                rng,
                rng.uniform(0, width),
                horizon + deep * (height - horizon),
                height * rng.uniform(0.25, 0.55) * (0.6 + deep),
            )
    elif kind == "street":
        x = -int(rng.integers(0, 80))
        while x < width:
            w = int(rng.integers(width // 9, width // 4))
            _building(picture, rng, x, horizon, w, int(height * rng.uniform(0.15, 0.5)))
            x += w + int(rng.integers(0, 30))
        kerb = horizon + int(0.12 * (height - horizon))
        picture[horizon:kerb] *= 1.18
        picture[kerb : kerb + 3] *= 0.7
    elif kind in ("room", "court"):
        if rng.random() < 0.5:  # bricks or panels
            tall = int(rng.integers(14, 44))
            for row, y in enumerate(range(0, horizon, tall)):
                picture[y : y + 1, :] *= 0.82
                for x in range((row % 2) * tall, width, 2 * tall):
                    picture[y : min(y + tall, horizon), x : x + 1] *= 0.82
        for _ in range(int(rng.integers(1, 5))):  # pictures, boards, doors
            w, h = int(rng.uniform(0.05, 0.16) * width), int(rng.uniform(0.12, 0.4) * horizon)
            x, y = int(rng.integers(0, width)), int(rng.integers(0, max(horizon - h, 1)))
            colour = _tone(rng, (0, 180), (20, 190), (50, 230)).tolist()
            cv2.rectangle(picture, (x, y), (x + w, min(y + h, horizon)), colour, -1)
            cv2.rectangle(picture, (x, y), (x + w, min(y + h, horizon)), (60.0, 60.0, 60.0), 2)
        picture[horizon - 5 : horizon] *= 0.65
        vanishing = (width // 2, horizon - int(0.8 * (height - horizon)) - 30)
        if kind == "room" or rng.random() < 0.7:  # boards or court lines run to a point
            gap = int(rng.integers(60, 150)) if kind == "room" else int(rng.integers(250, 420))
            line = np.float32([0.75] * 3) if kind == "room" else np.float32([1.3] * 3)
            mask = np.zeros((height, width), np.uint8)
            for x in range(-2 * width, 3 * width, gap):
                cv2.line(mask, vanishing, (x, height), 255, 1 if kind == "room" else 3, cv2.LINE_AA)
            mask[:horizon] = 0
            picture *= 1 + (line - 1) * (mask[..., None] / np.float32(255))
    return np.clip(picture, 0, 255).astype(np.uint8)


@dataclass
class Occluder:
    """A thing in the foreground.

    Attributes:
        kind: post, foliage, box or bench.
        picture: uint8 [h, w, 3], BGR.
        alpha: float32 [h, w].
        corner: of its top left pixel on the canvas, (x, y).
        parallax: how much more than the ground the camera's moves shift it.
    """

    kind: str
    picture: np.ndarray
    alpha: np.ndarray
    corner: tuple[float, float]
    parallax: float

    def draw(self, layer: Layer, view: np.ndarray, owner: int) -> None:
        """Puts the occluder on the picture; ``view`` [2, 3] maps canvas to picture."""
        height, width = self.alpha.shape
        matrix = view.copy()
        matrix[:, 2] = view[:, :2] @ np.asarray(self.corner) + view[:, 2]
        corners = (
            np.array([[0, 0, 1], [width, 0, 1], [0, height, 1], [width, height, 1]]) @ matrix.T
        )
        low, high = corners.min(0), corners.max(0)
        box = layer.box(low[0], low[1], high[0], high[1])
        if box is None:
            return
        matrix[:, 2] -= box[:2]
        target = (box[2] - box[0], box[3] - box[1])
        colour = cv2.warpAffine(self.picture, matrix, target, borderMode=cv2.BORDER_REPLICATE)
        alpha = cv2.warpAffine(self.alpha, matrix, target)
        layer.cover(box, colour, alpha, owner)


def occluder(
    rng: np.random.Generator, x: float, foot: float, metre: float, blur: float
) -> Occluder:
    """A random thing that stands at canvas (x, foot).

    Args:
        metre: its size in canvas pixels a metre.
        blur: sigma in pixels of the defocus baked into it (0: sharp).
    """
    kind = str(rng.choice(["post", "foliage", "box", "bench"]))
    wide, tall = {
        "post": (0.12, 3.2),
        "foliage": (1.1, 0.9),
        "box": (0.8, 0.75),
        "bench": (1.5, 0.85),
    }[kind]
    w = max(int(wide * rng.uniform(0.8, 1.4) * metre), 6)
    h = max(int(tall * rng.uniform(0.8, 1.25) * metre), 8)
    pad = int(3 * blur) + 2
    shape = (h + 2 * pad, w + 2 * pad)
    picture, alpha = np.zeros((*shape, 3), np.float32), np.zeros(shape, np.float32)
    inner = (slice(pad, pad + h), slice(pad, pad + w))
    grain = 1 + 0.06 * _noise(rng, (h, w), 12, 2)[..., None]
    if kind == "post":
        colour = _tone(rng, (0, 180), (0, 120), (60, 200))
        s = np.linspace(-1, 1, w, dtype=np.float32)
        picture[inner] = (
            colour * grain * (0.45 + 0.6 * np.sqrt(1 - 0.7 * (s - 0.15) ** 2))[None, :, None]
        )
        alpha[inner] = 1
    elif kind == "foliage":
        leaf = _tone(rng, (28, 75), (80, 200), (50, 150))
        picture[:] = leaf * 0.7
        for _ in range(int(rng.integers(60, 110))):
            u, v = rng.normal(0.5, 0.19), 1 - abs(rng.normal(0, 0.42))
            centre = (int(pad + u * w), int(pad + v * h))
            axes = (int(w * rng.uniform(0.03, 0.09)) + 1, int(w * rng.uniform(0.015, 0.05)) + 1)
            turn = float(rng.uniform(0, 180))
            cv2.ellipse(alpha, centre, axes, turn, 0, 360, 1.0, -1, cv2.LINE_8)
            tone = (leaf * rng.uniform(0.6, 1.25)).tolist()
            cv2.ellipse(picture, centre, axes, turn, 0, 360, tone, -1, cv2.LINE_8)
    elif kind == "box":
        colour = _tone(rng, (5, 25), (40, 170), (70, 190))
        picture[inner] = colour * grain
        alpha[inner] = 1
        for y in range(0, h, max(h // 4, 4)):
            picture[pad + y : pad + y + 2, pad : pad + w] *= 0.6
    else:
        colour = _tone(rng, (0, 180), (20, 160), (50, 180))
        picture[:] = colour
        picture[inner] = colour * grain
        bar = max(h // 7, 3)
        for y in (0, int(h * 0.28), int(h * 0.5)):
            alpha[pad + y : pad + y + bar, pad : pad + w] = 1
        for u in (0.04, 0.9):
            alpha[pad : pad + h, pad + int(u * w) : pad + int((u + 0.06) * w) + 2] = 1
    if blur > 0:
        picture, alpha = (
            cv2.GaussianBlur(picture, (0, 0), blur),
            cv2.GaussianBlur(alpha, (0, 0), blur),
        )
    else:
        alpha = cv2.GaussianBlur(alpha, (3, 3), 0.6)
    corner = (x - shape[1] / 2, foot - h - pad)
    return Occluder(
        kind,
        np.clip(picture, 0, 255).astype(np.uint8),
        alpha,
        corner,
        float(rng.uniform(0.05, 0.3)),
    )


def smooth_curve(rng: np.random.Generator, times: np.ndarray, rate: float) -> np.ndarray:
    """[F] a random curve between about -1 and 1 that changes ``rate`` times a second."""
    curve = np.zeros_like(times)
    for k in (1.0, 1.7):
        curve += np.sin(2 * np.pi * (rate * k * rng.uniform(0.7, 1.3) * times + rng.random())) / k
    return curve / 1.6


def camera(
    rng: np.random.Generator,
    times: np.ndarray,
    size: tuple[int, int],
    subject: np.ndarray,
    motion: float,
) -> np.ndarray:
    """The camera's way: matrices [F, 2, 3] from canvas to picture (float64).

    Args:
        times: [F] seconds.
        size: (height, width) of the picture.
        subject: [F, 2] canvas point that the camera follows more or less.
        motion: 0 holds the camera still; 1 is the usual pan, zoom, roll and shake.
    """
    height, width = size
    follow = rng.choice([0.0, 0.6, 1.0])
    held = subject.mean(0)
    centre = held + follow * (subject - held)
    kernel = np.ones(9) / 9  # a camera lags behind a quick subject
    padded = np.pad(centre, ((4, 4), (0, 0)), mode="edge")
    centre = np.stack([np.convolve(padded[:, i], kernel, "valid") for i in (0, 1)], 1)
    pan = np.stack([smooth_curve(rng, times, 0.15), 0.35 * smooth_curve(rng, times, 0.15)], 1)
    shake = np.stack([smooth_curve(rng, times, 2.5), smooth_curve(rng, times, 2.5)], 1)
    centre = centre + motion * (0.07 * width * pan + rng.choice([0.0, 0.0, 0.004]) * width * shake)
    zoom = np.exp(motion * 0.12 * smooth_curve(rng, times, 0.18)) * rng.uniform(0.95, 1.08)
    roll = np.deg2rad(motion * 2.0 * smooth_curve(rng, times, 0.2))
    matrices = np.zeros((len(times), 2, 3))
    matrices[:, 0, 0] = matrices[:, 1, 1] = zoom * np.cos(roll)
    matrices[:, 1, 0] = zoom * np.sin(roll)
    matrices[:, 0, 1] = -matrices[:, 1, 0]
    matrices[:, :, 2] = (
        np.array([width / 2, height / 2]) - (matrices[:, :, :2] @ centre[..., None])[..., 0]
    )
    return matrices
