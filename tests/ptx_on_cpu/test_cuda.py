"""The op contract through the CUDA C++ kernels as nvcc compiles them, in bfloat16 and float16."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

from cmpose import native, ops
from tests.csrc import compile_check
from tests.ops import test_contract as contract
from tests.ops.support import assertions
from tests.ops.support.cases import CASES
from tests.ptx_on_cpu import cuda_kernels, machine, parse

pytestmark = [
    pytest.mark.skipif(machine.compiler() is None, reason="needs g++"),
    pytest.mark.skipif(not native.on_cpu(), reason="needs the sources compiled for the CPU"),
]

HALVES = (torch.bfloat16, torch.float16)
DIFFERENTIABLE = ("select_tokens", "merge_clusters", "unmerge_tokens")


@pytest.fixture(autouse=True)
def nvcc() -> Iterator[None]:
    compile_check.require_nvcc()
    with cuda_kernels.running():
        yield


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_value_and_gradients(name: str, dtype: torch.dtype) -> None:
    before = cuda_kernels.launched.total()
    contract.test_value_and_gradients_are_as_close_as_eager(CASES[name], "cuda", dtype)
    assert cuda_kernels.launched.total() > before


@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "dpc_knn"])
def test_bitwise_repeat(name: str) -> None:
    """Whichever warp of a block is first, and with poisoned memory."""
    case = CASES[name]

    def everything() -> list[torch.Tensor]:
        return contract.everything(case, "cuda", contract.arguments(case, dtype=torch.bfloat16))

    expected = everything()
    with cuda_kernels.running(backwards=True), assertions.poisoned_memory():
        assertions.assert_same_bits(everything(), expected)


@pytest.mark.parametrize("name", [*DIFFERENTIABLE, "dpc_knn"])
def test_odd_strides(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "precise", lambda backend: torch.bfloat16)
    contract.test_strided_inputs(CASES[name], "cuda")


@pytest.mark.parametrize(
    ("tokens", "dtype"),
    [(13, torch.float16), (132, torch.bfloat16), (132, torch.float16), (520, torch.bfloat16)],
    ids=str,
)
def test_clusters(tokens: int, dtype: torch.dtype) -> None:
    """Those of the reference; above 512 tokens without the matrix of distances."""
    generator = torch.Generator().manual_seed(tokens)
    given = torch.randn(1, tokens, 24, generator=generator).to(dtype)
    found = ops.dpc_knn(given, 5, 8, backend="cuda")
    truth = ops.dpc_knn(given.float(), 5, 8, backend="reference")
    torch.testing.assert_close(found.log_density, truth.log_density, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.delta, truth.delta, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.centers, truth.centers)
    assert torch.equal(found.assignment, truth.assignment)


def test_what_is_left_out_is_missed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each barrier and the wait for asynchronous copies is taken out of the distances' kernel."""
    given = torch.randn(1, 132, 24, generator=torch.Generator().manual_seed(0)).bfloat16()
    programs: dict[str, machine.Program] = {}
    original = cuda_kernels._program
    monkeypatch.setattr(
        cuda_kernels, "_program", lambda name, _: programs.setdefault(name, original(name))
    )
    ops.dpc_knn(given, 5, 8, backend="cuda")
    (name,) = (name for name in programs if "distance_pass" in name)
    ptx = cuda_kernels._entries()[name]
    found = caught = 0
    for match in re.finditer(r"(bar|barrier)\.sync[^;]*;|cp\.async\.wait_group[^;]*;", ptx):
        (kernel,) = parse.kernels(ptx[: match.start()] + ptx[match.end() :]).values()
        programs[name] = machine.Program(kernel)
        found += 1
        try:
            ops.dpc_knn(given, 5, 8, backend="cuda")
        except RuntimeError as error:
            assert "Fault: " in str(error)  # noqa: PT017
            caught += 1
    assert caught >= 0.7 * found > 0, f"{caught} of {found}"


def test_every_kernel_ran(request: pytest.FixtureRequest) -> None:
    """All of csrc/, if not with every template argument."""
    names = [item.name.partition("[")[0] for item in request.session.items]
    if names.count("test_clusters") < 4 or request.session.testsfailed:
        pytest.skip("not all kernels were asked for")
    assert cuda_kernels.families(cuda_kernels.launched) == cuda_kernels.families()
