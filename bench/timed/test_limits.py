"""On a card that has limits: no target's workload has become more than 10 % slower."""

from __future__ import annotations

import pytest

from bench import limits
from bench.harness import bound, measure, timing
from bench.harness.targets import TARGETS, bench_of
from cmpose import provenance


def test_nothing_has_become_slower() -> None:
    if provenance.device() == "cpu":
        pytest.skip("no GPU: a CPU has no limits")
    card = provenance.machine()
    before = limits.reached(card)
    if not before:
        pytest.skip(f"no limits for {card}: python -m bench.limits writes them")
    run = measure.Run(
        bound.measure_rates("cuda"),
        measure.Setting(turns=3, seconds=0.1, peers=False),
        timing.clock_for("cuda"),
        provenance.provenance(),
    )
    now: limits.Times = {}
    for workload in [t.workload for t in TARGETS if str(t.workload) in before]:
        backends = list(before[str(workload)])
        records, faults = measure.measure(workload, bench_of(workload.op), backends, run)
        assert faults == {}
        now[str(workload)] = {record["backend"]: record["us"]["p50"] for record in records}
    assert limits.slow_downs(now, before) == []
