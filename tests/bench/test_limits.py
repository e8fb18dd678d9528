"""A slow-down of more than 10 % is told, per case and backend; other cards have none."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import limits
from bench.harness import records
from bench.harness.targets import TARGETS
from cmpose.files import write_json
from tests.bench.samples import CARD, PASSED, record

CASE = str(TARGETS[2].workload)
WANTED = {CASE: {"triton": 100.0}}


def test_ten_percent_are_allowed_and_what_was_not_measured_is_no_pass() -> None:
    assert limits.slow_downs({CASE: {"triton": 110.0}}, WANTED) == []
    [said] = limits.slow_downs({CASE: {"triton": 112.0}}, WANTED)
    assert "112.0 µs, 12 % more than the 100.0 µs that were reached" in said
    assert said.startswith("temporal_attention forward B=32")
    [said] = limits.slow_downs({CASE: {"cuda": 10.0}}, WANTED)
    assert "triton: not measured" in said


def test_expectations_are_of_a_card(tmp_path: Path) -> None:
    path = tmp_path / "test-card-9000.json"
    write_json(path, {"card": CARD, "commit": "abc", "us": WANTED})
    assert limits.reached(CARD, tmp_path) == WANTED
    assert limits.reached("Another Card", tmp_path) == {}
    write_json(path, {"card": CARD, "commit": "abc", "us": {CASE: {"triton": -1}}})
    with pytest.raises(records.SchemaError, match=r"us\..*triton: expected"):
        limits.reached(CARD, tmp_path)


def test_they_come_from_records_whose_tests_passed() -> None:
    failed = record(backend="cuda", op_tests=PASSED | {"status": "failed", "failed": 1})
    other = record(shape={**record()["shape"], "T": 8})
    assert limits.from_records([record(), failed, other]) == WANTED
