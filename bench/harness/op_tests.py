"""An op's tests, run on the card that measures it, before anything is recorded.

A speed-up is recorded only where they passed. Each op has a pytest process of its own, which serves
all its backends; the outcome is read from the report that pytest writes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from cmpose.ops.backends import BACKENDS
from cmpose.provenance import PROJECT

CONTRACT = "tests/ops/test_contract.py"


class Outcome(NamedTuple):
    """A test's name, whether it ``passed``, ``failed`` or was ``skipped``, and what failed."""

    name: str
    status: str
    text: str


def read_report(report: str) -> list[Outcome]:
    """Every test of pytest's XML."""
    outcomes = []
    for case in ElementTree.fromstring(report).iter("testcase"):
        bad = [c for c in case if c.tag in ("failure", "error")]
        status = "failed" if bad else "passed" if case.find("skipped") is None else "skipped"
        text = " ".join(f"{c.get('message', '')} {c.text or ''}" for c in bad)
        outcomes.append(Outcome(f"{case.get('classname')}::{case.get('name')}", status, text))
    return outcomes


def command(op: str) -> list[str]:
    """pytest on an op's contract and its own tests, but for where the report goes."""
    files = [f for f in (CONTRACT, f"tests/ops/test_{op}.py") if (PROJECT / f).is_file()]
    return [*(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"), *files, "-k", op]


def verdict(tests: Iterable[Outcome], op: str, backend: str, shown: str) -> dict[str, Any]:
    """What the tests say of one backend of an op, as a record holds it.

    Tests that name the op count, unless they name another backend of it. At least one that passed
    must name this backend; ``auto`` is measured where there are no kernels, and answers for the
    reference too. A skipped test is none that passed.
    """
    accepted = {"auto", "reference"} if backend == "auto" else {backend}
    counted, own = [], 0
    for name, status, _ in tests:
        if op not in name:
            continue
        [parameters] = re.findall(r"\[(.*)\]$", name) or [""]
        named = [b for b in BACKENDS if f"{op}-{b}" in parameters]
        if named and not accepted & set(named):
            continue
        counted.append(status)
        own += bool(named) and status == "passed"
    failed, passed = counted.count("failed"), counted.count("passed")
    good = not failed and own > 0
    status = "passed" if good else "failed" if failed else "not run"
    return {"status": status, "tests": passed, "failed": failed, "command": shown}


def run(
    backends: dict[str, list[str]], *, workers: int = 1, timeout: float = 500.0
) -> dict[str, dict[str, dict[str, Any]]]:
    """Runs the tests of backends, by op, as many ops at a time as there are workers.

    Tests of an op that take longer than ``timeout`` seconds are ``not run``.

    Returns:
        op → backend → outcome.
    """
    environment = {**os.environ, "PYTHONPATH": python_path()}

    def one(op: str) -> dict[str, dict[str, Any]]:
        line, tests = command(op), list[Outcome]()
        with tempfile.TemporaryDirectory() as folder, suppress(subprocess.TimeoutExpired):
            report = Path(folder) / "report.xml"
            subprocess.run(
                [*line, f"--junitxml={report}"], cwd=PROJECT, env=environment, timeout=timeout,
                capture_output=True,
            )  # fmt: skip
            tests = read_report(report.read_text()) if report.is_file() else []
        shown = " ".join(["python", *line[1:]])
        return {name: verdict(tests, op, name, shown) for name in backends[op]}

    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        return dict(zip(backends, pool.map(one, backends), strict=True))


def python_path() -> str:
    """The repository's root before what PYTHONPATH holds."""
    inherited = os.environ.get("PYTHONPATH")
    return f"{PROJECT}{os.pathsep}{inherited}" if inherited else str(PROJECT)
