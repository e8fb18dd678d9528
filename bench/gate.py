"""The gate: an op's tests, run on the card that measures it, before anything is recorded.

A speed-up is recorded only where they passed. Each op has a pytest process of its own, which serves
all its backends; the outcome is read from the report that it writes.
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
from pathlib import Path
from typing import Any

from bench.provenance import PROJECT
from cmpose.ops.backends import BACKENDS

CONTRACT = "tests/ops/test_contract.py"


def command(op: str, report: str) -> list[str]:
    """pytest on an op's contract and its own tests."""
    own = f"tests/ops/test_{op}.py"
    files = [CONTRACT, own] if (PROJECT / own).is_file() else [CONTRACT]
    return [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"),
        *(*files, "-k", op, f"--junitxml={report}"),
    ]


def outcomes(report: str, op: str) -> list[tuple[str, str]]:
    """(test, ``passed``, ``failed`` or ``skipped``) of those that name the op, from the XML."""
    found = []
    for case in ElementTree.fromstring(report).iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        kinds = {child.tag for child in case}
        bad, left_out = kinds & {"failure", "error"}, "skipped" in kinds
        if op in name:
            found.append((name, "failed" if bad else "skipped" if left_out else "passed"))
    return found


def verdict(tests: Iterable[tuple[str, str]], op: str, backend: str, shown: str) -> dict[str, Any]:
    """The gate of one backend of an op, as a record holds it.

    A test of another backend does not count. At least one test must name this backend; ``auto`` is
    measured where there are no kernels, and answers for the reference. A skipped test is none that
    passed.
    """
    accepted = {"auto", "reference"} if backend == "auto" else {backend}
    counted, own = [], 0
    for name, status in tests:
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
    wanted: dict[str, list[str]], *, workers: int = 1, timeout: float = 500.0
) -> dict[str, dict[str, dict[str, Any]]]:
    """Runs the tests; op → backend → gate.

    Args:
        wanted: op → its backends that are measured.
        workers: processes at a time.
        timeout: seconds of an op's tests, after which its gate is ``not run``.
    """
    environment = {**os.environ, "PYTHONPATH": python_path()}

    def one(op: str) -> dict[str, dict[str, Any]]:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.xml"
            line = command(op, str(report))
            shown = " ".join(["python", *line[1:-1]])
            text = "<testsuites/>"
            try:
                subprocess.run(
                    line,
                    cwd=PROJECT,
                    env=environment,
                    timeout=timeout,
                    capture_output=True,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                pass
            else:
                text = report.read_text() if report.is_file() else text
        tests = outcomes(text, op)
        return {name: verdict(tests, op, name, shown) for name in wanted[op]}

    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        return dict(zip(wanted, pool.map(one, wanted), strict=True))


def python_path() -> str:
    """The repository's root before what PYTHONPATH holds."""
    given = os.environ.get("PYTHONPATH")
    return f"{PROJECT}{os.pathsep}{given}" if given else str(PROJECT)
