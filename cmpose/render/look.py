"""What rendered people look like: clothes, skin, hair and faces as textures, and thickness."""

from __future__ import annotations

from dataclasses import dataclass, field

import cv2
import numpy as np

from cmpose.render.draw import ACROSS, ALONG, PROFILE
from cmpose.render.kinematics import Build
from cmpose.render.scene import tone

_SKINS = (
    (188, 206, 240),
    (160, 188, 232),
    (130, 165, 214),
    (96, 132, 184),
    (64, 92, 142),
    (44, 62, 98),
)
_HAIRS = ((28, 26, 30), (34, 48, 70), (52, 84, 128), (88, 148, 196), (150, 156, 162), (38, 52, 140))
_SHOES = ((40, 40, 44), (230, 230, 232), (60, 70, 110), (48, 52, 180), (150, 90, 40))
_TURN = 64  # columns of a texture that runs all the way around the torso

# Half-widths along an axis: (position from 0 to 1, half-width in units of stature).
_THIGH = ((0.0, 0.050), (0.25, 0.051), (0.7, 0.040), (1.0, 0.035))
_SHANK = ((0.0, 0.034), (0.28, 0.036), (0.7, 0.025), (1.0, 0.021))
_UPPER_ARM = ((0.0, 0.027), (0.2, 0.0295), (0.45, 0.028), (1.0, 0.023))
_FOREARM = ((0.0, 0.023), (0.25, 0.025), (1.0, 0.016))
_TORSO_WIDTH = (
    (0.0, 0.076),
    (0.12, 0.086),
    (0.45, 0.074),
    (0.72, 0.092),
    (0.9, 0.094),
    (0.965, 0.062),
    (1.0, 0.034),
)
_TORSO_DEPTH = (
    (0.0, 0.066),
    (0.15, 0.068),
    (0.45, 0.058),
    (0.72, 0.068),
    (0.9, 0.052),
    (1.0, 0.032),
)


def _table(points: tuple[tuple[float, float], ...]) -> np.ndarray:
    at, value = np.asarray(points).T
    return np.interp(np.linspace(0, 1, PROFILE), at, value).astype(np.float32)


def _colour(rng: np.random.Generator, low: int = 40, high: int = 235) -> np.ndarray:
    """A cloth's colour, BGR."""
    return tone(rng, (0, 180), (0, 215), (low, high))


def _muted(rng: np.random.Generator, low: int = 0, high: int = 0) -> np.ndarray:
    """The colour of most clothes that people wear, BGR: black, white, grey, or a dark one."""
    kind = str(rng.choice(["black", "white", "grey", "dark"], p=[0.42, 0.16, 0.17, 0.25]))
    value = {"black": (6, 45), "white": (180, 245), "grey": (50, 170), "dark": (30, 110)}[kind]
    return tone(rng, (0, 180), (30, 190) if kind == "dark" else (0, 30), value)


def _pick(rng: np.random.Generator, colours: tuple[tuple[int, int, int], ...]) -> np.ndarray:
    return np.array(colours[int(rng.integers(len(colours)))], np.float32)


def _cloth(
    rng: np.random.Generator, kind: str, first: np.ndarray, second: np.ndarray
) -> np.ndarray:
    """A cloth [ALONG, _TURN, 3] uint8 of the given pattern, with soft folds."""
    t = np.linspace(0, 1, ALONG)[:, None]
    lon = np.linspace(0, 1, _TURN, endpoint=False)[None, :]
    n = int(rng.integers(3, 7))
    mix = np.zeros((ALONG, _TURN))
    if kind == "stripes":
        mix = (np.sin(2 * np.pi * n * t) > 0) + 0 * lon
    elif kind == "upright":
        mix = (np.sin(2 * np.pi * 2 * n * lon) > 0.2) + 0 * t
    elif kind == "plaid":
        mix = 0.5 * (np.sin(2 * np.pi * n * t) > 0.3) + 0.5 * (np.sin(4 * np.pi * n * lon) > 0.3)
    elif kind == "yoke":
        mix = (t > rng.uniform(0.55, 0.8)) + 0 * lon
    elif kind == "blotches":
        blobs = cv2.resize(rng.random((7, 10)), (_TURN, ALONG), interpolation=cv2.INTER_CUBIC)
        mix = np.clip((blobs - 0.5) * 6, 0, 1)
    cloth = first + (second - first) * np.asarray(mix, np.float64)[..., None]
    folds = cv2.resize(rng.standard_normal((6, 12)), (_TURN, ALONG), interpolation=cv2.INTER_CUBIC)
    return np.clip(cloth * (1 + 0.07 * folds[..., None]), 0, 255).astype(np.uint8)


