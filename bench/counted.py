"""Bytes that Nsight Compute counts for one call of an op at the reference shape.

    python -m bench.counted OP DIRECTION --json FILE [--ncu PROGRAM]

They are put beside the algorithmic bytes, into the records of that case that the file holds.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench import provenance, records
from bench.roofline import NCU_METRICS, ncu_bytes
from bench.targets import bench_of


def command(ncu: str, op: str, direction: str, backend: str) -> list[str]:
    """One call of a backend under ncu, which leaves the clocks as they are."""
    return [
        *(ncu, "--csv", "--profile-from-start", "off", "--clock-control", "none"),
        *("--metrics", ",".join(NCU_METRICS)),
        *(sys.executable, "-m", "bench", op, "--once", direction, "--backend", backend),
    ]


def put(content: dict[str, Any], op: str, direction: str, counted: dict[str, int]) -> int:
    """Notes the bytes, by backend, in the records of the op's reference shape; how many."""
    bench = bench_of(op)
    shape, dtype, changed = bench.shapes()[0], bench.dtypes[0], 0
    for record in content["records"]:
        same = (record["op"], record["direction"], record["dtype"]) == (op, direction, dtype)
        if same and record["shape"] == shape and record["backend"] in counted:
            record["measured_bytes"] = counted[record["backend"]]
            changed += 1
    return changed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.counted")
    parser.add_argument("op")
    parser.add_argument("direction")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--ncu", default="ncu")
    options = parser.parse_args(arguments)
    content = records.load_or_empty(options.json, provenance.machine())
    held = [r for r in content["records"] if r["op"] == options.op]
    counted = {}
    for backend in sorted({r["backend"] for r in held if r["direction"] == options.direction}):
        line = command(options.ncu, options.op, options.direction, backend)
        done = subprocess.run(
            line, cwd=provenance.PROJECT, capture_output=True, text=True, check=False
        )
        try:
            counted[backend] = ncu_bytes(done.stdout)
        except ValueError as error:
            print(f"{options.op} {backend}: {error}\n{done.stdout[-500:]}{done.stderr[-500:]}")
            return 1
        print(f"{options.op} {options.direction} {backend}: {counted[backend] / 1e6:,.1f} MB")
    if put(content, options.op, options.direction, counted):
        records.save(options.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
