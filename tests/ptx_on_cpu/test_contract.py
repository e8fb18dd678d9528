"""The op contract through the compiled Triton kernels, in bfloat16 and float16, and faults in them.

These are the contract's own tests (tests/ops/test_contract.py), with the kernels' PTX for sm_89 in
place of Triton's interpreter. ``make fuzz`` has every size in both dtypes, and other cards
(tests/fuzz/test_compiled.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from tests.ops import test_contract as contract
from tests.ops.support import assertions
from tests.ops.support.cases import CASES
from tests.ptx_on_cpu import machine, parse, triton_kernels

pytestmark = [
    pytest.mark.skipif(machine.compiler() is None, reason="needs g++"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU runs the kernels itself"),
]

MANY_KEYS = {"T": 1, "S": 260, "H": 1, "d": 16}
"""More keys than a program holds: dQ has a kernel of its own, and loops go round."""

SIZES = {
    "spatial_attention": (CASES["spatial_attention"].other_sizes[1], MANY_KEYS),
    "temporal_attention": CASES["temporal_attention"].other_sizes[2:],
    "corrupt_tokens": CASES["corrupt_tokens"].other_sizes[1:2],
    "reconstruction_loss": CASES["reconstruction_loss"].other_sizes[1:2],
    "heatmap_loss": CASES["heatmap_loss"].other_sizes[1:2],
    "warp_clips": CASES["warp_clips"].other_sizes[1:],
}
"""Sizes beside each case's first."""

OPS = tuple(SIZES)

every_op = pytest.mark.parametrize("name", OPS)


@pytest.fixture(autouse=True)
def compiled_kernels() -> Iterator[None]:
    with triton_kernels.running():
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@every_op
def test_value_and_gradients(name: str, dtype: torch.dtype) -> None:
    """At the contract's first size, in bfloat16 at others too, so that every kernel runs."""
    case = CASES[name]
    case = replace(case, other_sizes=SIZES[name] if dtype == torch.bfloat16 else ())
    before = triton_kernels.launched.total()
    contract.test_value_and_gradients_are_as_close_as_eager(case, "triton", dtype)
    assert triton_kernels.launched.total() > before


@every_op
def test_bitwise_repeat(name: str) -> None:
    """Whichever warp of a block is first, and with poisoned memory."""
    case = CASES[name]

    def everything() -> list[torch.Tensor]:
        return contract.everything(case, "triton", contract.arguments(case, dtype=torch.bfloat16))

    expected = everything()
    with triton_kernels.running(backwards=True), assertions.poisoned_memory():
        assertions.assert_same_bits(everything(), expected)


@every_op
def test_odd_strides(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "precise", lambda backend: torch.bfloat16)
    contract.test_strided_inputs(CASES[name], "triton")


def test_every_kernel_ran(request: pytest.FixtureRequest) -> None:
    """All that the compile check compiles, in this process."""
    from tests.kernels.test_compile_check import LIMITS

    asked = [
        item.name
        for item in request.session.items
        if item.name.startswith(test_value_and_gradients.__name__)
    ]
    if len(asked) < 2 * len(OPS) or request.session.testsfailed:
        pytest.skip("not all kernels were asked for")
    assert set(triton_kernels.launched) == set(LIMITS)


# -- planted faults -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "sizes", "share"),
    [
        (r"bar\.sync[^;]*;", {"T": 1, "S": 67, "H": 1, "d": 80}, 0.9),
        (r"cp\.async\.wait_group[^;]*;", MANY_KEYS, 0.5),
    ],
    ids=["barriers", "waits"],
)
def test_what_is_left_out_is_missed(
    what: str, sizes: dict[str, int], share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each barrier, and each wait for asynchronous copies, is taken out of spatial attention.

    Not missed are the waits and barriers behind a loop: nothing is under way there any more.
    """
    case = CASES["spatial_attention"]
    made = contract.arguments(case, 1, torch.bfloat16, sizes)
    monkeypatch.setattr(triton_kernels, "programs", {})
    contract.everything(case, "triton", made)
    found = caught = 0
    for ptx, program in list(triton_kernels.programs.items()):
        for match in re.finditer(what, ptx):
            (kernel,) = parse.kernels(ptx[: match.start()] + ptx[match.end() :]).values()
            triton_kernels.programs[ptx] = machine.Program(kernel)
            found += 1
            try:
                contract.everything(case, "triton", made)
            except machine.Fault:
                caught += 1
        triton_kernels.programs[ptx] = program
    assert caught >= share * found > 0, f"{caught} of {found}"
