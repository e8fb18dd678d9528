"""Runs items of a stage as processes, and keeps what came out, so that a cut run can go on."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.harness import records
from bench.harness.op_tests import python_path, read_report
from cmpose.files import write_json
from cmpose.provenance import PROJECT, machine, version

Outcome = dict[str, Any]
"""``status`` (passed, failed, not run, cut), ``seconds``, ``counts`` and ``details``."""

TIME_IS_UP = 3  # exit status of a command that goes on when it is called again
NO_TESTS = 5  # pytest's, when no test was selected

ENVIRONMENT = {"OMP_NUM_THREADS": "2", "CMPOSE_REQUIRE_CUDA_OPS": "1"}
"""Of all processes; CUDA ops' tests must not skip."""

SOURCES = ("cmpose", "kernels", "csrc", "configs", "tests", "bench", "setup.py", "pyproject.toml")
SUFFIXES = (".py", ".cu", ".cuh", ".cpp", ".h", ".yaml", ".toml")


@dataclass(frozen=True)
class Item:
    """One process of a stage."""

    name: str  # unique in its stage
    # {report} stands for a file for pytest's XML, {seconds} for the time that it has.
    command: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)  # on top of that of all
    open_ended: bool = False  # takes what time is left; that it was cut is no shortcoming
    goes_on: bool = False  # keeps a journal: a process that crashed is followed by another
    lacking: str = ""  # what it is not run for the lack of


