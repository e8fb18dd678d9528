"""Fixtures of the kernel tests: on a GPU they run there, else in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from tests.ops import assertions


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run; without a GPU this needs TRITON_INTERPRET=1 before triton's import."""
    if torch.cuda.is_available():
        return "cuda"
    assert os.environ.get("TRITON_INTERPRET") == "1"
    return "cpu"


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN and the largest integers."""
    with assertions.poisoned_memory():
        yield


_SUMMARY = pytest.StashKey[list[str]]()


@pytest.fixture(scope="session")
def summary(request: pytest.FixtureRequest) -> list[str]:
    """Lines to show at the end of the run: what the cross-compile gate has compiled."""
    return request.config.stash.setdefault(_SUMMARY, [])


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    lines = config.stash.get(_SUMMARY, [])
    if lines:
        terminalreporter.section("kernels compiled by the gate")
        for line in lines:
            terminalreporter.line(line)
