"""The benchmarks' tests run on the CPU, on a machine with a GPU too: nothing is measured here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cmpose import provenance


@pytest.fixture(autouse=True, scope="session")
def _no_gpu() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the processes that tests start
        patch.setattr(provenance, "device", lambda: "cpu")
        yield
