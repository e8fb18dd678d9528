"""Drawing primitives of rendered people: textured, shaded, anti-aliased limbs and heads.

A limb is a tapered tube: an axis between two picture points, a table of half-widths along it, and
a texture over (along, across). For each pixel of the limb's box, its coordinates t along the axis
and s across it are computed; the texture is sampled there and laid over the picture, with an
opacity that follows from the distance to the outline. Shading is that of a lit cylinder; it depends
on s only, so it is applied to the texture's columns and not to pixels.
"""

from __future__ import annotations

from typing import Literal

import cv2
import numpy as np

ALONG, ACROSS = 32, 24
"""Size of a limb's texture: rows from the axis's start to its end, columns from s = -1 to 1."""

PROFILE = 64
"""Entries of a limb's table of half-widths."""

_S = np.linspace(-1, 1, ACROSS, dtype=np.float32)
_BULGE = np.sqrt(np.maximum(0, 1 - _S * _S))
_ANGLE = np.arcsin(_S)


def _unit(values: np.ndarray) -> np.ndarray:
    """Clips to 0..1 in place; np.clip takes several times as long on arrays this small."""
    np.maximum(values, 0, out=values)
    return np.minimum(values, 1, out=values)


class Layer:
    """A picture being drawn, and a map of who or what each pixel shows.

    Attributes:
        image: uint8 [H, W, 3], BGR.
        owner: uint8 [H, W]; 0 is background, else the number that was given when drawing.
    """

    def __init__(self, image: np.ndarray) -> None:
        self.image = image
        height, width = image.shape[:2]
        self.owner: np.ndarray = np.zeros((height, width), np.uint8)
        self._x = np.arange(width, dtype=np.float32)
        self._y = np.arange(height, dtype=np.float32)

    def box(self, x0: float, y0: float, x1: float, y1: float) -> tuple[int, int, int, int] | None:
        """The box's whole pixels inside the picture; None if there are none."""
        height, width = self.image.shape[:2]
        left, top = max(int(x0), 0), max(int(y0), 0)
        right, bottom = min(int(x1) + 2, width), min(int(y1) + 2, height)
        return (left, top, right, bottom) if left < right and top < bottom else None

    def grid(self, box: tuple[int, int, int, int]) -> tuple[np.ndarray, np.ndarray]:
        """Pixel coordinates of a box: x [1, w] and y [h, 1]."""
        left, top, right, bottom = box
        return self._x[None, left:right], self._y[top:bottom, None]

    def cover(
        self, box: tuple[int, int, int, int], colour: np.ndarray, alpha: np.ndarray, owner: int
    ) -> None:
        """Lays ``colour`` uint8 [h, w, 3] over the box, with opacity ``alpha`` float32 [h, w]."""
        left, top, right, bottom = box
        roi = self.image[top:bottom, left:right]
        roi[:] = cv2.blendLinear(colour, roi, alpha, 1 - alpha)
        if owner:
            self.owner[top:bottom, left:right][alpha > 0.5] = owner


def shade(texture: np.ndarray, normal: tuple[float, float], light: np.ndarray) -> np.ndarray:
    """Lights a texture [ALONG, ACROSS, 3] as a cylinder.

    Args:
        texture: uint8.
        normal: the direction in the picture, (x, y down), in which s grows.
        light: the direction of the light (x, y, towards the camera) times its strength, and the
            strength of ambient light.
    """
    lx, ly, lz, ambient = light.tolist()
    facing = (normal[0] * lx + normal[1] * ly) * _S + lz * _BULGE
    brightness = (ambient + np.maximum(facing, 0)) * (0.68 + 0.32 * _BULGE)
    lit = texture * brightness[:, None]
    return np.minimum(lit, 255, out=lit).astype(np.uint8)


def turned(texture: np.ndarray, yaw: float) -> np.ndarray:
    """The visible half of a texture that runs around a tube, as s-columns.

    Args:
        texture: [ALONG, C, 3]; column C/2 is the front, columns grow to the person's left.
        yaw: the front's direction, radians: 0 faces the camera, π/2 faces picture right.
    """
    columns = texture.shape[1]
    at = (0.5 + (_ANGLE - yaw) / (2 * np.pi)) * columns
    return texture[:, at.astype(np.int64) % columns]


