"""The workloads under pytest-benchmark: ``pytest bench/ --benchmark-only``.

One test is one entrant of one workload, grouped by workload, timed as ``python -m bench`` does.
pytest-benchmark compares runs over commits: ``--benchmark-autosave``, then ``--benchmark-compare``.
Records, bounds and speed-ups are ``python -m bench``'s.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from bench.harness import measure, timing
from bench.harness.measure import Entrant
from bench.harness.records import NOT_A_RESULT
from bench.harness.shapes import FP32
from bench.harness.targets import TARGETS, bench_of
from bench.harness.workload import Workload
from cmpose import provenance
from cmpose.ops.backends import OPS

pytest.importorskip("pytest_benchmark", reason="python -m bench measures without it")


def _entrants() -> Iterator[Any]:
    """Each workload with ours and its peers; compiling takes long on a CPU."""
    device = provenance.device()
    small = [w for op in OPS for w in bench_of(op).workloads(small=True) if w.dtype == FP32]
    for workload in [t.workload for t in TARGETS] if device == "cuda" else small:
        backends = measure.backends_for(workload.op, device, None)
        setting = measure.Setting(compiled=device == "cuda")
        for entrant in measure.entrants_of(bench_of(workload.op), backends, setting):
            if entrant.failure is None:
                yield pytest.param(workload, entrant, id=f"{workload}-{entrant.name}")


@pytest.mark.parametrize(("workload", "entrant"), _entrants())
def test_time(benchmark: Any, workload: Workload, entrant: Entrant) -> None:
    device, bench = provenance.device(), bench_of(workload.op)
    torch._dynamo.reset()
    sets, _ = measure.rotated_inputs(workload, bench, device)
    try:
        function = entrant.build()
        measure.call_of(function, sets[0], bench, workload.direction)()
    except Exception as error:
        if entrant.peer is None:
            raise
        pytest.skip(measure.message(error))  # not ours; python -m bench records it
    clock, total = timing.clock_for(device), [0.0]
    with clock.context():
        ready = clock.prepare(
            lambda: [
                measure.call_of(function, arguments, bench, workload.direction)
                for arguments in sets
            ]
        )

        def run() -> None:
            total[0] += clock.seconds(ready) / ready.calls

        # Read before and after a pass, which alone advances it.
        benchmark._timer = lambda: total[0]
        benchmark.group = str(workload)
        benchmark.extra_info |= {"timer": ready.timer, "input_sets": len(sets)}
        if device == "cpu":
            benchmark.extra_info["note"] = NOT_A_RESULT
        benchmark.pedantic(run, rounds=50 if device == "cuda" else 5, warmup_rounds=1)
