"""Counts what the op contract covers: a line an op at the end of the run."""

from __future__ import annotations

from collections import Counter

import pytest

from cmpose.ops.backends import OPS

_passed: Counter[str] = Counter()


def _op_of(nodeid: str) -> str | None:
    """The op that a test of the contract suite is about, from its parameters."""
    file, _, parameters = nodeid.partition("[")
    if not file.startswith(("tests/ops/test_contract.py", "tests/ops/test_arguments.py")):
        return None
    return next((op for op in OPS if op in parameters), None)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    op = _op_of(report.nodeid)
    if op and report.when == "call" and report.passed:
        _passed[op] += 1


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _passed:
        terminalreporter.section("op contract: cases that passed")
        for op in OPS:
            terminalreporter.line(f"{op:22} {_passed[op]}")
