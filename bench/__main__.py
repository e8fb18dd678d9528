"""Measures ops: ``python -m bench [op ...] [--backend B] [--quick | --full] [--json FILE]``.

Every case is a race of the op's kernels and its peers; see docs/benchmarks.md for what the columns
mean. On a CPU everything runs at small sizes, and the figures are no performance result. With
``--json`` the records are put into a results file as they come.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from bench import gate, measure, provenance, records, roofline, timing
from bench.cases import Case
from bench.targets import TARGETS, bench_of
from cmpose.ops.backends import BACKENDS, OPS


class FileJournal:
    """What runs and what failed, in a file, so that a process that was lost can be followed.

    Args:
        path: None keeps nothing on disk.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.state: dict[str, Any] = {"running": None, "died": {}, "failed": {}, "done": []}
        if path is not None and path.is_file():
            self.state = json.loads(path.read_text())
        if self.state["running"] is not None:
            self._died(*self.state["running"])

    def _died(self, case: str, entrant: str) -> None:
        """The process before this one did not get past it; once can have been lack of time."""
        times = self.state["died"].setdefault(case, {})
        times[entrant] = times.get(entrant, 0) + 1
        if times[entrant] > 1:
            self.fail(case, entrant, "error: the process died or was stopped twice while it ran")
        self.state["running"] = None
        self._save()

    def _save(self) -> None:
        if self.path is not None:
            records.write_json(self.path, self.state)

    def began(self, case: Case, entrant: str) -> None:
        self.state["running"] = [str(case), entrant]
        self._save()

    def fail(self, case: str, entrant: str, message: str) -> None:
        self.state["failed"].setdefault(case, {})[entrant] = message
        self.state["running"] = None
        self._save()

    def failures(self, case: Case) -> dict[str, str]:
        return dict(self.state["failed"].get(str(case), {}))

    def finish(self, case: Case) -> None:
        self.state["done"].append(str(case))
        self.state["running"] = None
        self._save()

    def keep_gates(self, gates: dict[str, Any]) -> None:
        """For the process that follows this one in the same run, which has the same number."""
        self.state["gates"] = {"process": os.getpid(), "found": gates}
        self._save()

    def gates(self) -> dict[str, Any]:
        """What the tests gave in this run, or nothing."""
        held = self.state.get("gates", {})
        return held["found"] if held.get("process") == os.getpid() else {}

    def command(self, arguments: list[str]) -> list[str]:
        """This program again, with this journal."""
        line = [sys.executable, "-m", "bench", *arguments]
        if self.path is None:
            handle, name = tempfile.mkstemp(prefix="cmpose-bench-", suffix=".json")
            os.close(handle)
            self.path = Path(name)
            self._save()
            line += ["--journal", name]
        return line

    def is_done(self, case: Case) -> bool:
        return str(case) in self.state["done"]


def wanted_cases(ops: list[str], small: bool, only: str) -> list[Case]:
    """Targets first, then every op's grid in turns, so that a cut run has something of each.

    Args:
        ops: which.
        small: the cases of a CPU.
        only: ``targets``, ``grid`` (the others) or ``all``.
    """
    if small:
        return [case for op in ops for case in bench_of(op).cases(small=True)]
    first = [t.case for t in TARGETS if t.op in ops]
    first += [next(iter(bench_of(op).cases())) for op in ops if not any(c.op == op for c in first)]
    if only == "targets":
        return first
    grids = [[c for c in bench_of(op).cases() if c not in first] for op in ops]
    rest = [
        grid[i] for i in range(max(map(len, grids), default=0)) for grid in grids if i < len(grid)
    ]
    return rest if only == "grid" else [*first, *rest]


def line(record: records.Record) -> str:
    """One row of what is printed while it runs."""
    us, best = record["us"], record["best_peer"]
    beside = "no peer ran" if best is None else f"{best} {record['peers'][best]:,.1f}"
    speedup = record["speedup_vs_best_peer"]
    ratio = "      –" if speedup is None else f"{speedup:6.2f}×"
    return (
        f"{record['backend']:9} {us['p50']:12,.1f} µs [{us['p20']:,.1f}, {us['p80']:,.1f}] "
        f"{record['percent_of_floor']:6.1f} % of floor {record['peak_bytes'] / 1e6:12,.3f} MB  "
        f"{ratio} {beside}"
    )


def failures(record: records.Record) -> list[str]:
    return [f"  {n}: {t}" for n, t in record["peers"].items() if isinstance(t, str)]