def limb(
    layer: Layer,
    start: np.ndarray,
    end: np.ndarray,
    profile: np.ndarray,
    texture: np.ndarray,
    light: np.ndarray,
    owner: int,
    *,
    hem: Literal["start", "end"] | None = None,
) -> None:
    """Draws a tube with rounded ends.

    Args:
        layer: picture to draw on.
        start: picture point (x, y).
        end: likewise.
        profile: half-widths in pixels from start to end, float32 [PROFILE].
        texture: uint8 [ALONG, ACROSS, 3].
        light: see ``shade``.
        owner: number written to the covered pixels.
        hem: the end where the tube is cut off straight instead of rounded.
    """
    ax, ay, bx, by = float(start[0]), float(start[1]), float(end[0]), float(end[1])
    reach = float(profile.max()) + 1
    box = layer.box(
        min(ax, bx) - reach, min(ay, by) - reach, max(ax, bx) + reach, max(ay, by) + reach
    )
    if box is None:
        return
    length = float(np.hypot(bx - ax, by - ay))
    ux, uy = ((bx - ax) / length, (by - ay) / length) if length > 1e-3 else (0.0, 1.0)
    length = max(length, 1e-3)
    x, y = layer.grid(box)
    x, y = x - ax, y - ay
    along = x * ux + y * uy
    across = y * ux - x * uy
    t = np.minimum(np.maximum(along, 0), length)
    distance = cv2.magnitude(across, along - t)
    t *= (PROFILE - 1) / length
    half = profile[t.astype(np.int32)]
    alpha = _unit(half - distance + 0.5)
    if hem == "start":
        alpha *= _unit(along + 0.5)
    if hem == "end":
        alpha *= _unit(length + 0.5 - along)
    across /= np.maximum(half, 0.5)
    across += 1
    across *= (ACROSS - 1) / 2
    t *= (ALONG - 1) / (PROFILE - 1)
    lit = shade(texture, (-uy, ux), light)
    colour = cv2.remap(lit, across, t, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    layer.cover(box, colour, alpha, owner)


def ball(
    layer: Layer,
    centre: np.ndarray,
    radii: tuple[float, float, float],
    axes: np.ndarray,
    texture: np.ndarray,
    light: np.ndarray,
    owner: int,
) -> None:
    """Draws an ellipsoid with a texture over its longitudes and latitudes (a head).

    Args:
        layer: picture to draw on.
        centre: picture point (x, y).
        radii: half-axes in pixels along the ball's left, up and forward directions.
        axes: [3, 3]; columns left, up, forward in camera axes (x right, y up, z away).
        texture: uint8 [lat, lon, 3]; first row is the top, the middle column the front, columns
            grow to the ball's left.
        light: see ``shade``.
        owner: number written to the covered pixels.
    """
    # Surface points are axes · diag(radii) · n with |n| = 1. A pixel's ray meets the ellipsoid
    # where n solves the quadratic below; its discriminant is the outline.
    inverse = (axes / np.asarray(radii)).T  # camera axes → unit ball
    reach = np.sqrt(((axes * np.asarray(radii)) ** 2).sum(1)).tolist()
    cx, cy = float(centre[0]), float(centre[1])
    box = layer.box(cx - reach[0] - 1, cy - reach[1] - 1, cx + reach[0] + 1, cy + reach[1] + 1)
    if box is None:
        return
    x, y = layer.grid(box)
    x, y = x - cx, cy - y
    m = inverse.astype(np.float32)
    px = m[0, 0] * x + m[0, 1] * y
    py = m[1, 0] * x + m[1, 1] * y
    pz = m[2, 0] * x + m[2, 1] * y
    ray = m[:, 2]
    a = float(ray @ ray)
    b = px * ray[0] + py * ray[1] + pz * ray[2]
    c = px * px + py * py + pz * pz - 1
    root = b * b - a * c
    near = (-b - np.sqrt(np.maximum(root, 0))) / a
    px += near * ray[0]
    py += near * ray[1]
    pz += near * ray[2]
    rows, columns = texture.shape[:2]
    lon = (0.5 + np.arctan2(px, pz) / (2 * np.pi)) * columns - 0.5
    lat = np.arccos(np.clip(py, -1, 1)) * (rows / np.pi) - 0.5
    colour = cv2.remap(texture, lon, lat, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)

    # The normal is the gradient of the ellipsoid's quadratic form, in camera axes.
    nx = m[0, 0] * px + m[1, 0] * py + m[2, 0] * pz
    ny = m[0, 1] * px + m[1, 1] * py + m[2, 1] * pz
    nz = m[0, 2] * px + m[1, 2] * py + m[2, 2] * pz
    norm = np.sqrt(nx * nx + ny * ny + nz * nz) + 1e-6
    facing = (nx * light[0] - ny * light[1] - nz * light[2]) / norm
    brightness = (light[3] + np.maximum(facing, 0)) * (0.7 - 0.3 * nz / norm)
    lit = cv2.multiply(colour, cv2.merge([brightness.astype(np.float32)] * 3), dtype=cv2.CV_8U)
    # root / a is 1 - r², where r is the distance to the centre in radii: near the outline half of
    # it is the distance to the outline.
    alpha = _unit(root * (0.5 * min(radii) / a) + 0.5)
    layer.cover(box, lit, alpha.astype(np.float32), owner)
