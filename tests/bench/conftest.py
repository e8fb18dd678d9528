"""The benchmarks' tests run on the CPU, on a machine with a GPU too: nothing is measured here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from cmpose import provenance


@pytest.fixture(autouse=True, scope="session")
def _no_gpu() -> Iterator[None]:
    cards = torch.cuda.device_count()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # of the processes that tests start
        # This one has its card already; torch, which counts by the variable, would have none.
        patch.setattr(torch.cuda, "device_count", lambda: cards)
        patch.setattr(provenance, "device", lambda: "cpu")
        yield
