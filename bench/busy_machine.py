"""What a training step takes beside other processes, by how long OpenMP's threads spin: a table.

``python -m bench.busy_machine``. Each figure is the median step of the demo's recipe in a process
of its own. The neighbours are processes that only compute. See ``cmpose/__main__.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys

from bench.cpu_gain import training_step
from bench.harness.timing import Clock
from bench.report.tables import table

NEIGHBOURS = (0, 2, 10)
SETTINGS: dict[str, dict[str, str]] = {
    "libgomp's own": {},
    "`GOMP_SPINCOUNT=2000`, the command line's": {"GOMP_SPINCOUNT": "2000"},
    "`OMP_WAIT_POLICY=passive`": {"OMP_WAIT_POLICY": "passive"},
}


def step_seconds(steps: int) -> float:
    """The median second of a training step: input, forward, losses, backward, AdamW."""
    step = training_step("demo")
    return statistics.median([Clock().wall(step) for _ in range(steps + 2)][2:])


def measure(neighbours: int, setting: dict[str, str], steps: int) -> float:
    """``step_seconds`` in a fresh process, since libgomp reads its settings once."""
    settings = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in settings}
    command = [sys.executable, "-m", "bench.busy_machine", "--here", "--steps", str(steps)]
    with contextlib.ExitStack() as stack:
        for _ in range(neighbours):
            loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
            stack.enter_context(loop)  # waits for its end,
            stack.callback(loop.kill)  # after this
        return float(subprocess.check_output(command, env=environment | setting))


def main() -> None:
    """Prints the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=15, help="that each figure is the median of")
    here = "print one figure alone: of this process, with the settings it was started with"
    parser.add_argument("--here", action="store_true", help=here)
    args = parser.parse_args()
    if args.here:
        print(step_seconds(args.steps))
        return
    head = [f"beside {n} busy processes" if n else "alone" for n in NEIGHBOURS]
    rows = [
        [name, *(f"{measure(n, setting, args.steps):.2f} s" for n in NEIGHBOURS)]
        for name, setting in SETTINGS.items()
    ]
    print(table(["how long threads spin", *head], rows))


if __name__ == "__main__":
    main()
