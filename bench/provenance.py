"""What results of benchmarks say of their origin."""

from __future__ import annotations

import re

from cmpose.provenance import (
    PROJECT,
    command_line,
    commit,
    device,
    driver,
    machine,
    provenance,
    version,
)

__all__ = [
    "NOT_A_RESULT",
    "PROJECT",
    "command_line",
    "commit",
    "device",
    "driver",
    "machine",
    "provenance",
    "slug",
    "version",
]

NOT_A_RESULT = "CPU: not a performance result"


def slug(name: str) -> str:
    """A card's name as a file's: ``NVIDIA GeForce RTX 4090`` → ``nvidia-geforce-rtx-4090``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
