"""Measures how long the parts of a run take."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Clock:
    """Seconds by part; ``with clock("model"):`` counts those of a block.

    Attributes:
        seconds: part → seconds.
    """

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._started = time.perf_counter()

    def since_start(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._started

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - start

    def each(self, part: str, items: Iterator[T]) -> Iterator[T]:
        """Passes the items on, and counts the time that it takes to get each as ``part``."""
        while True:
            with self(part):
                item = next(items, None)
            if item is None:
                return
            yield item
