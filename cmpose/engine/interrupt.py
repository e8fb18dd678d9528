"""Ctrl-C and SIGTERM as a request, so that what is under way is finished and saved first."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Interrupted(RuntimeError):
    """A command was asked to stop; the message says what is saved and how to go on."""


@contextmanager
def stop_requests() -> Iterator[threading.Event]:
    """Turns SIGINT and SIGTERM into a flag, until one of them comes a second time.

    A second signal does what it always does.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    old: dict[int, Any] = {}

    def ask(number: int, _: Any) -> None:
        asked.set()
        signal.signal(number, old[number])

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        old[number] = signal.signal(number, ask)
    try:
        yield asked
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
