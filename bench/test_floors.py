"""On a card with expected times: no target's case has become more than 10 % slower."""

from __future__ import annotations

import pytest

from bench import floors, measure, provenance, roofline, timing
from bench.targets import bench_of


def test_nothing_has_become_slower() -> None:
    if provenance.device() == "cpu":
        pytest.skip("no GPU: there are no expected times for a CPU")
    card = provenance.machine()
    wanted = floors.expected(card)
    if not wanted:
        pytest.skip(f"no expected times for {card}: python -m bench.floors writes them")
    setting = measure.Setting(turns=3, seconds=0.1, peers=False)
    rates, clock = roofline.measure_rates("cuda"), timing.clock_for("cuda")
    found: dict[str, dict[str, float]] = {}
    for case in floors.cases_of(wanted):
        measured, faults = measure.measure(
            case, bench_of(case.op), list(wanted[str(case)]), rates, setting, clock=clock
        )
        assert faults == {}
        for record in measured:
            found.setdefault(str(case), {})[record["backend"]] = record["us"]["p50"]
    assert floors.slow_downs(found, wanted) == []
