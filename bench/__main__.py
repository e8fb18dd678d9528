"""Measures ops: ``python -m bench [op ...] [--backend B] [--full] [--json FILE]``.

Every workload is a race of the op's kernels and its peers; docs/benchmarks.md says what the columns
mean. On a CPU everything runs at small sizes, and the figures are no performance result; ``--device
cpu`` measures there at usual sizes, on one and two threads, and what counts are the ratios to the
peers. With ``--json`` the records are put into a results file as they come.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench.harness import measure, op_tests, records, timing
from bench.harness.targets import TARGETS, bench_of
from bench.harness.workload import Workload
from cmpose import provenance
from cmpose.ops.backends import BACKENDS, OPS


def wanted_workloads(ops: list[str], small: bool, only: str) -> list[Workload]:
    """Targets first, then every op's grid in turns, so that a cut run has something of each.

    ``small`` gives those of a CPU; ``only`` is ``targets``, ``grid`` (the others) or ``all``.
    """
    if small:
        return [workload for op in ops for workload in bench_of(op).workloads(small=True)]
    first = [t.workload for t in TARGETS if t.op in ops]
    with_target = {workload.op for workload in first}
    first += [next(bench_of(op).workloads()) for op in ops if op not in with_target]
    grids = ([w for w in bench_of(op).workloads() if w not in first] for op in ops)
    rest = [w for turn in itertools.zip_longest(*grids) for w in turn if w is not None]
    return {"targets": first, "grid": rest, "all": [*first, *rest]}[only]


def lines(record: records.Record) -> list[str]:
    """What is printed of a record while it runs: its row, and the peers that failed."""
    us, best = record["us"], record["best_peer"]
    beside = "no peer ran" if best is None else f"{best} {record['peers'][best]:,.1f}"
    speedup = record["speedup_vs_best_peer"]
    ratio = "–" if speedup is None else f"{speedup:.2f}×"
    if "threads" in record["shape"] and best is not None:
        ratio = f"{us['p50'] / record['peers'][best]:.2f} of"
    row = (
        f"  {record['backend']:9} {us['p50']:12,.1f} µs [{us['p20']:,.1f}, {us['p80']:,.1f}] "
        f"{record['percent_of_bound']:6.1f} % of bound {record['peak_bytes'] / 1e6:12,.3f} MB  "
        f"{ratio} {beside}"
    )
    return [row, *(f"    {n}: {t}" for n, t in record["peers"].items() if isinstance(t, str))]


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(prog="python -m bench", description=__doc__.split("\n")[0])
    cli.add_argument("ops", nargs="*", metavar="op", help=f"of {', '.join(OPS)}; default all")
    cli.add_argument("--device", choices=["cpu"], help="measures the CPU's ratios to the peers")
    cli.add_argument("--backend", choices=BACKENDS, help="default: every kernel that can run")
    cli.add_argument("--full", action="store_true", help="more samples, max-autotune of peers")
    cases = "the workloads that have a target (the default), the others, or both"
    cli.add_argument("--cases", choices=("targets", "grid", "all"), default="targets", help=cases)
    cli.add_argument("--json", type=Path, help="results file that the records are put into")
    cli.add_argument("--seconds", type=float, help="starts no workload after this time")
    cli.add_argument("--no-peers", action="store_true", help="measures our backends alone")
    cli.add_argument("--no-gate", action="store_true", help="no tests, and no speed-ups")
    cli.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="of the tests")
    cli.add_argument("--journal", type=Path, help="file by which a run that was cut goes on")
    return cli


def prepared(options: argparse.Namespace, backends: dict[str, list[str]]) -> measure.Run:
    """Runs the ops' tests and measures the card's rates; prints both."""
    device, origin = provenance.device(), provenance.provenance()
    print(
        f"{provenance.machine()}, torch {origin['torch']}, triton {origin['triton']}, "
        f"commit {origin['commit'][:9]}{'+dirty' if origin['dirty'] else ''}"
    )
    setting = measure.setting_of(options, device)
    if device == "cpu" and options.device != "cpu":
        print(records.NOT_A_RESULT)
    outcomes: dict[str, Any] = {}
    if device == "cuda" and not options.no_gate:
        outcomes = op_tests.run(backends, workers=options.workers)
    for op, by_backend in outcomes.items():
        for backend, tests in by_backend.items():
            counts = f"{tests['tests']} passed, {tests['failed']} failed"
            print(f"tests of {op} {backend}: {tests['status']}, {counts}")
    rates = timing.measure_rates(device)
    print(f"{rates}\n")
    clock, journal = timing.clock_for(device), records.Journal(options.journal)
    return measure.Run(rates, setting, clock, origin, outcomes, journal)


def run_one(workload: Workload, backends: list[str], run: measure.Run, path: Path | None) -> bool:
    """Measures a workload, prints and keeps its records; whether all of ours ran, none slower."""
    slower: list[str] = []
    try:
        results, faults = measure.measure(workload, bench_of(workload.op), backends, run)
    except measure.Lost:
        raise
    except Exception as error:
        results, faults = [], {"every backend": measure.message(error)}
    for name, fault in faults.items():
        print(f"  {name}: {fault}", flush=True)
    for record in results:
        print("\n".join(lines(record)), flush=True)
    if path and results:
        content = records.load_or_empty(path, provenance.machine())
        slower = records.slow_downs(content, results)
        print("".join(f"  slower: {text}\n" for text in slower), end="", flush=True)
        records.add(content, results)
        records.save(path, content)
    # A workload that is outside of a kernel's limits is no fault of it.
    faulty = [f for f in faults.values() if not f.startswith("error: BackendUnavailable")]
    return not faulty and not slower


def main(arguments: list[str] | None = None) -> int:
    began = time.monotonic()
    options = parser().parse_args(arguments)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when torch first looks for a card
    names = options.ops or list(OPS)
    device = provenance.device()
    for op in names:
        bench_of(op)  # the error names the op
    backends = {op: measure.backends_for(op, device, options.backend) for op in names}
    run, status = prepared(options, backends), 0
    workloads = wanted_workloads(names, device == "cpu", options.cases)
    if options.device == "cpu":
        workloads = [workload for op in names for workload in bench_of(op).on_cpu()]
    for workload in (w for w in workloads if not run.journal.is_done(w)):
        if options.seconds and time.monotonic() - began > options.seconds:
            print("time is up; the same command goes on")
            return 3
        print(workload, flush=True)
        if "threads" in workload.shape:
            torch.set_num_threads(workload.shape["threads"])
        try:
            if not run_one(workload, backends[workload.op], run, options.json):
                status = 1
        except measure.Lost as lost:
            run.journal.fail(str(workload), *lost.args)
            print(
                f"  {': '.join(lost.args)}; the card is lost to this process; "
                "with --journal FILE the same command goes on without it",
                flush=True,
            )
            return 3
        run.journal.finish(workload)
    return status


if __name__ == "__main__":
    sys.exit(main())
