"""The cases under pytest-benchmark: ``pytest bench/ --benchmark-only``.

One test is one entrant of one case, grouped by case. pytest-benchmark compares runs over commits:
``--benchmark-autosave``, then ``--benchmark-compare``. On a card the time is of a CUDA graph over
input sets that do not fit the L2 cache, by CUDA events, per call; on a CPU the sizes are small and
the times are no performance result. Records, floors and the gate are ``python -m bench``'s.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import measure, provenance, timing
from bench.cases import FP32, Case, total_bytes
from bench.targets import TARGETS, bench_of
from cmpose.ops.backends import OPS


class PassTimer:
    """A timer for pytest-benchmark that counts what passes take, per call.

    It is read before and after a pass, which synchronises; only passes advance it.
    """

    def __init__(self) -> None:
        self.total = 0.0

    def __call__(self) -> float:
        return self.total


def _cases() -> list[Case]:
    if provenance.device() == "cuda":
        return [t.case for t in TARGETS]
    return [c for op in OPS for c in bench_of(op).cases(small=True) if c.dtype == FP32]


def _entrants(case: Case) -> list[str]:
    bench = bench_of(case.op)
    ours = measure.backends_for(bench, provenance.device(), None)
    return [*(f"cmpose {name}" for name in ours), *bench.peers(case.shape)]


RUNS = [(case, entrant) for case in _cases() for entrant in _entrants(case)]


@pytest.mark.parametrize(("case", "entrant"), RUNS, ids=[f"{c}-{e}" for c, e in RUNS])
def test_time(benchmark: Any, case: Case, entrant: str) -> None:
    device, bench = provenance.device(), bench_of(case.op)
    if device == "cpu" and ("compile" in entrant or entrant == "flex"):
        pytest.skip("compiling takes long on a CPU")
    torch._dynamo.reset()
    if entrant.startswith("cmpose "):
        name = entrant.removeprefix("cmpose ")

        def function(**arguments: Any) -> Any:
            return bench.call(**arguments, backend=name)

    else:
        peer = bench.peers(case.shape)[entrant]
        try:
            function = peer.build(False) if peer.tuned else peer.build()
            measure.calls_of(function, [bench.arguments(case, device)], bench, case.direction)[0]()
        except Exception as error:
            pytest.skip(measure.message(error))  # not ours; python -m bench records it
    clock = timing.clock_for(device)
    with clock.context():
        _time(benchmark, case, function, clock)


def _time(benchmark: Any, case: Case, function: Any, clock: timing.Clock) -> None:
    device, bench = provenance.device(), bench_of(case.op)
    first = bench.arguments(case, device)
    count = timing.input_sets(
        total_bytes(first), timing.l2_bytes(device), timing.free_bytes(device)
    )
    sets = [first, *(bench.arguments(case, device, seed) for seed in range(1, count))]
    ready = clock.prepare(lambda: measure.calls_of(function, sets, bench, case.direction))
    timer = PassTimer()

    def run() -> None:
        timer.total += clock.seconds(ready) / ready.calls

    benchmark._timer = timer  # its marker takes one too, but before the test has a clock
    benchmark.group = str(case)
    benchmark.extra_info |= {"timer": ready.timer, "input_sets": count}
    if device == "cpu":
        benchmark.extra_info["note"] = provenance.NOT_A_RESULT
    benchmark.pedantic(run, rounds=50 if device == "cuda" else 5, warmup_rounds=1)
