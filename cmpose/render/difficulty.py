"""How hard rendered videos are: light to import, for the command line."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Difficulty:
    """How hard the videos are. Probabilities are per video.

    Attributes:
        occluders: that things stand between the camera and the people.
        defocus: that the whole picture goes out of focus for a stretch of frames.
        background_defocus: that the background is out of focus throughout.
        crossing: that, of two or more people, two walk past each other.
        closeup: that people are larger than the picture, so that it cuts them off.
        motion_blur: that the camera's movement smears the picture.
        camera_motion: 0 holds the camera still; 1 is the usual pan, zoom, roll and shake.
        noise: strength of the sensor noise; 1 is the usual 1 to 5 grey levels.

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

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name in ("camera_motion", "noise"):
                if not 0 <= value < math.inf:
                    raise ValueError(f"difficulty.{name}: {value} is not a strength of at least 0")
            elif not 0 <= value <= 1:
                raise ValueError(f"difficulty.{name}: {value} is not a probability from 0 to 1")
