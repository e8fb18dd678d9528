"""What CudaClock uses of torch.cuda, on the CPU: streams have names, time passes with work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class FakeCuda:
    """What CudaClock uses of torch.cuda; work takes a millisecond on the current stream."""

    def __init__(self, capturable: bool) -> None:
        self.capturable, self.log, self.time = capturable, [], 0.0
        self.streams = ["default"]
        self.capturing = False

    def work(self) -> None:
        self.log.append(f"{'capture' if self.capturing else 'run'} on {self.streams[-1]}")
        if not self.capturing:
            self.time += 1.0

    def Stream(self) -> Any:
        class Stream:
            def wait_stream(self, other: Any) -> None:
                pass

            def __str__(self) -> str:
                return "side"

        return Stream()

    def current_stream(self) -> str:
        return self.streams[-1]

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        self.streams.append(str(stream))
        yield
        self.streams.pop()

    def CUDAGraph(self) -> Any:
        fake = self

        class Graph:
            def replay(self) -> None:
                fake.log.append("replay")
                fake.time += 3.0

        return Graph()

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
        fake = self

        class Event:
            def record(self) -> None:
                self.at = fake.time

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Any) -> float:
                return end.at - self.at

        return Event()

    def synchronize(self) -> None:
        pass

    def _sleep(self, cycles: int) -> None:
        self.log.append("sleep")
        self.time += 7.0
