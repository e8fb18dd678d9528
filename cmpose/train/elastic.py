"""Going on by itself after ``torchrun`` has restarted the processes of a run."""

from __future__ import annotations

import os
from pathlib import Path

from cmpose.distributed import World
from cmpose.files import write_text

LAUNCH = ".launch"
"""File in a run's folder: the id of the launch that wrote there last."""

_NO_ID = "none"
"""torchrun's id of a launch that was given none."""


def is_restart(output: Path, place: World) -> bool:
    """Whether this launch has already begun the run in ``output`` and was restarted since.

    A count of restarts alone does not tell: a launch that was refused because the folder holds a
    run is restarted too. Nor does every node count every restart; so the launch's id must be the
    one that the run's folder names, and be its own or have a restart counted somewhere.
    Every process must call it; all get the main one's answer.
    """
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "")
    restarts = max(place.gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))))
    file = output / LAUNCH
    known = file.read_text() if place.main and file.is_file() else ""
    again = bool(launch) and known == launch and (launch != _NO_ID or restarts > 0)
    if place.main and known and not again:
        file.unlink()
    return place.gather(again)[0]


def mark_begun(output: Path, place: World) -> None:
    """Notes that this launch runs in ``output``, so that its restarts go on there."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if launch and place.main:
        write_text(output / LAUNCH, launch)
