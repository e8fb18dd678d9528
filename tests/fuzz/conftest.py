"""A hunt: many inputs from hypothesis, within limits of time and memory, and how many they were.

``make test`` tries a few, always the same ones; ``make fuzz`` tries at least ``CMPOSE_FUZZ`` times
as many, others each time.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

FACTOR = int(os.environ.get("CMPOSE_FUZZ", 1))
SECONDS = 60
STOPS = signal.SIGPROF, signal.SIGALRM
MEMORY = 2 << 30


def _status(name: str) -> int:
    """Bytes that ``/proc/self/status`` says, 0 where there is none."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) << 10 for line in file if line.startswith(name))
    except (OSError, StopIteration):
        return 0


def _forget_peak() -> None:
    if os.path.exists("/proc/self/clear_refs"):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


class TooLong(BaseException):
    """No ``Exception``, so that hypothesis does not wait for it again and again."""


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TooLong


@pytest.fixture
def hunt(record_property) -> Iterator[Callable[..., None]]:
    """``hunt(check, strategy, tries)``: ``check(input)`` of so many inputs, times ``CMPOSE_FUZZ``.

    What fails is made smaller first, unless ``shrink=False``.

    A check that takes more than 60 s of the processor's time, or ten times that on the clock,
    which other programs may stop, or more than 2 GB of memory fails.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = {number: signal.signal(number, _too_long) for number in STOPS}

    def run(
        check: Callable[[Any], None],
        strategy: st.SearchStrategy[Any],
        tries: int,
        shrink: bool = True,
    ) -> None:
        tried = 0
        gc.collect()  # what is freed within a check would hide what that takes

        def attempt(value: Any) -> None:
            nonlocal tried
            tried += 1
            _forget_peak()
            start = _status("VmRSS")
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(10 * SECONDS)
            try:
                check(value)
            except TooLong:
                raise TooLong(f"took more than {SECONDS} s: {value!r:.5000}") from None
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.alarm(0)
            taken = _status("VmHWM") - start
            assert taken < MEMORY, f"took {taken / 1e9:.1f} GB"

        limits = settings(
            max_examples=tries * FACTOR,
            database=None,
            deadline=None,
            derandomize=FACTOR == 1,
            print_blob=FACTOR > 1,
            report_multiple_bugs=False,
            phases=[Phase.generate, *([Phase.shrink] if shrink else [])],
            suppress_health_check=list(HealthCheck),
        )
        # Far beyond what a check may take, so that one that runs away does not take the machine.
        size = _status("VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (size + 4 * MEMORY if size else soft, hard))
        try:
            limits(given(strategy)(attempt))()
        finally:
            record_property("inputs tried", tried)

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
