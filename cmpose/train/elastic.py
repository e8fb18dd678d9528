"""Going on by itself after ``torchrun`` has restarted the processes of a run."""

from __future__ import annotations

import os
from pathlib import Path

from cmpose.distributed import World
from cmpose.files import write_text

LAUNCH = ".launch"
"""File in a run's folder: the id of the launch that has begun or resumed the run."""

_NO_ID = "none"
"""The id that torchrun gives a launch without ``--rdzv-id``."""


def is_restart(output: Path, world: World) -> bool:
    """Whether ``torchrun`` has restarted this launch after it had begun the run in ``output``.

    Such a process goes on with the run without ``--resume``. torchrun's count of restarts cannot
    decide: torchrun also restarts a launch that was refused because the folder holds another run,
    and a node that replaces a dead one has a count of 0. Therefore the id of
    the launch must be the one in the run's folder; an id that all launches share (``none``) counts
    only if some process was restarted.

    Every process must call it; all get the main one's answer.
    """
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "")
    restarts = max(world.gather(int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))))
    file = output / LAUNCH
    begun_by = file.read_text() if world.main and file.is_file() else ""
    same = bool(launch) and begun_by == launch and (launch != _NO_ID or restarts > 0)
    if world.main and begun_by and not same:
        file.unlink()
    return world.gather(same)[0]


def mark_begun(output: Path, world: World) -> None:
    """Writes this launch's id into ``output``, so that its restarts go on there."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if launch and world.main:
        write_text(output / LAUNCH, launch)
