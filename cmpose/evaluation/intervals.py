"""Means over seeds with Student's confidence intervals, and differences seed by seed."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


@functools.cache
def student_t(freedom: int, confidence: float = CONFIDENCE) -> float:
    """t such that Student's distribution has ``confidence`` of its mass within ± t.

    It is found by bisection. For whole degrees of freedom the distribution function is a finite
    sum (Abramowitz and Stegun 26.7.3 and 26.7.4).

    Args:
        freedom: degrees of freedom, at least 1.
        confidence: between 0 and 1.

    Raises:
        ValueError: either is out of range.
    """
    if freedom < 1 or not 0 < confidence < 1:
        raise ValueError(
            f"freedom={freedom} must be at least 1, confidence={confidence} between 0 and 1"
        )

    def within(t: float) -> float:
        angle = math.atan(t / math.sqrt(freedom))
        sine, cosine = math.sin(angle), math.cos(angle)
        term, total = (cosine, 0.0) if freedom % 2 else (1.0, 0.0)
        for k in range(1 if freedom % 2 else 0, freedom - 1, 2):
            total += term
            term *= cosine**2 * (k + 1) / (k + 2)
        if freedom % 2:
            return 2 / math.pi * (angle + sine * total)
        return sine * total

    low, high = 0.0, 1.0
    while within(high) < confidence:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < confidence else (low, middle)
    return high


class Interval(NamedTuple):
    """A mean over seeds, and half the width of its 95 % interval (None for a single seed)."""

    mean: float
    half: float | None
    seeds: int

    @property
    def covers_zero(self) -> bool | None:
        """Whether 0 is in the interval; None when there is no interval."""
        return None if self.half is None else abs(self.mean) <= self.half

    def text(self, *, sign: bool = False, digits: int = 1) -> str:
        """``44.0 ± 1.2``; a single value has no ±."""
        shown = f"{self.mean:{'+' if sign else ''}.{digits}f}"
        return shown if self.half is None else f"{shown} ± {self.half:.{digits}f}"


def interval(values: Sequence[float]) -> Interval | None:
    """Mean ± t · s / √n, where s² divides by n − 1; None without any value."""
    if not len(values):
        return None
    array = np.asarray(values, np.float64)
    count = len(array)
    if count == 1:
        return Interval(float(array[0]), None, 1)
    half = student_t(count - 1) * float(array.std(ddof=1)) / math.sqrt(count)
    return Interval(float(array.mean()), half, count)


def paired(values: dict[int, float], reference: dict[int, float]) -> Interval | None:
    """The interval of value − reference over the seeds that both have; None without any.

    Args:
        values: seed → value.
        reference: likewise.
    """
    return interval([values[s] - reference[s] for s in sorted(values.keys() & reference.keys())])
