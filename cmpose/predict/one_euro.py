"""Poses that hold still: the One-Euro filter (Casiez, Roussel and Vogel, CHI 2012) on keypoints.

Each keypoint goes through a low-pass filter whose cutoff grows with its speed,

    cutoff = min_cutoff + beta · |speed|,    x̂ = α x + (1 − α) x̂_before,    α = 1 / (1 + τ / Δt),

with τ = 1 / (2π · cutoff): a joint at rest is smoothed much, and a fast one lags little. Speeds are
in sizes of the person a second, so that near and far people are treated alike.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from cmpose.predict.frame import PredictedFrame, PredictedPerson

_BETA = 20.0
"""Hertz that a speed of one size of the person a second adds to the cutoff."""

_SPEED_CUTOFF = 1.0
"""Of the speed itself, in hertz; the paper's."""

_FORGET = 1.0
"""Seconds; a person who was away for longer begins anew."""


def _share(cutoff: np.ndarray | float, seconds: float) -> np.ndarray | float:
    """α: how much of a new value is taken."""
    return 1 / (1 + 1 / (2 * math.pi * cutoff * seconds))


@dataclass
class _State:
    """A person's keypoints and speeds [K, 2] after the last frame that they were in."""

    frame: int
    keypoints: np.ndarray
    speeds: np.ndarray


class KeypointSmoother:
    """Smooths the keypoints of a video's people, frame by frame; it looks at no later frame."""

    def __init__(self, strength: float, fps: float) -> None:
        """
        Args:
            strength: 0 changes nothing. ``min_cutoff`` is 1 / ``strength`` hertz: 1 is usual, more
                is smoother, and lags more.
            fps: the frames' rate.
        """
        self.strength, self.fps = strength, fps
        self._states: dict[int, _State] = {}

    def __call__(self, frame: PredictedFrame) -> PredictedFrame:
        """The next frame, with its people's keypoints smoothed, rounded to four decimals."""
        if not self.strength:
            return frame
        now, most = frame.number, _FORGET * self.fps
        self._states = {i: s for i, s in self._states.items() if now - s.frame <= most}
        return replace(frame, people=[self._smoothed(person, now) for person in frame.people])

    def _smoothed(self, person: PredictedPerson, now: int) -> PredictedPerson:
        state = self._states.get(person.track_id)
        raw = person.keypoints
        if state is None or now <= state.frame:
            self._states[person.track_id] = _State(now, raw, np.zeros_like(raw))
            return person
        seconds = (now - state.frame) / self.fps
        size = max(1.0, float(person.box[2:].max()))
        a = _share(_SPEED_CUTOFF, seconds)
        speeds = a * (raw - state.keypoints) / (size * seconds) + (1 - a) * state.speeds
        speed = np.linalg.norm(speeds, axis=1, keepdims=True)
        a = _share(1 / self.strength + _BETA * speed, seconds)
        keypoints = a * raw + (1 - a) * state.keypoints
        self._states[person.track_id] = _State(now, keypoints, speeds)
        return person._replace(keypoints=np.round(keypoints, 4))
