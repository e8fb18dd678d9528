"""Timing with injected clocks: order, quantiles, rotation out of L2, graphs and what has none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.harness import timing
from tests.bench.fake_cuda import FakeCuda


class FakeClock(timing.Clock):
    """Each entrant's pass takes what it says; nothing else takes time."""

    def __init__(self, cost: dict[str, float]) -> None:
        super().__init__(lambda: self.time)
        self.cost, self.log, self.time = cost, [], 0.0

    def prepare(self, setup: Callable[[], Any]) -> timing.Pass:
        [name] = setup()
        self.log.append(name)
        if self.cost[name] < 0:
            raise RuntimeError("does not run")
        return timing.Pass(lambda: None, 4, (name[0] == "h" and "host") or "graph", name)

    def seconds(self, ready: timing.Pass) -> float:
        self.time += self.cost[ready.keep]
        return self.cost[ready.keep]


def race(cost: dict[str, float], **options: Any) -> tuple[Any, FakeClock, list[str]]:
    clock, failed = FakeClock(cost), []
    result = timing.race(
        {name: lambda name=name: [name] for name in cost},  # type: ignore[misc]
        clock,
        failed=lambda name, error: failed.append(f"{name}: {error}"),
        **options,
    )
    return result, clock, failed


def test_the_order_rotates_and_turns_round() -> None:
    _, clock, _ = race({"a": 1.0, "b": 1.0, "c": 1.0}, turns=3, seconds=0.0, least=1)
    assert clock.log == ["a", "b", "c", "a", "c", "b", "c", "a", "b"]


def test_samples_are_of_a_call_and_fill_the_time() -> None:
    result, _, failed = race({"a": 2.0, "b": 8.0}, turns=2, seconds=20.0, least=3, most=100)
    assert failed == []
    assert result["a"] == ([0.5] * 20, "graph")  # 4 calls a pass, 10 passes a turn
    assert result["b"] == ([2.0] * 6, "graph")


def test_an_entrant_that_fails_is_told_of_and_left_out() -> None:
    result, clock, failed = race({"a": 1.0, "bad": -1.0}, turns=3, seconds=0.0, least=1)
    assert failed == ["bad: does not run"]
    assert set(result) == {"a"}
    assert clock.log.count("bad") == 1


def test_input_sets_do_not_fit_the_cache() -> None:
    MB = 1 << 20
    assert timing.input_sets(10 * MB, 50 * MB, 1000 * MB) == 15  # three times the cache
    assert timing.is_cold(15, 10 * MB, 50 * MB)
    assert timing.input_sets(400 * MB, 50 * MB, 80_000 * MB) == 1
    assert timing.input_sets(10 * MB, 50 * MB, 80 * MB) == 2  # a quarter of what is free
    assert not timing.is_cold(2, 10 * MB, 50 * MB)
    assert timing.input_sets(1000, 50 * MB, 1000 * MB) == timing.MOST_SETS
    assert timing.input_sets(10 * MB, 0, 1000 * MB) == 1  # a CPU
    assert not timing.is_cold(100, 10 * MB, 0)


def test_a_graph_is_captured_where_its_forward_ran() -> None:
    cuda = FakeCuda(capturable=True)
    clock = timing.CudaClock(cuda)
    setups: list[str] = []

    def setup() -> list[Callable[[], None]]:
        setups.append(str(cuda.current_stream()))  # a forward whose backward will be timed
        return [cuda.work, cuda.work, cuda.work]

    ready = clock.prepare(setup)
    assert setups == ["side"]
    assert (ready.timer, ready.calls) == ("graph", 3)
    assert set(cuda.log[:-1]) == {"run on side", "capture on side"}
    assert cuda.log.count("capture on side") == 3
    cuda.log.clear()
    assert clock.seconds(ready) == pytest.approx(3e-3)
    assert cuda.log == ["replay"]


def test_what_cannot_be_captured_runs_behind_a_delay() -> None:
    cuda = FakeCuda(capturable=False)
    clock = timing.CudaClock(cuda)
    ready = clock.prepare(lambda: [cuda.work, cuda.work])
    assert ready.timer == "events"
    assert "not permitted" in ready.keep
    cuda.log.clear()
    assert clock.seconds(ready) == pytest.approx(2e-3)  # the delay lies before the first event
    assert cuda.log == ["sleep", "run on side", "run on side"]


def test_peak_memory_of_a_call() -> None:
    x = torch.zeros(1000, 1000)
    assert timing.peak_bytes(lambda: x + 1, "cpu") in range(4_000_000, 4_001_000)
    assert timing.peak_bytes(lambda: (x + 1).exp().sum(), "cpu") in range(8_000_000, 8_001_000)
    assert timing.peak_bytes(lambda: x.view(-1), "cpu") == 0
