"""Everything that needs a GPU: ``make gpu``, or ``python -m bench.gpu``.

    python -m bench.gpu [--stages build tests sanitize bench train] [--full]

docs/benchmarks.md says what it needs and does. Logs and the state are in ``--work``; results go to
``bench/results/<card>.json``, and a summary comes last.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from bench.gpu import items
from bench.gpu.stages import Item, State, fingerprint, missing, run_stage
from bench.harness import records
from bench.report import tables
from cmpose import native, provenance
from cmpose.files import write_text
from cmpose.provenance import PROJECT

STAGES = ("build", "tests", "sanitize", "bench", "train")
WORK = PROJECT / "build" / "gpu"


def parser() -> argparse.ArgumentParser:
    cli = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    built = "; what is measured is built first, so build is always one of them"
    cli.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help=f"some{built}")
    cli.add_argument("--full", action="store_true", help="max-autotune of peers, more samples")
    cli.add_argument("--work", type=Path, default=WORK, help="folder of logs and state")
    cli.add_argument("--results", type=Path, help="default bench/results/<card>.json")
    cli.add_argument("--copy-to", type=Path, help="folder that gets results, state and summary")
    cli.add_argument("--stage-seconds", type=float, default=520.0, help="then a stage is cut")
    cli.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="test processes")
    return cli


def run(stage: str, state: State, options: argparse.Namespace) -> None:
    """Runs what is missing of a stage, and notes in the results file how it went."""
    began = time.monotonic()
    print(f"{stage}:", flush=True)
    importlib.invalidate_caches()  # the core may just have been built
    native.forget()
    stage_items: list[Item] = getattr(items, stage)(options)
    todo = missing(stage_items, state.outcomes(stage))
    workers = items.workers(stage, options.workers)
    status = run_stage(stage, stage_items, state, options.stage_seconds, workers)
    content = records.load_or_empty(options.results, provenance.machine())
    if not todo and stage in content["runs"]:
        print(f"{stage}: done before", flush=True)
        return
    outcomes = state.outcomes(stage)
    done = [(item.name, outcomes[item.name]) for item in stage_items if item.name in outcomes]
    done.sort(key=lambda pair: pair[1]["status"] == "passed")  # failures first
    details = [f"{name}: {text}" for name, outcome in done for text in outcome["details"]]
    counts = sum((Counter(outcome["counts"]) for _, outcome in done), Counter[str]())
    seconds = round(time.monotonic() - began, 1)
    content["runs"][stage] = {
        "stage": stage, "status": status, "seconds": seconds, "details": details[:40],
        "counts": {**counts, "items": len(stage_items), "done": len(done)},
        "provenance": provenance.provenance(),
    }  # fmt: skip
    records.save(options.results, content)
    print(f"{stage}: {status} in {seconds:.0f} s", flush=True)


def page(content: dict[str, Any], stages: list[str]) -> str:
    """The summary of a results file's content, for the terminal; ``stages`` are this call's."""
    lines = ["", f"{content['card']}: {' '.join(stages)}"]
    for stage, run in content["runs"].items():
        counts = ", ".join(f"{count} {outcome}" for outcome, count in run["counts"].items())
        mark = "" if stage in stages else f" (earlier, {run['provenance']['utc']})"
        lines.append(f"{stage:9} {run['status']:7} {run['seconds']:6.0f} s  {counts}{mark}")
        lines += [f"    {text[:96]}" for text in run["details"][:8]]
    lines += ["", tables.status([content]), "", tables.targets([content])]
    if content["train_step"]:
        lines += ["", tables.train_step([content])]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    if provenance.device() == "cpu":
        print("bench.gpu: torch sees no GPU; cmpose doctor says what is missing")
        return 1
    work = options.work = options.work.resolve()
    card = provenance.machine()
    default = records.RESULTS / f"{records.slug(card)}.json"
    results = options.results = (options.results or default).resolve()
    state = State(work, fingerprint())
    print(f"{card}; logs and state in {work.name}/, results in {results.name}", flush=True)
    stages = [stage for stage in STAGES if stage in ("build", *options.stages)]
    for stage in stages:
        run(stage, state, options)
    content = records.load_or_empty(results, card)
    summary = page(content, stages)
    write_text(work / "summary.txt", summary)
    if options.copy_to:
        options.copy_to.mkdir(parents=True, exist_ok=True)
        counters = records.counters_beside(results)
        for path in (results, counters, state.path, work / "summary.txt"):
            if path.is_file():
                shutil.copy2(path, options.copy_to)
    print(summary, end="")
    statuses = [content["runs"][stage]["status"] for stage in stages]
    return 1 if "failed" in statuses else 3 if "cut" in statuses else 0


if __name__ == "__main__":
    sys.exit(main())
