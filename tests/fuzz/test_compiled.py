"""Compiled kernels on the CPU, at every size of the op contract; Triton's for every card.

Only ``make fuzz`` runs these: a kernel takes half a second to compile. tests/ptx_on_cpu has what
every run tests.
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
    pytest.mark.skipif(FACTOR == 1, reason="make fuzz runs it"),
    pytest.mark.skipif(machine.compiler() is None, reason="needs g++"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels itself"),
]


@pytest.mark.parametrize("arch", [80, 86, 89, 120])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_every_size(
    name: str, dtype: torch.dtype, arch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contract, "precise", lambda backend: dtype)
    with triton_kernels.running(arch):
        contract.test_value_and_gradients_are_as_close_as_eager(CASES[name], "triton", dtype)
        contract.test_strided_inputs(CASES[name], "triton")
        if CASES[name].gradients:
            contract.test_hostile_gradients(CASES[name], "triton")