def once(case: Case, backend: str) -> None:
    """One call between cudaProfilerStart and Stop, for Nsight Compute."""
    bench = bench_of(case.op)
    device = provenance.device()
    arguments = bench.arguments(case, device)
    call = measure._call(
        lambda **kw: bench.call(**kw, backend=backend), arguments, bench, case.direction
    )
    call()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        call()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    else:
        call()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    made.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)}; default all")
    made.add_argument("--backend", choices=BACKENDS, help="default: every kernel that can run")
    effort = made.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="few samples, no tuning of peers")
    effort.add_argument("--full", action="store_true", help="more samples, max-autotune of peers")
    made.add_argument("--cases", choices=("targets", "grid", "all"), default="targets")
    made.add_argument("--json", type=Path, help="results file that the records are put into")
    made.add_argument("--seconds", type=float, help="starts no case after this time")
    made.add_argument("--no-peers", action="store_true")
    made.add_argument("--no-compile", action="store_true", help="no peers that are compiled")
    choice = made.add_mutually_exclusive_group()
    choice.add_argument("--gate", action="store_true", help="runs the tests on a CPU too")
    choice.add_argument("--no-gate", action="store_true", help="no tests, and no speed-ups")
    made.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="of the tests")
    made.add_argument("--journal", type=Path, help="file by which a run that was cut goes on")
    made.add_argument("--once", metavar="DIRECTION", help="one call of the op, for a profiler")
    return made


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    names = options.ops or list(OPS)
    for op in names:
        bench_of(op)  # the error names the op
    device = provenance.device()
    if options.once:
        cases = bench_of(names[0]).cases(small=device == "cpu")
        [case] = [c for c in cases if c.direction == options.once][:1]
        once(case, options.backend or "auto")
        return 0
    began = time.monotonic()
    origin = provenance.provenance()
    print(
        f"{provenance.machine()}, torch {origin['torch']}, triton {origin['triton']}, "
        f"commit {origin['commit'][:9]}{'+dirty' if origin['dirty'] else ''}"
    )
    if device == "cpu":
        print(provenance.NOT_A_RESULT)
    setting = measure.full() if options.full else measure.quick(device)
    setting.peers = not options.no_peers
    if options.no_compile:
        setting.left_out = lambda case, name, peer: "--no-compile" if peer.tuned else None

    backends = {op: measure.backends_for(bench_of(op), device, options.backend) for op in names}
    journal = FileJournal(options.journal)
    gates: dict[str, dict[str, dict[str, Any]]] = {}
    if options.gate or (device == "cuda" and not options.no_gate):
        gates = journal.gates() or gate.run(backends, workers=options.workers)
        journal.keep_gates(gates)
        for op, per_backend in gates.items():
            for backend, entry in per_backend.items():
                print(
                    f"gate {op} {backend}: {entry['status']}, {entry['tests']} tests passed, "
                    f"{entry['failed']} failed"
                )
    rates = roofline.measure_rates(device)
    print(
        f"copy {rates.copy_bytes_per_s / 1e9:,.0f} GB/s, bf16 {rates.bf16_flops_per_s / 1e12:,.2f} "
        f"TFLOP/s, fp32 {rates.fp32_flops_per_s / 1e12:,.2f} TFLOP/s\n"
    )

    clock = timing.clock_for(device)
    status, shown = 0, None
    for case in wanted_cases(names, device == "cpu", options.cases):
        if journal.is_done(case):
            continue
        if options.seconds and time.monotonic() - began > options.seconds:
            print("time is up; the same command goes on")
            return 3
        if str(case) != shown:
            print(case, flush=True)
        try:
            found, faults = measure.measure(
                case,
                bench_of(case.op),
                backends[case.op],
                rates,
                setting,
                gates=gates.get(case.op),
                journal=journal,
                clock=clock,
                origin=origin,
            )
        except measure.Lost as lost:
            journal.fail(str(lost.case), lost.entrant, lost.message)
            print(f"  {lost.entrant}: {lost.message}; the card is lost to this process", flush=True)
            # A new process, which knows what not to run again.
            os.execv(sys.executable, journal.command(arguments or sys.argv[1:]))
        except Exception as error:
            found, faults = [], {"every backend": measure.message(error)}
        for name, fault in faults.items():
            if not fault.startswith("error: BackendUnavailable"):  # outside its kernels' limits
                status = 1
            print(f"  {name}: {fault}", flush=True)
        for record in found:
            print(f"  {line(record)}", *failures(record), sep="\n", flush=True)
        if options.json and found:
            content = records.load_or_empty(options.json, provenance.machine())
            records.add(content, found)
            records.save(options.json, content)
        journal.finish(case)
    return status


if __name__ == "__main__":
    sys.exit(main())
