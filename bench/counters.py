"""Reads the card's counters: what Nsight Compute saw of every target's workload.

    python -m bench.counters [--json FILE]

docs/performance.md sets them beside the counts that bench.profile makes without a card. The time
under the profiler is no benchmark: caches are emptied before every launch.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from bench.harness import measure, records
from bench.harness.targets import TARGETS, bench_of
from bench.profile import tables
from cmpose import provenance

METRICS = {
    "us": "gpu__time_duration.sum",
    "instructions": "smsp__inst_executed.sum",
    "sectors_read": "lts__t_sectors_srcunit_tex_op_read.sum",
    "sectors_written": "lts__t_sectors_srcunit_tex_op_write.sum",
    "dram_bytes_read": "dram__bytes_read.sum",
    "dram_bytes_written": "dram__bytes_write.sum",
    "shared_wavefronts": "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum",
    "shared_conflicts": "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "issue_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "warps_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
"""A record's field → what Nsight Compute calls it. Sectors are those that SMs ask the L2 cache
for."""

NCU = ("--clock-control", "none", "--profile-from-start", "off", "--csv", "--page", "raw",
       "--print-units", "base")  # fmt: skip

MARK = "spin_kernel"
"""torch's kernel of ``torch.cuda._sleep``, which runs before each workload's: ncu's rows say in
which order kernels ran, not for whom."""

_TIMES = {"n": 1e-3, "u": 1.0, "m": 1e3, "": 1e6}
_SCALES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9}


def value(text: str, unit: str) -> float | None:
    """A figure in base units, times in microseconds; None where ncu has no figure.

    Raises:
        ValueError: a unit that is not known.
    """
    try:
        figure = float(text.replace(",", ""))
    except ValueError:
        return None
    if time := re.fullmatch(r"([num]?)s(?:ec(?:ond)?)?", unit):
        return figure * _TIMES[time[1]]
    if scale := re.fullmatch(r"([KMG]?)(?:byte|inst|sector)", unit):
        return figure * _SCALES[scale[1]]
    if unit in ("", "%", "register/thread"):
        return figure
    raise ValueError(f"ncu printed {text} {unit!r}, a unit that is not known")


def own_name(name: str) -> str:
    """A kernel's name as counts have it: no result, namespaces of ours, nor arguments."""
    name = re.sub(r"^void |cmpose::|<unnamed>::|\(anonymous namespace\)::", "", name)
    return tables.plain(name.split("(")[0])


def summed(name: str, launches: list[dict[str, Any]]) -> dict[str, Any]:
    """All launches of a kernel in a workload: sums; shares are means over the time."""
    result: dict[str, Any] = {"kernel": name, "launches": len(launches)}
    us = sum(one["us"] for one in launches)
    for field in METRICS:
        values = [one[field] for one in launches]
        if None in values:
            result[field] = None
        elif field == "registers":
            result[field] = int(max(values))
        elif field.endswith("percent"):
            result[field] = sum(one["us"] * one[field] for one in launches) / us
        else:
            result[field] = sum(values)
    return result


def read(text: str, calls: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The calls, in their order, each with its kernels, from what ncu printed.

    Raises:
        ValueError: ncu saw other calls, or prints what is not known.
    """
    # Its own messages begin with "==".
    rows = list(csv.DictReader(line for line in text.splitlines() if not line.startswith("==")))
    groups: list[dict[str, list[dict[str, Any]]]] = [{}]  # the first is of what no mark precedes
    for row in rows[1:]:
        if MARK in row["Kernel Name"]:
            groups.append({})
            continue
        figures = {
            field: value(row.get(metric) or "", rows[0].get(metric) or "")
            for field, metric in METRICS.items()
        }
        groups[-1].setdefault(own_name(row["Kernel Name"]), []).append(figures)
    before, *groups = groups
    if before or len(groups) != len(calls) or not all(groups):
        seen = [sum(map(len, group.values())) for group in groups]
        raise ValueError(f"of {len(calls)} calls ncu saw {len(groups)}, with {seen} launches")
    return [
        call | {"kernels": [summed(*kernel) for kernel in group.items()]}
        for call, group in zip(calls, groups, strict=True)
    ]


def launch(path: Path) -> None:
    """Makes every call, after two without the counters; which they were goes into ``path``."""
    calls, device = [], provenance.device()
    for target in TARGETS:
        workload, bench = target.workload, bench_of(target.op)
        for backend in measure.backends_for(target.op, device, None):
            print(workload, backend, flush=True)
            function = partial(bench.call, backend=backend)
            arguments = bench.arguments(workload, device)
            call = measure.call_of(function, arguments, bench, workload.direction)
            for _ in range(2):
                call()
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
            torch.cuda._sleep(1)
            call()
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()
            calls.append(asdict(workload) | {"backend": backend})
    path.write_text(json.dumps(calls))


def find_ncu() -> str | None:
    """Nsight Compute's command, or None."""
    return shutil.which("ncu", path=f"{os.environ.get('PATH', '')}:/usr/local/cuda/bin")


def known(ncu: str) -> list[str]:
    """Of the metrics those that this card has: ncu refuses to run with one that it lacks."""
    done = subprocess.run([ncu, "--query-metrics"], capture_output=True, text=True)
    names = set(re.findall(r"^\W*(\w+__\w+)", done.stdout, re.MULTILINE))
    if not names >= {"gpu__time_duration", "smsp__inst_executed"}:  # no list; every card has these
        return list(METRICS.values())
    # What a launch is made with stands in no list.
    return [m for m in METRICS.values() if m.startswith("launch") or m.split(".")[0] in names]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.counters")
    parser.add_argument("--json", type=Path, help="default bench/results/counters-<card>.json")
    parser.add_argument("--launch", type=Path, help=argparse.SUPPRESS)  # what runs under ncu
    options = parser.parse_args(arguments)
    if options.launch:
        launch(options.launch)
        return 0
    if provenance.device() == "cpu":
        print("bench.counters: torch sees no GPU; cmpose doctor says what is missing")
        return 1
    if (ncu := find_ncu()) is None:
        print("bench.counters: ncu, which comes with Nsight Compute, is not on PATH")
        return 1
    card = provenance.machine()
    path = options.json or records.counters_beside(records.RESULTS / f"{records.slug(card)}.json")
    with TemporaryDirectory() as folder:
        log, calls = Path(folder, "ncu.csv"), Path(folder, "calls.json")
        child = (sys.executable, "-m", "bench.counters", "--launch", str(calls))
        command = [ncu, *NCU, "--metrics", ",".join(known(ncu)), "--log-file", str(log), *child]
        status = subprocess.run(command).returncode
        text = log.read_text() if log.is_file() else ""
        try:
            workloads = read(text, json.loads(calls.read_text()))
        except (OSError, ValueError) as error:
            said = "\n".join(line for line in text.splitlines() if line.startswith("=="))
            print(f"{said}\nbench.counters: ncu ended with status {status}; {error}")
            return 1
    origin = provenance.provenance()
    content = {"card": card, "workloads": workloads, "provenance": origin}
    records.save(path, content, records.Counters)
    print(f"{len(workloads)} calls in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