def _half(cloth: np.ndarray) -> np.ndarray:
    """The texture [ALONG, ACROSS, 3] of a limb, from one that runs all the way around."""
    return cv2.resize(cloth[:, : _TURN // 2], (ACROSS, ALONG), interpolation=cv2.INTER_AREA)


def _face(rng: np.random.Generator, skin: np.ndarray, hair: np.ndarray, style: str) -> np.ndarray:
    """A head's texture [64, 128, 3]: rows crown to chin, the middle column the face."""
    lat = np.linspace(90, -90, 64)[:, None]
    lon = np.linspace(-180, 180, 128, endpoint=False)[None, :]
    head = np.empty((64, 128, 3), np.float32)
    head[:] = skin

    def paint(where: np.ndarray, colour: np.ndarray | tuple[float, float, float]) -> None:
        head[np.broadcast_to(where, (64, 128))] = colour

    def spot(x: float, y: float, w: float, h: float) -> np.ndarray:
        return ((lon - x) / w) ** 2 + ((lat - y) / h) ** 2 < 1

    for x in (-88, 88):
        paint(spot(x, -6, 13, 17), skin * 0.78)  # ears
    dark = np.minimum(hair, skin * 0.45)
    for x in (-24, 24):
        paint(spot(x, 8, 13, 7), (238.0, 238.0, 238.0))
        paint(spot(x, 8, 6, 7), (36.0, 32.0, 30.0))
        paint(spot(x, 21, 15, 4), dark)
    paint(spot(0, -38, 20, 5), skin * np.array([0.62, 0.58, 0.82]))
    if rng.random() < 0.35 and style in ("short", "bald", "cap"):  # beard
        paint((lat < -22) & (np.abs(lon) < 75) & ~spot(0, -38, 17, 5), hair * 0.9 + 12)
    if rng.random() < 0.15:  # glasses
        for x in (-24, 24):
            paint(spot(x, 8, 20, 14) & ~spot(x, 8, 15, 9), (30.0, 30.0, 30.0))
        paint((np.abs(lat - 9) < 2) & (np.abs(lon) > 40) & (np.abs(lon) < 90), (30.0, 30.0, 30.0))
    if style != "bald":
        nape = -62 if style in ("long", "pony", "bun") else -38
        line = np.interp(np.abs(lon), [0, 40, 66, 82, 104, 180], [46, 40, 14, 6, -28, nape])
        strands = 1 + 0.12 * rng.standard_normal((1, 128, 1)).astype(np.float32)
        head = np.where((lat > line)[..., None], hair * strands, head)
    if style == "cap":
        paint(np.broadcast_to(lat > 30, (64, 128)), hair)
    return np.clip(cv2.GaussianBlur(head, (3, 3), 0), 0, 255).astype(np.uint8)


@dataclass
class Look:
    """A person's clothes and features.

    Attributes:
        hair: style: short, long, pony, bun, bald or cap.
        hair_colour: BGR.
        skirt: length as a share of the thigh's; 0 for trousers.
        textures: part of the body → uint8 picture.
        tables: part of the body → half-widths [PROFILE] along it, in units of stature.
    """

    hair: str
    hair_colour: np.ndarray
    skirt: float
    textures: dict[str, np.ndarray] = field(default_factory=dict)
    tables: dict[str, np.ndarray] = field(default_factory=dict)

    @staticmethod
    def draw(rng: np.random.Generator, build: Build, muted: bool = False) -> Look:
        """Random clothes and features for a person of this build; ``muted``: plain, no colours."""
        colour = _muted if muted else _colour
        skin = _pick(rng, _SKINS) * rng.uniform(0.92, 1.06)
        hair = _pick(rng, _HAIRS) * rng.uniform(0.85, 1.15)
        style = str(
            rng.choice(
                ["short", "long", "pony", "bun", "bald", "cap"],
                p=[0.4, 0.2, 0.12, 0.06, 0.08, 0.14],
            )
        )
        if style == "cap":
            hair = _colour(rng)
        dress = rng.random() < 0.16
        skirt = rng.uniform(0.55, 1.25) if dress else 0.0
        top, top2, bottom = colour(rng), colour(rng), colour(rng, 30, 170)
        kinds = ["plain", "stripes", "upright", "plaid", "yoke", "blotches"]
        pattern = str(rng.choice(kinds, p=[0.44, 0.16, 0.1, 0.12, 0.1, 0.08]))
        if muted and rng.random() < 0.8:
            pattern = "plain"
            bottom = top * rng.uniform(0.8, 1.1) if rng.random() < 0.3 else bottom
        shirt = _cloth(rng, pattern, top, top2)
        if pattern in ("yoke", "stripes") and rng.random() < 0.5:
            sleeve_cloth = _cloth(rng, "plain", top2, top)
        else:
            sleeve_cloth = _cloth(rng, "plain" if pattern == "yoke" else pattern, top, top2)
        trousers = _cloth(rng, "plain" if rng.random() < 0.85 else "upright", bottom, bottom * 0.7)
        sleeve = float(rng.choice([0.1, 0.6, 1.4, 2.0], p=[0.14, 0.42, 0.08, 0.36]))
        leg = float(rng.choice([0.55, 1.05, 2.0], p=[0.2, 0.14, 0.66])) if not dress else 0.0
        bare = _cloth(rng, "plain", skin, skin)
        shoe = _pick(rng, _SHOES)

        def sleeved(cloth: np.ndarray, length: float, part: int) -> np.ndarray:
            rows = round(min(max(length - part, 0.0), 1.0) * ALONG)
            out = _half(bare)
            out[:rows] = _half(cloth)[:rows]
            if 0 < rows < ALONG:
                out[rows - 1] = out[rows - 1] * 0.7  # the hem's shadow
            return out

        textures = {
            "upper_arm": sleeved(sleeve_cloth, sleeve, 0),
            "forearm": sleeved(sleeve_cloth, sleeve, 1),
            "thigh": sleeved(trousers, leg, 0),
            "shank": sleeved(trousers, leg, 1),
            "hips": _half(shirt if dress else trousers),
            "skin": _half(bare),
            "shoe": _half(_cloth(rng, "plain", shoe, shoe)),
            "torso": Look._torso(rng, shirt, shirt if dress else trousers, skin, top2),
            "skirt": shirt if rng.random() < 0.5 else trousers,
            "head": _face(rng, skin, hair, style),
            "hair": _half(_cloth(rng, "upright", hair, hair * 0.8)),
        }
        g = build.girth
        baggy = rng.uniform(1.0, 1.22)
        tables = {
            "thigh": _table(_THIGH) * g * (baggy if leg > 0.9 else 1),
            "shank": _table(_SHANK) * g * (baggy if leg > 1.5 else 1),
            "upper_arm": _table(_UPPER_ARM) * g * (rng.uniform(1, 1.15) if sleeve > 0.9 else 1),
            "forearm": _table(_FOREARM) * g * (rng.uniform(1, 1.2) if sleeve > 1.5 else 1),
            "width": _table(_TORSO_WIDTH)
            * (0.4 + 0.6 * g)
            * (build.shoulder / build.stature / 0.106),
            "depth": _table(_TORSO_DEPTH) * (0.2 + 0.8 * g),
        }
        if rng.random() < 0.35:  # a narrower waist, wider hips
            at = np.linspace(0, 1, PROFILE, dtype=np.float32)
            tables["width"] *= 1 - 0.14 * np.exp(-(((at - 0.5) / 0.16) ** 2))
            tables["width"] *= 1 + 0.07 * np.exp(-(((at - 0.12) / 0.12) ** 2))
        return Look(style, hair, skirt, textures, tables)

    @staticmethod
    def _torso(
        rng: np.random.Generator,
        shirt: np.ndarray,
        below: np.ndarray,
        skin: np.ndarray,
        accent: np.ndarray,
    ) -> np.ndarray:
        """A texture from the hips up to the neck: shirt over trousers. Front and back differ."""
        torso = shirt.copy()
        hem = int(rng.integers(1, 9))
        torso[:hem] = below[:hem]
        torso[hem] = torso[hem] * 0.6
        front = _TURN // 2
        neck = int(rng.integers(1, 6))
        for row in range(neck):
            half = neck - row + 1
            torso[ALONG - 1 - row, front - half : front + half + 1] = skin
        kind = rng.choice(["none", "logo", "buttons", "open"], p=[0.35, 0.3, 0.15, 0.2])
        if kind == "logo":
            w, h = int(rng.integers(3, 8)), int(rng.integers(2, 5))
            row = int(rng.integers(17, 22))
            torso[row : row + h, front - w : front + w] = accent
        elif kind == "buttons":
            torso[hem:-2, front] = torso[hem:-2, front] * 0.55
        elif kind == "open":  # a jacket over a shirt
            torso[hem:-3, front - 4 : front + 5] = accent
        return torso
