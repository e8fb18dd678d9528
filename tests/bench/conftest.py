"""The benchmarks' tests run on the CPU, on a machine with a GPU too: nothing is measured here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import cmpose.provenance
from bench import provenance


@pytest.fixture(autouse=True, scope="session")
def _no_gpu() -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the processes that tests start
    for module in (provenance, cmpose.provenance):  # bench's hands on cmpose's functions
        patch.setattr(module, "device", lambda: "cpu")
    yield
    patch.undo()
