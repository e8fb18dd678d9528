"""What CudaClock uses of torch.cuda, on the CPU: streams have names, time passes with work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any


class FakeCuda:
    """Work takes a millisecond on the current stream, a replay 3 and a sleep 7."""

    def __init__(self, capturable: bool) -> None:
        self.capturable, self.capturing, self.time = capturable, False, 0.0
        self.log: list[str] = []
        self.streams = ["default"]

    def _spend(self, what: str, milliseconds: float) -> None:
        self.log.append(what)
        self.time += milliseconds

    def work(self) -> None:
        where = f"on {self.streams[-1]}"
        self._spend(f"capture {where}" if self.capturing else f"run {where}", not self.capturing)

    def Stream(self) -> Any:
        return SimpleNamespace(wait_stream=lambda other: None)

    def current_stream(self) -> str:
        return self.streams[-1]

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.streams.append("side")
        yield
        self.streams.pop()

    def CUDAGraph(self) -> Any:
        return SimpleNamespace(replay=lambda: self._spend("replay", 3.0))

    @contextmanager
    def graph(self, graph: Any, stream: Any) -> Iterator[None]:
        self.capturing = True
        try:
            with self.stream(stream):
                yield
            if not self.capturable:
                raise RuntimeError("operation not permitted when stream is capturing")
        finally:
            self.capturing = False

    def Event(self, enable_timing: bool) -> Any:
        assert enable_timing
        event = SimpleNamespace(synchronize=lambda: None)
        event.record = lambda: setattr(event, "at", self.time)
        event.elapsed_time = lambda end: end.at - event.at
        return event

    def synchronize(self) -> None:
        pass

    def _sleep(self, cycles: int) -> None:
        self._spend("sleep", 7.0)
