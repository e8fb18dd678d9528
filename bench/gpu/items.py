"""What each stage of ``make gpu`` runs: processes, as items.

Each function takes the command's options.
"""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace

import torch

from bench.counters import find_ncu
from bench.gpu.stages import Item
from bench.harness import records
from bench.harness.op_tests import CONTRACT
from cmpose import ops, provenance
from cmpose.ops.backends import OPS
from cmpose.provenance import PROJECT

PYTEST = (sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--junitxml", "{report}")

LEFT_OUT = ("tests/test_packaging.py",)
"""Test files that need a network: it builds in a fresh environment."""

LONGEST = ("tests/kernels/test_compile_check.py", "tests/test_demo.py",
           "tests/train/test_real_people.py", "tests/train/test_train.py")  # fmt: skip
"""They start first, so that no process is left alone with one of them at the end."""

PROCESS_BYTES = 2 * 10**9
"""Of a card's memory, for a process of tests: its CUDA context, and the tests' tensors."""

SANITIZED = "value or bitwise or strided or empty or uninitialised or layout"
"""Tests of the contract that launch every kernel at odd sizes without compiling graphs."""


def build(options: Namespace) -> list[Item]:
    """The CUDA C++ core for the local card, put where ``cmpose._C`` is looked for."""
    command = (sys.executable, "-m", "csrc.build", "--in-place")
    major, minor = torch.cuda.get_device_capability()
    environment = {"CMPOSE_CUDA_ARCHS": f"{major}.{minor}"}
    return [Item(f"cmpose._C for {major}.{minor}", command, environment)]


def tests(options: Namespace) -> list[Item]:
    """The whole suite, a process a file; the contract, which is longest, a process an op."""
    files = [str(p.relative_to(PROJECT)) for p in sorted((PROJECT / "tests").rglob("test_*.py"))]
    files = [f for f in files if f not in (CONTRACT, *LEFT_OUT)]
    files.sort(key=lambda f: f not in LONGEST)
    chosen = {op: op for op in OPS} | {"others": " and ".join(f"not {op}" for op in OPS)}
    contract = (Item(f"{CONTRACT} {n}", (*PYTEST, CONTRACT, "-k", k)) for n, k in chosen.items())
    return [*contract, *(Item(file, (*PYTEST, file)) for file in files)]


def sanitize(options: Namespace) -> list[Item]:
    """memcheck and racecheck over the tests of every op that has a CUDA C++ kernel here.

    Without such kernels, or without the tool, the stage says so and counts as not run.
    """
    tool = shutil.which("compute-sanitizer")
    kernels = [op for op in OPS if ops.available(op, provenance.device())["cuda"] is None]
    parts = {op: (CONTRACT, "-k", f"{op}-cuda and ({SANITIZED})") for op in kernels}
    if not kernels or tool is None:
        reason = "compute-sanitizer is not on PATH" if kernels else "cmpose._C has no kernel here"
        return [Item("compute-sanitizer", (), lacking=reason)]
    parts["tests/csrc"] = ("tests/csrc", "-m", "sanitized")
    # Without torch's cache an access behind a tensor is one behind an allocation.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    checked = ("--error-exitcode", "99", "--target-processes", "all", *PYTEST)
    return [
        Item(f"{check} {name}", (str(tool), "--tool", check, *checked, *chosen), environment)
        for name, chosen in parts.items()
        for check in ("memcheck", "racecheck")
    ]


def bench(options: Namespace) -> list[Item]:
    """Targets, their counters, then the grid until the time is used."""
    effort = ("--full",) if options.full else ()
    processes = str(workers("tests", options.workers))
    command = (sys.executable, "-m", "bench", *effort, "--json", str(options.results),
               "--workers", processes, "--seconds", "{seconds}")  # fmt: skip
    items = []
    for which in ("targets", "grid"):
        name = " ".join([which, *effort])
        journal = str(options.work / f"journal-bench-{records.slug(name)}.json")
        own = (*command, "--cases", which, "--journal", journal)
        items.append(Item(name, own, open_ended=which == "grid", goes_on=True))
    path = str(records.counters_beside(options.results))
    reading = (sys.executable, "-m", "bench.counters", "--json", path)
    lacking = "" if find_ncu() else "ncu is not on PATH"
    return [items[0], Item("counters", reading, lacking=lacking), items[1]]


def train(options: Namespace) -> list[Item]:
    """Each variant of the train step in a process of its own."""
    from bench.train_step import variants_on

    command = (sys.executable, "-m", "bench.train_step", "--json", str(options.results))
    variants = [(b, v) for b in ("base", "huge") for v in variants_on(provenance.device())]
    return [Item(f"{b} {v}", (*command, "--backbone", b, "--variant", v)) for b, v in variants]


def workers(stage: str, most: int) -> int:
    """Processes at a time: one where something is timed, else one for 2 GB of the card's memory."""
    if stage in ("build", "bench", "train"):
        return 1
    if provenance.device() == "cuda":
        most = min(most, max(1, torch.cuda.mem_get_info()[0] // PROCESS_BYTES))
    return min(4, most) if stage == "sanitize" else most
