"""Expected times, a card a file: ``bench/floors/<card>.json``. Slower by over 10 % is a failure.

    python -m bench.floors [--json FILE]      writes those of this card from its results

``{"card", "commit", "us": {case: {backend: microseconds}}}`` holds the medians that a commit
reached. The file is renewed by the command, deliberately and with a reason in the commit message;
``bench/test_floors.py`` measures the cases again on that card, alone on the machine.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench import provenance, records
from bench.cases import Case
from bench.targets import TARGETS

FOLDER = provenance.PROJECT / "bench" / "floors"
ALLOWED = 1.10
"""A time may be this many times the expected one."""


def path_of(card: str) -> Path:
    return FOLDER / f"{provenance.slug(card)}.json"


def expected(card: str, folder: Path = FOLDER) -> dict[str, dict[str, float]]:
    """Case → backend → microseconds; empty for a card without expectations.

    Raises:
        records.SchemaError: the file is not as it should be.
    """
    path = folder / f"{provenance.slug(card)}.json"
    if not path.is_file():
        return {}
    content = json.loads(path.read_text())
    check = records.fields(
        card=records.text,
        commit=records.text,
        us=records.mapping(records.mapping(records.positive)),
    )
    check(path.name, content)
    return content["us"]


def slow_downs(
    found: dict[str, dict[str, float]], wanted: dict[str, dict[str, float]]
) -> list[str]:
    """What is too slow, or was not measured, in words."""
    said = []
    for case, backends in wanted.items():
        for backend, us in backends.items():
            time = found.get(case, {}).get(backend)
            if time is None:
                said.append(f"{case}, {backend}: not measured; {us:,.1f} µs are expected")
            elif time > ALLOWED * us:
                said.append(
                    f"{case}, {backend}: {time:,.1f} µs, {100 * (time / us - 1):.0f} % more than "
                    f"the {us:,.1f} µs that are expected"
                )
    return said


def cases_of(wanted: dict[str, dict[str, float]]) -> list[Case]:
    """The targets' cases among those that have expectations."""
    return [t.case for t in TARGETS if str(t.case) in wanted]


def from_records(held: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians of the targets' cases, of backends whose tests passed."""
    found: dict[str, dict[str, float]] = {}
    for target in TARGETS:
        for r in held:
            case = Case(r["op"], r["direction"], r["shape"], r["dtype"])
            if case == target.case and r["gate"]["status"] == "passed":
                found.setdefault(str(case), {})[r["backend"]] = r["us"]["p50"]
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.floors")
    parser.add_argument("--json", type=Path, help="default: bench/results/<card>.json")
    options = parser.parse_args(arguments)
    if provenance.device() == "cpu":
        print("bench.floors: no GPU; a CPU has no expected times")
        return 1
    card = provenance.machine()
    content = records.load(options.json or records.path_of(card))
    us = from_records(content["records"])
    records.write_json(path_of(card), {"card": card, "commit": provenance.commit()[0], "us": us})
    print(f"{path_of(card).name}: {sum(map(len, us.values()))} expected times")
    return 0


if __name__ == "__main__":
    sys.exit(main())
