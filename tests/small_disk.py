"""A file system of 2 MB to fill up."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MEGABYTES = 2


@contextmanager
def small_disk(parent: Path) -> Iterator[Path]:
    """An empty folder on a disk of its own, full after 2 MB.

    Needs the right to mount, which root has; without it the test is skipped, but fails where
    ``CMPOSE_REQUIRE_SMALL_DISK=1`` is set, as continuous integration does.
    """
    folder = parent / "disk"
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"size={MEGABYTES}m".encode()
    if libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", 0, options):
        reason = f"no small disk can be mounted: {os.strerror(ctypes.get_errno())}"
        if os.environ.get("CMPOSE_REQUIRE_SMALL_DISK") == "1":
            pytest.fail(reason)
        pytest.skip(reason)
    try:
        yield folder
    finally:
        libc.umount2(os.fsencode(folder), 2)  # MNT_DETACH: whoever still has a file open keeps it
