"""Fixtures of the kernel tests: on a GPU they run there, else in Triton's interpreter."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from cmpose.ops import backends
from tests.ops.support import assertions


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run; without a GPU this needs TRITON_INTERPRET=1 before triton's import."""
    if torch.cuda.is_available():
        return "cuda"
    assert os.environ.get("TRITON_INTERPRET") == "1"
    if reason := backends._interpreter_fails():
        pytest.skip(reason)
    return "cpu"


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN and the largest integers."""
    with assertions.poisoned_memory():
        yield
