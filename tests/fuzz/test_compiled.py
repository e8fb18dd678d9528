"""Compiled kernels on the CPU, at every size of the op contract; Triton's for every card.

``make fuzz`` runs all of these: a kernel takes half a second to compile. Every run has a few, on
cards that tests/ptx_on_cpu does not have.
"""

from __future__ import annotations

import pytest
import torch

from tests.fuzz.conftest import FACTOR
from tests.ops import test_contract as contract
from tests.ops.support.cases import CASES
from tests.ptx_on_cpu import machine, triton_kernels
from tests.ptx_on_cpu.test_contract import OPS

pytestmark = [
    pytest.mark.skipif(machine.compiler() is None, reason="needs g++"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels itself"),
]


ALL = [
    (name, dtype, arch)
    for name in OPS
    for dtype in (torch.bfloat16, torch.float16, torch.float32)
    for arch in (80, 86, 89, 90, 120)
]
ALWAYS = [
    ("heatmap_loss", torch.bfloat16, 120),
    ("reconstruction_loss", torch.float16, 80),
    ("warp_clips", torch.bfloat16, 86),
]


@pytest.mark.parametrize(("name", "dtype", "arch"), ALL if FACTOR > 1 else ALWAYS, ids=str)
def test_every_size(
    name: str, dtype: torch.dtype, arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract, "precise", lambda backend: dtype)
    with triton_kernels.running(arch):
        contract.test_value_and_gradients_are_as_close_as_eager(CASES[name], "triton", dtype)
        contract.test_strided_inputs(CASES[name], "triton")
        if CASES[name].gradients:
            contract.test_hostile_gradients(CASES[name], "triton")
