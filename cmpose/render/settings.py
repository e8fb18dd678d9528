"""What a rendered data set is asked for: light to import, for the command line."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

SPLITS = {"train": "train", "val": "test"}
"""Split → the ending of its sequences' names: PoseTrack calls those for validation ``_test``."""

ADDED = ("clutter", "sunlight", "footage", "crowd", "seated", "muted", "above")
"""Fields of ``Difficulty`` that are left out of ``rendered_SPLIT.json`` where they are 0."""

VIDEOS = 500_000
"""At most this many sequences in a split: the other split's have the numbers beyond."""


@dataclass(frozen=True)
class Difficulty:
    """How hard, and how much like camera footage, the videos are. Probabilities are per video.

    Attributes:
        occluders: probability that things stand between the camera and the people.
        defocus: probability that the whole picture goes out of focus for a stretch of frames.
        background_defocus: probability that the background is out of focus throughout.
        crossing: probability that, of two or more people, two walk past each other.
        closeup: probability that people are larger than the picture, so that it cuts them off.
        motion_blur: probability that the camera's movement smears the picture.
        camera_motion: 0 holds the camera still; 1 is the usual pan, zoom, roll and shake.
        noise: strength of the sensor noise; 1 is the usual 1 to 5 grey levels.
        clutter: probability that the background is full of overlapping shapes of all sizes, which
            has the statistics of photographs.
        sunlight: probability of hard light, in which people cast shadows.
        footage: probability that the video looks like a small camera's: strong contrast, pale
            colours, low resolution, sharpening and compression.
        crowd: probability that people stand close together.
        seated: probability that a person (not a video) sits on a chair, or in a wheelchair.
        muted: probability that a person's clothes are plain and black, white, grey or dark.
        above: probability that the camera looks down on people, by 12 to 40 degrees.

    Raises:
        ValueError: a probability outside 0 to 1, or a negative strength.
    """

    occluders: float = 0.3
    defocus: float = 0.2
    background_defocus: float = 0.2
    crossing: float = 0.3
    closeup: float = 0.06
    motion_blur: float = 0.25
    camera_motion: float = 1.0
    noise: float = 1.0
    clutter: float = 0.0
    sunlight: float = 0.0
    footage: float = 0.0
    crowd: float = 0.0
    seated: float = 0.0
    muted: float = 0.0
    above: float = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in ("camera_motion", "noise"):
                if not 0 <= value < math.inf:
                    raise ValueError(f"difficulty.{name}: {value} is not a strength of at least 0")
            elif not 0 <= value <= 1:
                raise ValueError(f"difficulty.{name}: {value} is not a probability from 0 to 1")


@dataclass(frozen=True)
class RenderSettings:
    """All that determines a sequence besides its index.

    Attributes:
        seed: non-negative.
        frames: in each sequence, 1 to 9999.
        size: (height, width) of a frame in pixels, even, at least 96.
        split: ``train`` or ``val``.
        fps: frames a second that the motion is sampled at, 1 to 1000.
        max_people: a sequence shows 1 to this many people, at most 20.
        quality: of the JPEG files, 1 to 100.
        difficulty: how often things get in the way.
        version: of the renderer; raised when the same settings give other pictures.

    Raises:
        TypeError: an argument that is no whole number where one is needed.
        ValueError: an argument out of range.
    """

    seed: int
    frames: int
    size: tuple[int, int] = (360, 640)
    split: str = "val"
    fps: float = 25.0
    max_people: int = 4
    quality: int = 90
    difficulty: Difficulty = Difficulty()
    version: int = 1

    def __post_init__(self) -> None:
        check_number("frames", self.frames, 1, 9999)
        check_number("seed", self.seed, 0, 2**63 - 1)
        check_number("max_people", self.max_people, 1, 20)
        check_number("quality", self.quality, 1, 100)
        if self.split not in SPLITS:
            raise ValueError(f"split: {self.split!r} is not one of {', '.join(SPLITS)}")
        if not 1 <= self.fps <= 1000:
            raise ValueError(f"fps: {self.fps} is not between 1 and 1000")
        size = self.size
        if len(size) != 2 or any(isinstance(v, bool) or not isinstance(v, int) for v in size):
            raise TypeError(f"size: expected (height, width) as two integers, got {size!r}")
        for name, value in zip(("height", "width"), size, strict=True):
            if value < 96 or value > 4320 * 2 or value % 2:
                raise ValueError(f"size: {name} {value} is not an even number from 96 to 8640")

    def to_json(self) -> dict[str, Any]:
        """Plain data, as ``rendered_SPLIT.json`` holds it."""
        # Sets that were rendered before there was any of these go on.
        difficulty = {
            name: value
            for name, value in vars(self.difficulty).items()
            if value or name not in ADDED
        }
        return asdict(self) | {"size": list(self.size), "difficulty": difficulty}

    def sequence_name(self, video: int) -> str:
        """The sequence's name in PoseTrack's style, e.g. ``000001_mpii_train``."""
        # Other numbers in the other split keep image ids apart when both are merged.
        number = video + 1 + (VIDEOS if self.split == "val" else 0)
        return f"{number:06d}_mpii_{SPLITS[self.split]}"


def check_number(name: str, value: object, low: int, high: int) -> None:
    """Raises TypeError unless ``value`` is a whole number, ValueError unless low ≤ value ≤ high."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{name}: {value} is not between {low} and {high}")
