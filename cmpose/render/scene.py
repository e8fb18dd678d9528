"""Backgrounds of rendered videos: sky, ground in perspective, trees, buildings, rooms, courts."""

from __future__ import annotations

import cv2
import numpy as np


def tone(
    rng: np.random.Generator, hue: tuple[int, int], sat: tuple[int, int], val: tuple[int, int]
) -> np.ndarray:
    """A random colour, float32 [3] BGR, from ranges of OpenCV's hue, saturation and value."""
    hsv = np.array([[[rng.integers(*hue) % 180, rng.integers(*sat), rng.integers(*val)]]], np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)[0, 0].astype(np.float32)


def noise(
    rng: np.random.Generator, shape: tuple[int, int], cell: float, octaves: int = 3
) -> np.ndarray:
    """Smooth noise of about unit strength, float32: a sum of random grids, each finer and fainter.

    Args:
        rng: draws.
        shape: (height, width).
        cell: pixels of the coarsest grid's cells.
        octaves: number of grids.
    """
    height, width = shape
    out = np.zeros(shape, np.float32)
    for k in range(octaves):
        size = cell / 2**k
        grid = rng.standard_normal((int(height / size) + 3, int(width / size) + 3), np.float32)
        out += cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC) / 2**k
    return out


def _wash(part: np.ndarray, top: np.ndarray, bottom: np.ndarray, grain: np.ndarray) -> None:
    """Fills ``part`` [h, w, 3] with a vertical gradient times ``1 + grain``."""
    w = np.linspace(0, 1, part.shape[0], dtype=np.float32)[:, None, None]
    part[:] = (top * (1 - w) + bottom * w) * (1 + grain[..., None])


def _ground(
    part: np.ndarray, rng: np.random.Generator, colour: np.ndarray, strength: float
) -> None:
    """Fills ``part`` with ground up to the horizon at its top row; grain shrinks with distance."""
    height, width = part.shape[:2]
    tile = noise(rng, (256, 256), 5, 2) + 0.5 * noise(rng, (256, 256), 40, 2)
    below = np.arange(height, dtype=np.float32)[:, None] + 0.06 * height
    away = 0.55 * height / below  # 1 at about the middle of the ground
    x = (np.arange(width, dtype=np.float32)[None] - width / 2) * away
    y = np.broadcast_to(330 * away, x.shape)
    grain = cv2.remap(
        tile, x, np.ascontiguousarray(y), cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP
    )
    grain = grain * (strength * np.clip(1.3 - 0.28 * away, 0.25, 1)) + 0.06 * noise(
        rng, (height, width), 160, 2
    )
    _wash(part, colour * 1.08, colour * 0.84, grain)


def _foliage(
    picture: np.ndarray,
    rng: np.random.Generator,
    centre: tuple[float, float],
    radii: tuple[float, float],
    leaf: np.ndarray,
    count: int,
    blob: float,
) -> None:
    """A crown of blobs of about ``blob`` pixels' radius, dark below, light above."""
    at = rng.standard_normal((count, 2)) * 0.42
    at = at[np.argsort(-at[:, 1] + rng.normal(0, 0.3, count))]
    for dx, dy in np.clip(at, -1, 1):
        shade = float(np.clip(0.85 - 0.35 * dy + rng.uniform(-0.18, 0.18), 0.4, 1.4))
        spot = (int(centre[0] + dx * radii[0]), int(centre[1] + dy * radii[1]))
        size = round(blob * rng.uniform(0.6, 1.4)) + 1
        cv2.circle(picture, spot, size, (leaf * shade).tolist(), -1, cv2.LINE_AA)


def _tree(
    picture: np.ndarray, rng: np.random.Generator, x: float, foot: float, size: float
) -> None:
    trunk = tone(rng, (8, 18), (50, 130), (40, 100)).tolist()
    w = size * 0.04
    corners = [(x - w, foot), (x + w, foot), (x + w * 0.6, foot - size * 0.7)]
    corners.append((x - w * 0.6, foot - size * 0.7))
    cv2.fillConvexPoly(picture, np.array(corners, np.int32), trunk, cv2.LINE_AA)
    leaf = tone(rng, (30, 70), (60, 160), (60, 140))
    wide = size * rng.uniform(0.26, 0.42)
    _foliage(picture, rng, (x, foot - size * 0.75), (wide, size * 0.36), leaf, 130, size * 0.05)


