"""Commands that are killed at a rename: what they leave must never stand in the next run's way."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.shared_data import PROJECT

_KILLED_AT = """
import os, sys
from cmpose import files
from cmpose.cli import main

left, rename = int(sys.argv[1]), files.rename

def killed(old, new):
    global left
    if left == 0:
        os._exit(9)
    left -= 1
    rename(old, new)

files.rename = killed
main(sys.argv[2:])
"""


def ends_before_rename(number: int, arguments: list[str]) -> bool:
    """Runs ``cmpose ARGUMENTS``, killed at its rename ``number`` from 0; False if it has fewer."""
    done = subprocess.run(
        [sys.executable, "-c", _KILLED_AT, str(number), *arguments],
        cwd=PROJECT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode in (0, 9), done.stderr
    return done.returncode == 9
