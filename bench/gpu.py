"""Everything that needs a GPU: ``make gpu``, or ``python -m bench.gpu``.

    python -m bench.gpu [--stages "build tests sanitize bench train"] [--full] [--dry]

Needs no network and nothing installed but torch, triton, nvcc, ninja, pybind11 and pytest: cmpose
is imported from the checkout. A stage ends within ``--stage-seconds``; what did not fit is done by
the next call of the same command, as long as the sources are the same. Logs and the state are in
``--work``; results go to ``bench/results/<card>.json``, and a summary comes last.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench import provenance, records, summary
from bench.stages import Item, Outcome, State, fingerprint, missing, run_stage, totals
from bench.targets import TARGETS
from cmpose import native, ops
from cmpose.ops.backends import OPS

STAGES = ("build", "tests", "sanitize", "bench", "train")
STAGE_SECONDS = 520.0
"""Under nine minutes."""

PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml={report}")
CONTRACT = "tests/ops/test_contract.py"

LEFT_OUT = {
    "tests/test_packaging.py": "builds in a fresh environment, for which pip needs a registry",
}
"""Test files that are about no card and cannot run on a machine without network."""

LONGEST = (
    "tests/kernels/test_compile_check.py",
    "tests/test_demo.py",
    "tests/train/test_real_people.py",
    "tests/train/test_train.py",
)
SANITIZED = "value or bitwise or strided or empty or uninitialised or layout"
"""Of the contract: what launches every kernel at odd sizes, without compiling graphs."""


# -- stages ---------------------------------------------------------------------------------------


def build_items(dry: bool) -> list[Item]:
    """The CUDA C++ core for the local card, put where ``cmpose._C`` is looked for."""
    if not (provenance.PROJECT / "csrc" / "build.py").is_file():
        return []
    if dry:
        return [Item("which nvcc", (sys.executable, "csrc/build.py", "--nvcc"))]
    major, minor = torch.cuda.get_device_capability()
    return [
        Item(
            f"cmpose._C for {major}.{minor}",
            (sys.executable, "-m", "bench.gpu", "--build-core"),
            {"CMPOSE_CUDA_ARCHS": f"{major}.{minor}"},
        )
    ]


def build_core() -> int:
    """Builds by csrc/build.py, whose last line is the module's path, and copies it in place."""
    done = subprocess.run(
        [sys.executable, "csrc/build.py"],
        cwd=provenance.PROJECT,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    print(done.stdout, end="")
    if done.returncode:
        return done.returncode
    built = Path(done.stdout.strip().splitlines()[-1])
    package = provenance.PROJECT / "cmpose"
    for stale in package.glob("_C.*.so"):
        stale.unlink()
    shutil.copy2(built, package / built.name)
    print(f"copied to {package.name}/{built.name}")
    return 0


def test_items(dry: bool) -> list[Item]:
    """The whole suite, a process a file; the contract, which is longest, a process an op."""
    if dry:
        files = ["tests/ops/test_merge_clusters.py"]
        return [
            *(Item(file, (*PYTEST, file)) for file in files),
            Item(
                f"{CONTRACT} unmerge_tokens",
                (*PYTEST, CONTRACT, "-k", "unmerge_tokens and (bitwise or empty)"),
            ),
        ]
    tests = provenance.PROJECT / "tests"
    files = [str(path.relative_to(provenance.PROJECT)) for path in sorted(tests.rglob("test_*.py"))]
    files = [f for f in files if f not in (CONTRACT, *LEFT_OUT)]
    files.sort(key=lambda f: f not in LONGEST)
    contract = [Item(f"{CONTRACT} {op}", (*PYTEST, CONTRACT, "-k", op)) for op in OPS]
    others = " and ".join(f"not {op}" for op in OPS)
    contract.append(Item(f"{CONTRACT} others", (*PYTEST, CONTRACT, "-k", others)))
    return [*contract, *(Item(file, (*PYTEST, file)) for file in files)]


def sanitize_items(dry: bool) -> list[Item]:
    """memcheck and racecheck over the tests of every op that has a CUDA C++ kernel here."""
    if dry:
        rehearsed = (*PYTEST, CONTRACT, "-k", "merge_clusters-reference and (bitwise or empty)")
        return [Item("no tool: merge_clusters reference", rehearsed)]
    tool = shutil.which("compute-sanitizer")
    kernels = [op for op in OPS if ops.available(op, provenance.device())["cuda"] is None]
    parts: list[tuple[str, tuple[str, ...]]] = [
        (op, (CONTRACT, "-k", f"{op}-cuda and ({SANITIZED})")) for op in kernels
    ]
    if kernels:
        parts.append(("tests/csrc", ("tests/csrc", "-m", "sanitized")))
    found = []
    for name, chosen in parts:
        for check in ("memcheck", "racecheck"):
            command: tuple[str, ...] = (*PYTEST, *chosen)
            if tool is None:
                say = "print('compute-sanitizer is not on PATH'); raise SystemExit(1)"
                command = (sys.executable, "-c", say)
            else:
                checked = ("--tool", check, "--error-exitcode", "99", "--target-processes", "all")
                command = (tool, *checked, *command)
            # Without the cache an access behind a tensor is one behind an allocation.
            item = Item(f"{check} {name}", command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
            found.append(item)
    return found


def bench_items(dry: bool, full: bool, results: Path, work: Path) -> list[Item]:
    """Targets, floors, bytes by Nsight Compute, then the grid until the time is used."""

    def bench(*arguments: str, part: str) -> tuple[str, ...]:
        return (
            *(sys.executable, "-m", "bench", *arguments, "--json", str(results)),
            *("--journal", str(work / f"journal-bench-{part}.json"), "--seconds", "{seconds}"),
        )

    if dry:
        few = ("unmerge_tokens", "--quick", "--no-gate", "--no-compile")
        return [Item("targets", bench(*few, part="targets"))]
    effort = "--full" if full else "--quick"
    name = "full" if full else "quick"
    targets = bench(effort, "--cases", "targets", part=f"targets-{name}")
    items = [Item(f"targets, {name}", targets, goes_on=True)]
    items.append(Item("floors", (*PYTEST, "bench/test_floors.py")))
    ncu = shutil.which("ncu")
    if ncu:
        command = (sys.executable, "-m", "bench.counted", "--json", str(results), "--ncu", ncu)
        items += [
            Item(f"ncu {t.op} {t.direction}", (*command, t.op, t.direction))
            for t in TARGETS
            if not t.shape
        ]
    grid = bench(effort, "--cases", "grid", part=f"grid-{name}")
    return [*items, Item(f"grid, {name}", grid, open_ended=True, goes_on=True)]


def train_items(dry: bool, results: Path) -> list[Item]:
    """Each variant of the train step in a process of its own."""
    from bench.train_step import VARIANTS

    command = (sys.executable, "-m", "bench.train_step", "--json", str(results))
    if dry:
        few = ("eager reference", "ours")
        return [Item(f"tiny {v}", (*command, "--backbone", "tiny", "--variant", v)) for v in few]
    return [
        Item(f"{b} {v}", (*command, "--backbone", b, "--variant", v))
        for b in ("base", "huge")
        for v in VARIANTS
    ]


# -- the program ----------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.split("\n")[0])
    made.add_argument("--stages", default=" ".join(STAGES), help=f"of {' '.join(STAGES)}")
    made.add_argument("--dry", action="store_true", help="rehearses every stage on the CPU")
    made.add_argument("--full", action="store_true", help="max-autotune of peers, more samples")
    made.add_argument("--again", action="store_true", help="also what is done already")
    made.add_argument("--work", type=Path, default=provenance.PROJECT / "build" / "gpu")
    made.add_argument("--results", type=Path, help="default bench/results/<card>.json")
    made.add_argument("--copy-to", type=Path, help="folder that gets results, state and summary")
    made.add_argument("--stage-seconds", type=float, default=STAGE_SECONDS)
    made.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    made.add_argument("--build-core", action="store_true", help=argparse.SUPPRESS)
    return made


def stages_of(text: str) -> list[str]:
    """In the order of :data:`STAGES`; what is measured must be built first.

    Raises:
        ValueError: no such stage.
    """
    asked = text.replace(",", " ").split()
    for name in asked:
        if name not in STAGES:
            raise ValueError(f"--stages: no stage {name!r}; there are {' '.join(STAGES)}")
    return [name for name in STAGES if name in asked or name == "build"]


def _details(outcomes: dict[str, Outcome], passed: bool) -> list[str]:
    return [
        f"{name}: {text}"
        for name, outcome in outcomes.items()
        if (outcome["status"] == "passed") == passed
        for text in outcome["details"]
    ]


def main(arguments: list[str] | None = None) -> int:
    made = parser()
    options = made.parse_args(arguments)
    if options.build_core:
        return build_core()
    try:
        stages = stages_of(options.stages)
    except ValueError as error:
        made.error(str(error))
    if options.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif provenance.device() == "cpu":
        print("bench.gpu: torch sees no GPU; --dry rehearses every stage on the CPU")
        return 1
    if importlib.util.find_spec("pytest") is None:
        print(f"bench.gpu: {sys.executable} has no pytest")
        return 1
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    card = provenance.machine()
    results = options.results or (work / "results.json" if options.dry else records.path_of(card))
    results = results.resolve()
    state = State(work, fingerprint())
    print(f"{card}; logs and state in {work.name}/, results in {results.name}", flush=True)

    makers = {
        "build": lambda: build_items(options.dry),
        "tests": lambda: test_items(options.dry),
        "sanitize": lambda: sanitize_items(options.dry),
        "bench": lambda: bench_items(options.dry, options.full, results, work),
        "train": lambda: train_items(options.dry, results),
    }
    alone = ("build", "bench", "train")  # what is timed has the machine for itself
    environment = {"OMP_NUM_THREADS": "1"}
    if not options.dry:  # where the CUDA kernels' tests must not skip
        environment = {"OMP_NUM_THREADS": "2", "CMPOSE_REQUIRE_CUDA_OPS": "1"}
    for stage in stages:
        if options.again:
            state.forget(stage)
        began = time.monotonic()
        print(f"{stage}:", flush=True)
        importlib.invalidate_caches()  # the core may just have been built
        native.forget()
        items = makers[stage]()
        todo = missing(items, state.outcomes(stage))
        workers = 1 if stage in alone else 4 if stage == "sanitize" else options.workers
        status = run_stage(
            stage,
            items,
            state,
            seconds=options.stage_seconds,
            workers=min(workers, options.workers),
            environment=environment,
            tell=lambda text: print(text, flush=True),
        )
        held = state.outcomes(stage)
        outcomes = {item.name: held[item.name] for item in items if item.name in held}
        # What did not pass comes first.
        details = _details(outcomes, passed=False)
        if stage == "tests" and not options.dry:
            details += [f"{file}: left out: {why}" for file, why in LEFT_OUT.items()]
        if stage == "sanitize" and not items:
            details += [f"{op}: {ops.available(op, provenance.device())['cuda']}" for op in OPS]
        details += _details(outcomes, passed=True)
        content = records.load_or_empty(results, card)
        if not todo and stage in content["runs"]:
            print(f"{stage}: done before", flush=True)
            continue
        content["runs"][stage] = {
            "stage": stage,
            "status": status,
            "seconds": round(time.monotonic() - began, 1),
            "counts": totals(outcomes) | {"items": len(items), "done": len(outcomes)},
            "details": details[:40],
            "provenance": provenance.provenance(),
        }
        records.save(results, content)
        print(f"{stage}: {status} in {time.monotonic() - began:.0f} s", flush=True)
    content = records.load_or_empty(results, card)
    page = summary.page(content, stages, dry=options.dry)
    (work / "summary.txt").write_text(page)
    if options.copy_to:
        options.copy_to.mkdir(parents=True, exist_ok=True)
        for path in (results, state.path, work / "summary.txt"):
            if path.is_file():
                shutil.copy2(path, options.copy_to / path.name)
    print(page, end="")
    statuses = [content["runs"][stage]["status"] for stage in stages]
    return 1 if "failed" in statuses else 3 if "cut" in statuses else 0


if __name__ == "__main__":
    sys.exit(main())