def _woods(picture: np.ndarray, rng: np.random.Generator, horizon: int, sky: np.ndarray) -> None:
    """Hazy hills and a line of far trees along the horizon."""
    height, width = picture.shape[:2]
    columns = np.arange(width)
    if rng.random() < 0.6:
        ridge = noise(rng, (8, width), 320, 3)[4] * height * 0.05 + height * rng.uniform(0.05, 0.12)
        far = tone(rng, (50, 110), (30, 90), (70, 130)) * 0.5 + sky * 0.5
        outline = np.stack([columns, horizon - np.maximum(ridge, 2)], 1)
        corners = np.concatenate([outline, [[width, horizon + 2], [0, horizon + 2]]])
        cv2.fillPoly(picture, [corners.astype(np.int32)], far.tolist(), cv2.LINE_AA)
    leaf = tone(rng, (35, 75), (40, 120), (50, 110))
    tall = np.maximum(noise(rng, (8, width), 120, 3)[4] * 0.02 + rng.uniform(0.01, 0.06), 0.004)
    for x in range(0, width, 7):
        rise = float(tall[x]) * height
        cv2.rectangle(
            picture, (x, int(horizon - rise)), (x + 7, horizon), (leaf * 0.7).tolist(), -1
        )
        _foliage(
            picture, rng, (x, horizon - rise), (9.0, 3 + rise * 0.5), leaf, 5, rng.uniform(2, 6)
        )