def fingerprint() -> str:
    """A hash of the sources, the card and the versions of torch and Triton.

    What a run of another fingerprint has left is not used.
    """
    digest = hashlib.sha256(f"{machine()} {version('torch')} {version('triton')}".encode())
    for name in SOURCES:
        for path in sorted([PROJECT / name, *(PROJECT / name).rglob("*")]):
            if path.suffix in SUFFIXES and path.is_file():
                digest.update(str(path.relative_to(PROJECT)).encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class State:
    """What is done, in ``state.json`` of a folder; that of another fingerprint is dropped."""

    def __init__(self, folder: Path, mark: str) -> None:
        self.folder, self.path = folder, folder / "state.json"
        self.lock = threading.Lock()
        self.content: dict[str, Any] = {"fingerprint": mark, "stages": {}}
        content = json.loads(self.path.read_text()) if self.path.is_file() else self.content
        if content["fingerprint"] == mark:
            self.content = content
        else:
            for journal in folder.glob("journal-*.json"):
                journal.unlink()

    def outcomes(self, stage: str) -> dict[str, Outcome]:
        return self.content["stages"].setdefault(stage, {})

    def note(self, stage: str, item: str, outcome: Outcome) -> None:
        with self.lock:
            self.outcomes(stage)[item] = outcome
            write_json(self.path, self.content)


def missing(items: Sequence[Item], done: Mapping[str, Outcome]) -> list[Item]:
    """Those that have not run to their end."""
    return [i for i in items if done.get(i.name, {}).get("status", "cut") == "cut"]


# -- outcomes -------------------------------------------------------------------------------------

DECLARED = ("av", "cv2", "jsonargparse", "matplotlib", "numpy", "safetensors", "shapely",
            "tensorboard", "tqdm", "yaml", "expecttest", "pytest_benchmark", "hypothesis", "onnx",
            "onnxruntime", "onnxscript", "pandas", "playwright", "transformers")  # fmt: skip
"""Packages of pyproject.toml, and of single tests, that a bare machine may lack."""

NO_COUNTERS = re.compile("ERR_NVGPUCTRPERM|CUPTI_ERROR_INSUFFICIENT_PRIVILEGES")
NEEDED = "leave to read the card's counters: NVreg_RestrictProfilingToAdminUsers=0, or root"
NO_HOG = "module 'cv2' has no attribute 'HOGDescriptor'"
"""With OpenCV 5, which pyproject.toml refuses and a bare machine may have."""


def pytest_outcome(report: str) -> tuple[dict[str, int], list[str]]:
    """Counts and the tests that failed, from pytest's XML.

    A test that cannot run because a declared package is not on the machine, or is OpenCV 5, or
    because the driver keeps the card's counters, is ``not run``: neither passed nor failed.
    """
    counts = {"passed": 0, "failed": 0, "skipped": 0, "not run": 0}
    details: list[str] = []
    lacking = {name for name in DECLARED if importlib.util.find_spec(name) is None}
    for name, status, text in read_report(report):
        absent = lacking & set(re.findall(r"No module named '([\w]+)", text))
        absent |= {NEEDED} if NO_COUNTERS.search(text) else set()
        absent |= {"OpenCV 4"} if NO_HOG in text else set()
        counts["not run" if absent else status] += 1
        if status == "failed":
            reason = f"not run: needs {min(absent)}" if absent else " ".join(text.split())[:200]
            details.append(f"{name}: {reason}")
    return counts, details


def run_process(
    command: Sequence[str], log: Path, seconds: float, environment: Mapping[str, str]
) -> int | None:
    """Runs a command, its output to ``log``: its exit status, None when time ran out.

    The processes that it has started end with it.
    """
    with log.open("w") as file:
        file.write(f"$ {' '.join(command)}\n")
        file.flush()
        process = subprocess.Popen(
            command, cwd=PROJECT, env={**os.environ, **environment}, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            return process.wait(timeout=max(1.0, seconds))
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_item(item: Item, log: Path, seconds: float) -> Outcome:
    """Runs one item: ``cut`` when time ran out, ``not run`` when something is absent."""
    log.parent.mkdir(parents=True, exist_ok=True)
    report, began = log.with_suffix(".xml"), time.monotonic()
    report.unlink(missing_ok=True)
    own = max(1, int(seconds - min(30.0, seconds / 4)))  # the command's own limit comes first
    places = {"{report}": str(report), "{seconds}": str(own)}
    command = [places.get(part, part) for part in item.command]
    environment = {"PYTHONPATH": python_path(), **ENVIRONMENT, **item.environment}
    code = None if item.lacking else run_process(command, log, seconds, environment)
    crashed = item.goes_on and code is not None and code < 0
    status = "failed" if code else "passed"
    counts: dict[str, int] = {}
    details: list[str] = []
    if item.lacking:
        status, details = "not run", [f"not run: {item.lacking}"]
    elif crashed or code in (None, TIME_IS_UP):
        status = "cut"
    elif report.is_file():
        counts, details = pytest_outcome(report.read_text())
        # pytest's 1 and 2 (files that cannot be collected) are faults unless packages are absent.
        excused = code in (1, 2) and counts["not run"]
        good = not counts["failed"] and (excused or code in (0, NO_TESTS))
        status = "passed" if good else "failed"
        if good and counts["not run"] and not counts["passed"]:
            status = "not run"
        if code == NO_TESTS:
            details.append("no test was selected")
    if status == "failed" and not details:
        printed = log.read_text(errors="replace")
        details = printed.splitlines()[-3:]
        if NO_COUNTERS.search(printed):
            status, details = "not run", [f"not run: needs {NEEDED}"]
    seconds_taken = round(time.monotonic() - began, 1)
    return {"status": status, "seconds": seconds_taken, "counts": counts, "details": details}


def run_stage(
    name: str, items: Sequence[Item], state: State, seconds: float, workers: int = 1
) -> str:
    """Runs what is missing of a stage, each outcome saved as it comes.

    Gives passed, failed, cut or, of a stage none of whose items could run, not run.

    What does not fit into ``seconds`` is left for the next call; ``workers`` processes run at a
    time.
    """
    end = time.monotonic() + seconds

    def one(item: Item) -> None:
        if (left := end - time.monotonic()) < 1:
            return
        log = state.folder / "logs" / name / f"{records.slug(item.name)}.log"
        outcome = run_item(item, log, left)
        while item.goes_on and outcome["status"] == "cut" and (left := end - time.monotonic()) > 60:
            outcome = run_item(item, log, left)
        state.note(name, item.name, outcome)
        counts = ", ".join(f"{n} {result}" for result, n in outcome["counts"].items() if n)
        ended = f"{outcome['status']} in {outcome['seconds']:.0f} s {counts}"
        print(f"  {item.name}: {ended}".rstrip(), flush=True)

    todo = missing(items, state.outcomes(name))
    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        list(pool.map(one, todo))
    done = state.outcomes(name)
    ended = {done.get(i.name, {}).get("status") for i in items}
    if "failed" in ended:
        return "failed"
    if missing([i for i in items if not i.open_ended], done):
        return "cut"
    return "not run" if ended == {"not run"} else "passed"
