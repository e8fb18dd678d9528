"""Times that a card must not fall behind: ``bench/results/limits/<card>.json``.

    python -m bench.limits [--json FILE]      writes those of this card from its results

``{"card", "commit", "us": {workload: {backend: microseconds}}}`` holds the medians that a commit
reached. The file is renewed by the command, deliberately and with a reason in the commit message;
``bench/timed/test_limits.py`` measures the workloads again on that card, alone on the machine, and
fails where one is over 10 % slower.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from bench.harness import records
from bench.harness.targets import TARGETS, workload_of
from cmpose import provenance
from cmpose.data.formats.reader import convert, parse_file
from cmpose.files import write_json

FOLDER = records.RESULTS / "limits"
ALLOWED = 1.10
"""A time may be this many times the one that was reached."""

Times = dict[str, dict[str, float]]
"""Workload → backend → microseconds."""


def reached(card: str, folder: Path = FOLDER) -> Times:
    """What a card has reached; empty for a card without a file.

    Raises:
        records.SchemaError: the file is not as it should be.
    """
    path = folder / f"{records.slug(card)}.json"
    if not path.is_file():
        return {}
    us, times = parse_file(path, records.SchemaError)["us"], dict[str, dict[str, records.Positive]]
    return convert(us, times, path.name, records.SchemaError, ".us")


def slow_downs(now: Times, before: Times) -> list[str]:
    """What is too slow, or was not measured, in words."""
    said = []
    for workload, backends in before.items():
        for backend, us in backends.items():
            time = now.get(workload, {}).get(backend)
            before_us = f"the {us:,.1f} µs that were reached"
            if time is None:
                said.append(f"{workload}, {backend}: not measured beside {before_us}")
            elif time > ALLOWED * us:
                more = f"{100 * (time / us - 1):.0f} % more than {before_us}"
                said.append(f"{workload}, {backend}: {time:,.1f} µs, {more}")
    return said


def from_records(held: list[dict[str, Any]]) -> Times:
    """Medians of the targets' workloads, of backends whose tests passed."""
    wanted = {str(t.workload) for t in TARGETS}
    times: Times = {}
    for r in held:
        workload = str(workload_of(r))
        if workload in wanted and r["op_tests"]["status"] == "passed":
            times.setdefault(workload, {})[r["backend"]] = r["us"]["p50"]
    return times


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.limits")
    parser.add_argument("--json", type=Path, help="default: bench/results/<card>.json")
    options = parser.parse_args(arguments)
    if provenance.device() == "cpu":
        print("bench.limits: no GPU; a CPU has no limits")
        return 1
    card = provenance.machine()
    content = records.load(options.json or records.path_of(card))
    us, path = from_records(content["records"]), FOLDER / f"{records.slug(card)}.json"
    write_json(path, {"card": card, "commit": provenance.commit()[0], "us": us})
    print(f"{path.name}: {sum(map(len, us.values()))} times")
    return 0


if __name__ == "__main__":
    sys.exit(main())
