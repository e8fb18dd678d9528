"""The gate: an op's tests, run on the card that measures it, before anything is recorded.

A speed-up is recorded only where they passed. One pytest serves all ops and backends of a run; its
outcome is read from the report that it writes.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.provenance import PROJECT
from cmpose.ops.backends import BACKENDS

CONTRACT = "tests/ops/test_contract.py"


def command(ops: Sequence[str], report: str, workers: int = 1) -> list[str]:
    """pytest on the contract of some ops and on their own tests."""
    own = [f"tests/ops/test_{op}.py" for op in ops if (PROJECT / f"tests/ops/test_{op}.py").is_file()]
    parallel = []
    if workers > 1 and importlib.util.find_spec("xdist"):
        parallel = ["-n", str(workers)]
    wanted = " or ".join(ops)
    return [
        *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *parallel),
        *(CONTRACT, *own, "-k", wanted, f"--junitxml={report}"),
    ]


def outcomes(report: str, ops: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
    """(test, ``passed``, ``failed`` or ``skipped``) of each op, from pytest's XML."""
    found: dict[str, list[tuple[str, str]]] = {op: [] for op in ops}
    for case in ElementTree.fromstring(report).iter("testcase"):
        name = f"{case.get('classname', '')}::{case.get('name', '')}"
        kinds = {child.tag for child in case}
        status = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        for op, tests in found.items():
            if op in name:
                tests.append((name, status))
    return found


def verdict(
    tests: Iterable[tuple[str, str]], op: str, backend: str, shown: str
) -> dict[str, Any]:
    """The gate of one backend of an op, as a record holds it.

    A test of another backend does not count. At least one test must name this backend (``auto``
    stands for whatever it takes); a skipped test is none that passed.
    """
    counted, own = [], 0
    for name, status in tests:
        [parameters] = re.findall(r"\[(.*)\]$", name) or [""]
        named = [b for b in BACKENDS if f"{op}-{b}" in parameters]
        if named and named != [backend]:
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
        workers: processes, with pytest-xdist.
        timeout: seconds, after which every gate is ``not run``.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        line = command(list(wanted), str(report), workers)
        shown = " ".join(["python", *line[1:-1]])
        environment = {**os.environ, "PYTHONPATH": _path()}
        try:
            subprocess.run(
                line, cwd=PROJECT, env=environment, timeout=timeout, capture_output=True, check=False
            )
            text = report.read_text() if report.is_file() else "<testsuites/>"
        except subprocess.TimeoutExpired:
            text = "<testsuites/>"
    found = outcomes(text, wanted)
    return {
        op: {name: verdict(found[op], op, name, shown) for name in backends}
        for op, backends in wanted.items()
    }


def _path() -> str:
    """The repository's root before what PYTHONPATH holds."""
    given = os.environ.get("PYTHONPATH")
    return f"{PROJECT}{os.pathsep}{given}" if given else str(PROJECT)
