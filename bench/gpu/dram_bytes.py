"""Bytes that Nsight Compute counts in device memory for one call of an op at the reference shape.

    python -m bench.gpu.dram_bytes OP DIRECTION --json FILE

They are put beside the algorithmic bytes, into the records of that workload that the file holds.
"""

from __future__ import annotations

import argparse
import csv
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.harness import records
from bench.harness.targets import bench_of, workload_of
from bench.harness.workload import Workload
from cmpose.provenance import PROJECT, machine

METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")
_UNITS = {"byte": 1, "kbyte": 1e3, "mbyte": 1e6, "gbyte": 1e9}


def command(op: str, direction: str, backend: str) -> list[str]:
    """One call of a backend under ncu, which leaves the clocks as they are."""
    return [
        *("ncu", "--csv", "--profile-from-start", "off", "--clock-control", "none"),
        *("--metrics", ",".join(METRICS)),
        *(sys.executable, "-m", "bench", op, "--once", direction, "--backend", backend),
    ]


def summed(text: str) -> int:
    """Bytes that all kernels of an ``ncu --csv`` output read from and wrote to device memory.

    Raises:
        ValueError: there is no such metric in it.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError('no line of ncu\'s CSV header ("ID",...): run ncu with --csv')
    total, seen = 0.0, set()
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        if row.get("Metric Name") in METRICS:
            unit = _UNITS[row["Metric Unit"].lower()]
            total += float(row["Metric Value"].replace(",", "")) * unit
            seen.add(row["Metric Name"])
    for name in METRICS:
        if name not in seen:
            raise ValueError(f"no metric {name} in ncu's CSV: run it with --metrics {name}")
    return round(total)


def put(content: dict[str, Any], op: str, direction: str, counted: dict[str, int]) -> None:
    """Notes the bytes, by backend, in the records of the op's reference shape."""
    bench = bench_of(op)
    workload = Workload(op, direction, bench.shapes[0], bench.dtypes[0])
    for record in content["records"]:
        if workload_of(record) == workload and record["backend"] in counted:
            record["dram_bytes"] = counted[record["backend"]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.dram_bytes")
    parser.add_argument("op")
    parser.add_argument("direction")
    parser.add_argument("--json", type=Path, required=True, help="results file")
    options = parser.parse_args(arguments)
    asked = (options.op, options.direction)
    content = records.load_or_empty(options.json, machine())
    counted = {}
    held = [r for r in content["records"] if (r["op"], r["direction"]) == asked]
    for backend in sorted({r["backend"] for r in held}):
        line = command(*asked, backend)
        done = subprocess.run(line, cwd=PROJECT, capture_output=True, text=True, check=False)
        try:
            counted[backend] = summed(done.stdout)
        except ValueError as error:
            print(f"{options.op} {backend}: {error}\n{done.stdout[-500:]}{done.stderr[-500:]}")
            return 1
        print(f"{options.op} {options.direction} {backend}: {counted[backend] / 1e6:,.1f} MB")
    put(content, *asked, counted)
    records.save(options.json, content)
    return 0


if __name__ == "__main__":
    sys.exit(main())
