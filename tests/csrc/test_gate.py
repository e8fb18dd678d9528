"""Compiled CUDA C++ kernels keep to their budgets, and what is planted is found and named."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

from bench.profile import counts
from bench.profile.cards import BY_ARCH
from cmpose.ops import cuda
from cmpose.ops.backends import OPS
from tests.csrc import compile_check
from tests.kernels import gate
from tests.kernels.test_gate import ON_A_GPU, SECTORS
from tests.ptx_on_cpu import cuda_kernels, machine

pytestmark = [pytest.mark.skipif(machine.compiler() is None, reason="needs g++"), ON_A_GPU]

REASONS = {
    "dpc_knn forward": "products and distances go from launch to launch, through the L2 cache",
    "merge_clusters forward": "each block of channels reads all labels and weights",
    "merge_clusters backward": "a token reads its cluster's gradient and mean, that in float32",
    "select_tokens forward": "logits are read twice: for the scores and for the ranks",
    "select_tokens backward": "gradients are read twice: for their sum and for the result",
    "unmerge_tokens forward": "a merged token is read once for each of its tokens",
    "unmerge_tokens backward": "each block of channels reads all labels",
}
"""Ops that ask for more than :data:`SECTORS`, and why; their budgets hold how much."""


@pytest.fixture(autouse=True)
def nvcc() -> None:
    compile_check.require_nvcc()


@pytest.mark.parametrize(("op", "direction", "arch"), gate.CUDA.cases)
def test_budgets_are_kept(op: str, direction: str, arch: int) -> None:
    now = gate.measured(gate.CUDA, op, direction, arch)
    if max(now[f"{op} {direction} sm_{arch}"].values()) > SECTORS:
        assert f"{op} {direction}" in REASONS
    gate.check(op, now, gate.CUDA.read())


def test_every_kernel_is_gated() -> None:
    """A new op is one line in ``tests/kernels/gate.py``."""
    sources = {path.stem for path in compile_check.build.CSRC.glob("*.cu")}
    assert sources & set(OPS) == set(gate.CUDA.directions)
    assert gate.strangers(gate.CUDA) == []


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_options_cost_little(direction: str) -> None:
    """At most 3.1 % more instructions than without any, which is what the budget is of."""
    used = ("lengths", "scale", "strides", "lse")
    with mock.patch.object(cuda, "MULTIPROCESSORS_ON_CPU", BY_ARCH[89].sms):
        taken = counts.launches_of_op("spatial_attention", 89, None, direction, options=used)
    (found,) = counts.count(taken, 89, samples=1)  # of blocks that are all alike
    budget = gate.CUDA.read()[f"spatial_attention {direction} sm_89 {found.kernel}"]
    now = gate.figures(found)
    assert budget["instructions"] < now["instructions"] <= 1.031 * budget["instructions"]
    assert now["registers"] == budget["registers"]


# -- planted --------------------------------------------------------------------------------------

BLOCKS = 8
PLANTED = Path(__file__).parent / "planted" / "gate"


@pytest.fixture
def lines_of(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], dict[str, gate.Figures]]:
    """The lines of the kernel with one of its faults."""
    monkeypatch.setattr(cuda_kernels.cuda_on_cpu, "CSRC", PLANTED)
    number = 256 * BLOCKS
    given = torch.arange(2 * 4 * number, dtype=torch.int32)
    out = torch.zeros(4 * number, dtype=torch.int32)
    parameters = struct.pack("QQi", given.data_ptr(), out.data_ptr(), number)

    def lines(fault: int) -> dict[str, gate.Figures]:
        name = f"void move<{fault}>(uint4 const*, uint4*, int)"
        launch = cuda_kernels.launch(name, BLOCKS, 8, 0, parameters, [given, out])
        (one,) = counts.count([launch], 89)
        return gate.lines("copy", [replace(one, kernel="move")], 2 * 16 * number)

    return lines


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (1, "narrow accesses"),
        (2, "sectors asked for"),
        (3, "traffic"),
        (4, "bank conflicts"),
        (5, "fma instructions"),
        (6, "blocks an SM"),
    ],
)
def test_a_planted_fault_is_named(
    lines_of: Callable[[int], dict[str, gate.Figures]], fault: int, named: str
) -> None:
    good = lines_of(0)
    assert good["copy"] == {"traffic": 1.0, "asked": 1.0}
    assert good["copy move"]["narrow accesses"] == good["copy move"]["bank conflicts"] == 0
    assert gate.worse(good, good) == []
    found = gate.worse(lines_of(fault), good)
    assert any(f" {named}, budget " in line for line in found), found
