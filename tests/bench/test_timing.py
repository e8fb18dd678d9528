"""Timing with injected clocks: order, quantiles, rotation out of the L2 cache, memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.harness import timing


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


def test_peak_memory_of_a_call() -> None:
    x = torch.zeros(1000, 1000)
    assert timing.peak_bytes(lambda: x + 1, "cpu") in range(4_000_000, 4_001_000)
    assert timing.peak_bytes(lambda: (x + 1).exp().sum(), "cpu") in range(8_000_000, 8_001_000)
    assert timing.peak_bytes(lambda: x.view(-1), "cpu") == 0
