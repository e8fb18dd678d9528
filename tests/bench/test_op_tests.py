"""What passed counts for the backend that is measured, and nothing else."""

from __future__ import annotations

import pytest

from bench.harness import op_tests

FILE = "tests.ops.test_contract"


def report(*cases: tuple[str, str]) -> str:
    body = ""
    for name, kind in cases:
        inside = f"<{kind} message='m'/>" if kind else ""
        body += f"<testcase classname='{FILE}' name='{name}'>{inside}</testcase>"
    return f"<testsuites><testsuite>{body}</testsuite></testsuites>"


ALL = (
    ("test_bitwise_repeat[dpc_knn-reference]", ""),
    ("test_bitwise_repeat[dpc_knn-cuda]", ""),
    ("test_empty_batch[dpc_knn-cuda]", ""),
    ("test_gradcheck[dpc_knn]", ""),
    ("test_bitwise_repeat[merge_clusters-cuda]", "failure"),
)


def verdict(backend: str, *changed: tuple[str, str], op: str = "dpc_knn") -> dict[str, object]:
    cases = dict(ALL) | dict(changed)
    tests = op_tests.read_report(report(*cases.items()))
    return op_tests.verdict(tests, op, backend, "python -m pytest")


def test_its_own_tests_and_those_of_no_backend_count() -> None:
    result = verdict("cuda")
    assert result == {"status": "passed", "tests": 3, "failed": 0, "command": "python -m pytest"}
    assert verdict("reference")["tests"] == 2


@pytest.mark.parametrize("kind", ["failure", "error"])
def test_one_failure_closes_it(kind: str) -> None:
    result = verdict("cuda", ("test_empty_batch[dpc_knn-cuda]", kind))
    assert (result["status"], result["failed"]) == ("failed", 1)
    assert verdict("reference", ("test_empty_batch[dpc_knn-cuda]", kind))["status"] == "passed"
    assert verdict("cuda", ("test_gradcheck[dpc_knn]", kind))["status"] == "failed"


def test_nothing_that_passed_is_no_pass() -> None:
    assert verdict("triton")["status"] == "not run"  # has no tests of its own
    skipped = [(name, "skipped") for name, _ in ALL if "cuda" in name]
    assert verdict("cuda", *skipped)["status"] == "not run"
    assert op_tests.verdict([], "dpc_knn", "cuda", "c")["status"] == "not run"
    assert verdict("cuda", op="merge_clusters")["status"] == "failed"


def test_auto_answers_for_the_reference() -> None:
    assert verdict("auto") == verdict("reference")
    for name in ("test_bitwise_repeat[dpc_knn-auto]", "test_bitwise_repeat[dpc_knn-reference]"):
        assert verdict("auto", (name, "failure"))["status"] == "failed"


def test_it_runs_the_contract_of_the_op_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = op_tests.command

    def some(op: str) -> list[str]:
        return [*whole(op)[:-1], f"{op} and (bitwise or empty)"]

    monkeypatch.setattr(op_tests, "command", some)
    result = op_tests.run({"unmerge_tokens": ["reference", "cuda"]})["unmerge_tokens"]
    assert result["reference"]["status"] == "passed"
    assert result["reference"]["tests"] == 2
    assert "tests/ops/test_contract.py" in result["reference"]["command"]
    result = op_tests.run({"unmerge_tokens": ["reference"]}, timeout=0.01)
    assert result["unmerge_tokens"]["reference"]["status"] == "not run"