def _buildings(picture: np.ndarray, rng: np.random.Generator, foot: int) -> None:
    height, width = picture.shape[:2]
    x = -int(rng.integers(0, 80))
    while x < width:
        wide = int(rng.integers(width // 10, width // 4))
        tall = int(height * rng.uniform(0.15, 0.5))
        wall = tone(rng, (0, 180), (5, 80), (90, 220))
        left, top = max(x, 0), max(foot - tall, 0)
        part = picture[top:foot, left : x + wide]
        if part.size:
            _wash(part, wall, wall * 0.9, 0.04 * noise(rng, part.shape[:2], 14, 2))
        glass = tone(rng, (95, 125), (20, 110), (50, 190))
        step = int(rng.integers(22, 40))
        for wy in range(foot - tall + step // 2, foot - step, step):
            for wx in range(x + step // 3, x + wide - step // 2, step):
                corner = (wx + step // 2, wy + int(step * 0.6))
                lit = (glass * rng.uniform(0.7, 1.25)).tolist()
                cv2.rectangle(picture, (wx, wy), corner, lit, -1)
                cv2.rectangle(picture, (wx, wy), corner, (wall * 0.7).tolist(), 1)
        x += wide + int(rng.integers(0, 30))


def _wall(picture: np.ndarray, rng: np.random.Generator, horizon: int, boards: bool) -> None:
    """What is on a wall: bricks or panels, pictures and doors, hoardings along its foot."""
    width = picture.shape[1]
    if rng.random() < 0.5:
        tall = int(rng.integers(14, 44))
        for row, y in enumerate(range(0, horizon, tall)):
            picture[y : y + 1] *= 0.82
            for x in range((row % 2) * tall, width, 2 * tall):
                picture[y : min(y + tall, horizon), x : x + 1] *= 0.82
    for _ in range(int(rng.integers(1, 5))):
        w, h = int(rng.uniform(0.05, 0.16) * width), int(rng.uniform(0.12, 0.4) * horizon)
        x, y = int(rng.integers(0, width)), int(rng.integers(0, max(horizon - h, 1)))
        part = picture[y : min(y + h, horizon), x : x + w]
        colour = tone(rng, (0, 180), (20, 170), (60, 220))
        _wash(part, colour, colour * 0.8, 0.15 * noise(rng, part.shape[:2], 30, 3))
        cv2.rectangle(picture, (x, y), (x + w, min(y + h, horizon)), (60.0, 60.0, 60.0), 2)
    if boards:
        tall, x = int(rng.uniform(0.08, 0.18) * horizon) + 2, 0
        while x < width:
            wide = int(rng.integers(60, 220))
            part = picture[horizon - tall : horizon, x : x + wide]
            colour = tone(rng, (0, 180), (20, 190), (60, 230))
            _wash(part, colour, colour * 0.85, 0.05 * noise(rng, part.shape[:2], 10, 2))
            text = tone(rng, (0, 180), (0, 60), (30, 250)).tolist()
            for at in range(x + 8, min(x + wide - 12, width), 16):
                low = (at + int(rng.integers(4, 12)), horizon - tall // 4)
                cv2.rectangle(picture, (at, horizon - 3 * tall // 4), low, text, -1)
            x += wide
    picture[horizon - 5 : horizon] *= 0.65


def _lines(picture: np.ndarray, rng: np.random.Generator, horizon: int, court: bool) -> None:
    """Floor boards, or a court's white lines, that run to a vanishing point."""
    height, width = picture.shape[:2]
    point = (int(rng.uniform(0.2, 0.8) * width), horizon - int(0.8 * (height - horizon)) - 30)
    gap = int(rng.integers(250, 420)) if court else int(rng.integers(60, 150))
    mask = np.zeros((height, width), np.uint8)
    for x in range(-2 * width, 3 * width, gap):
        cv2.line(mask, point, (x, height), 255, 3 if court else 1, cv2.LINE_AA)
    if court:
        y = horizon + int(rng.uniform(0.15, 0.6) * (height - horizon))
        cv2.line(mask, (0, y), (width, y), 255, 3, cv2.LINE_AA)
    part = picture[horizon:]
    part *= 1 + ((0.3 if court else -0.25) / 255 * mask[horizon:, :, None]).astype(np.float32)


def background(rng: np.random.Generator, size: tuple[int, int], horizon: int) -> np.ndarray:
    """A textured scene, uint8 [height, width, 3] BGR, with the ground below row ``horizon``."""
    height, width = size
    horizon = int(np.clip(horizon, height // 8, height - height // 8))
    picture = np.empty((height, width, 3), np.float32)
    above, below = picture[:horizon], picture[horizon:]
    kind = str(rng.choice(["field", "street", "room", "park", "court", "beach"]))
    clouds = 0.05 * noise(rng, above.shape[:2], 130)
    if kind in ("room", "court"):
        wall = tone(rng, (0, 180), (5, 90), (90, 225))
        _wash(above, wall, wall * 0.88, clouds)
        floor = tone(rng, (0, 180), (30, 140), (80, 190))
        _ground(below, rng, floor, 0.05)
        _wall(picture, rng, horizon, boards=kind == "court" and rng.random() < 0.7)
        if kind == "room" or rng.random() < 0.7:
            _lines(picture, rng, horizon, kind == "court")
    else:
        sky = tone(rng, (96, 116), (20, 130), (150, 240))
        _wash(above, sky, sky * 0.4 + 140, clouds)
        if kind == "street":
            _ground(below, rng, tone(rng, (0, 180), (0, 25), (80, 160)), 0.08)
            _buildings(picture, rng, horizon)
            kerb = horizon + int(0.12 * (height - horizon))
            picture[horizon:kerb] *= 1.18
            picture[kerb : kerb + 3] *= 0.7
        elif kind == "beach":
            _ground(below, rng, tone(rng, (8, 26), (20, 90), (150, 225)), 0.08)
            sea = tone(rng, (90, 110), (60, 150), (90, 180))
            part = picture[horizon - height // 20 : horizon]
            _wash(part, sea * 1.1, sea * 0.9, 0.05 * noise(rng, part.shape[:2], 12, 2))
        else:
            _ground(below, rng, tone(rng, (30, 60), (60, 140), (80, 160)), 0.16)
            _woods(picture, rng, horizon, sky * 0.4 + 140)
        trees = {"field": 2, "park": 7, "street": 3, "beach": 1}[kind]
        for deep in np.sort(rng.uniform(0, 0.22, int(rng.integers(0, trees + 1)))):
            foot = horizon + deep * (height - horizon)
            tall = height * rng.uniform(0.22, 0.4) * (0.6 + 3 * deep)
            _tree(picture, rng, rng.uniform(0, width), foot, tall)
    return np.clip(picture, 0, 255).astype(np.uint8)
