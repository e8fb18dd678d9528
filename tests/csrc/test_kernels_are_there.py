"""The CUDA kernels' tests must run at all: without kernels they skip, which looks like success."""

from __future__ import annotations

import os

import pytest

from cmpose import ops
from tests.ops.support.cases import DEVICE

REQUIRE = "CMPOSE_REQUIRE_CUDA_OPS"


@pytest.mark.parametrize(
    "name",
    ["spatial_attention", "select_tokens", "dpc_knn", "merge_clusters", "unmerge_tokens"],
)
def test_the_kernels_can_be_tested(name: str) -> None:
    """On the card, or on the CPU in the sources compiled for it."""
    reason = ops.available(name, DEVICE)["cuda"]
    if reason is not None:
        if os.environ.get(REQUIRE) == "1":
            pytest.fail(f"{REQUIRE}=1, but {reason}")
        pytest.skip(reason)
