"""Folders that one process at a time may write."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
