"""How files are written."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def sync(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes a file beside its place and renames it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text(text)
    os.replace(partial, path)


def finite_or_none(value: Any) -> Any:
    """Plain data with nan and infinities as None, which JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_or_none(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_none(item) for item in value]
    return value


def write_metrics(folder: Path, metrics: dict[str, Any]) -> Path:
    """Writes ``metrics.json`` into a run's folder, whole or not at all."""
    path = folder / "metrics.json"
    write_text(path, json.dumps(finite_or_none(metrics), indent=1) + "\n")
    return path


@contextmanager
def alone_in(
    folder: Path, command: str, instead: str, error: type[Exception] = RuntimeError
) -> Iterator[None]:
    """Makes ``folder`` if absent and holds it for this process, by a lock that ends with it.

    Args:
        folder: what is written.
        command: of cmpose, for the message.
        instead: what to give another of, for the message.
        error: what to raise.

    Raises:
        error: another process holds the folder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise error(
                f"{folder}: another cmpose {command} is writing there; wait for it, or give "
                f"another {instead}"
            ) from None
        yield


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
