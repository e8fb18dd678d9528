"""Compiled kernels keep to their budgets, and the gates turn red where they must.

What is read from the code alone, for every case and card (ptxas's warnings, groups of warps,
copies ahead), stands in tests/kernels/test_compile_check.py; its planted faults are here.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench.profile import counts, model, sass
from bench.profile.cards import BY_ARCH
from cmpose.kernels import launch, spatial_attention, temporal_attention
from tests.kernels import compile_check, gate, ptx_gates
from tests.kernels.test_compile_check import AHEAD
from tests.ptx_on_cpu import machine, triton_kernels

ON_A_GPU = pytest.mark.skipif(
    torch.cuda.is_available(), reason="tests/kernels/test_gate_beside_a_gpu.py runs it"
)
"""Launches are taken from the CPU's run of kernels, which the tests' process has not there."""

pytestmark = [pytest.mark.skipif(machine.compiler() is None, reason="needs g++"), ON_A_GPU]

SECTORS = 1.02
"""The most sectors, in bytes, over the bytes that an op must move: ``traffic`` counts different
ones, which DRAM must give, ``asked`` each as often as a warp asks for it."""

ASKED_AGAIN = {
    "spatial_attention forward": "each block of queries reads K and V, from the L2 cache",
    "corrupt_tokens forward": "positions and tokens are read for three branches, from the L2 cache",
    "corrupt_tokens backward": "a token's flag is read for every block of its channels",
    "warp_clips forward": "a crop's pixel is mixed from four of the frame, each of 3 bytes",
}
"""Ops that ask for more, and why; their budgets hold how much."""


@pytest.mark.parametrize(("op", "direction", "arch"), gate.TRITON.cases)
def test_budgets_are_kept(op: str, direction: str, arch: int) -> None:
    now = gate.measured(gate.TRITON, op, direction, arch)
    sectors = now[f"{op} {direction} sm_{arch}"]
    assert sectors["traffic"] <= SECTORS
    assert sectors["asked"] <= SECTORS or f"{op} {direction}" in ASKED_AGAIN
    if gate.has_their_triton():
        gate.check(op, now, gate.TRITON.read())


def test_every_kernel_is_gated() -> None:
    assert set(gate.TRITON.directions) == set(compile_check.OPS)
    assert gate.strangers(gate.TRITON) == []


def test_options_of_temporal_attention_cost_little() -> None:
    """Of whole clips, at B = 8. With lengths the estimate is at most 3 % longer; the instructions,
    of which an RTX 4090 could issue ten times as many meanwhile, are at most 10 % more."""
    qkv = torch.zeros(8, 3, 207, 3, 12, 64, dtype=torch.bfloat16)
    lengths = torch.full((8,), 3)

    def counted(**options: Any) -> list[counts.Counts]:
        forward = counts.counts_of_call(lambda: temporal_attention.forward(qkv, **options), 89)
        grad = qkv[:, :, :, 0].contiguous()
        return forward + counts.counts_of_call(
            lambda: temporal_attention.backward(grad, qkv, **options), 89
        )

    def estimate(one: counts.Counts) -> float:
        return model.profile([one], BY_ARCH[89], "bfloat16", 0).estimate_us

    without = counted()
    for used, most in (({"lengths": lengths}, 1.10), ({"causal": True}, 0.85)):
        for one, plain in zip(counted(**used), without, strict=True):
            moved, needed = (n.distinct_read + n.distinct_written for n in (one, plain))
            assert moved <= 1.001 * needed
            assert sum(one.instructions.values()) <= most * sum(plain.instructions.values())
            assert estimate(one) <= 1.03 * estimate(plain)


@pytest.mark.skipif(
    not gate.has_their_triton(), reason=f"the budgets are of Triton {gate.MADE_WITH}'s code"
)
def test_options_of_spatial_attention_cost_little() -> None:
    """Of whole frames: at most 3 % more instructions than the budgets have; q, k and v of their
    own strides too, without lengths and with them."""
    qkv, grad = (torch.zeros(4, 3, 207, *n, 12, 64, dtype=torch.bfloat16) for n in ([3], []))
    lse, options = torch.zeros(4, 3, 12, 207), (None, None, torch.full((4, 3), 207), -0.3)

    def both() -> None:
        spatial_attention.forward(qkv, *options)
        spatial_attention.backward(grad, qkv, grad, lse, *options, lse)

    every = list(zip(counts.counts_of_call(both, 89), ("forward", "backward"), strict=True))
    for used in (["strides"], ["strides", "lengths", "scale"]):
        counted = counts.counts_of_op(
            "spatial_attention", 89, {"B": 2}, "forward", backend="triton", options=used
        )
        every += [(one, "forward") for one in counted]
    budgets = gate.TRITON.read()
    for one, way in every:
        budget = budgets[f"spatial_attention {way} sm_89 {one.kernel}"]
        assert gate.figures(one)["instructions"] <= 1.03 * budget["instructions"]
        assert gate.figures(one)["blocks an SM"] >= budget["blocks an SM"]


@pytest.mark.parametrize(
    ("figure", "by"),
    [
        ("instructions", 1.02),
        ("memory instructions", 1.02),
        ("bank conflicts", 1.02),
        ("registers", 1.02),
        ("narrow accesses", 1.1),
        ("sectors asked for", 1.02),
        ("blocks an SM", 0.5),
        ("bytes in flight", 0.98),
    ],
)
def test_what_is_worse_is_named(figure: str, by: float) -> None:
    line = "spatial_attention backward sm_89 spatial_attention_backward_dkv"
    budgets = gate.TRITON.read()
    now = {line: {**budgets[line], figure: budgets[line][figure] * by}}
    [found] = gate.worse(now, budgets)
    assert found.startswith(f"{line}: ")
    assert f" {figure}, budget " in found
    assert found.endswith(f", {100 * (by - 1):+.1f} %")
    better = {line: {**budgets[line], figure: budgets[line][figure] * (2 - by)}}
    assert gate.worse(better, budgets) == []


def test_traffic_and_kernels_without_a_budget_are_named() -> None:
    budgets = gate.TRITON.read()
    line = "temporal_attention forward sm_90"
    assert gate.worse({line: {"traffic": 1.04}, "new": {}}, budgets) == [
        f"{line}: asked was not counted",
        f"{line}: 1.04 traffic, budget 1, +4.0 %",
        "new: has no budget",
    ]


# -- planted in the code --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def launched() -> launch.Launch:
    """Spatial attention's forward pass on sm_90, for 207 tokens of 64 channels."""
    qkv = torch.empty(32, 3, 207, 3, 12, 64, dtype=torch.bfloat16, device="meta")
    with launch.recording(90) as launches:
        spatial_attention.forward(qkv)
    return launches[0]


@pytest.fixture(scope="module")
def forward(launched: launch.Launch) -> str:
    """Its PTX."""
    return triton_kernels.of(launched).code(90).ptx


def without(ptx: str, pattern: str) -> list[str]:
    """The code with one of the lines that match left out, for each."""
    found = re.finditer(pattern, ptx, re.M)
    return [ptx[: match.start()] + ptx[match.end() :] for match in found]


def test_a_product_that_waits_for_the_one_before_is_caught(forward: str) -> None:
    assert ptx_gates.warnings(forward) == []
    last = forward.rindex("wgmma.commit_group")
    end = forward.index(";", last) + 1
    accumulator = re.findall(r"m64n64k16\S+ \{(%r\d+),", forward[:last])[-1]
    planted = (
        f"{forward[:end]}\nadd.f32 {accumulator}, {accumulator}, {accumulator};{forward[end:]}"
    )
    [warning] = ptx_gates.warnings(planted)
    assert warning.startswith("(C75")


@pytest.mark.parametrize(
    ("opcode", "operands"),
    [
        ("IADD3", "R90, R1, 0x1, RZ"),
        ("LDS.64", "R88, [R4]"),
        ("LDSM.16.M88.4", "R86, [R4]"),
        ("IMAD.WIDE", "R87, R4, 0x4, R6"),
    ],
)
def test_a_register_that_is_reused_before_the_wait_is_caught(opcode: str, operands: str) -> None:
    product = "R24, R88, gdesc[UR8].tnspB, R24, gsb0"
    wgmma = sass.Instruction("HGMMA.64x64x16.F32.BF16", product, False)
    wait = sass.Instruction("WARPGROUP.DEPBAR.LE", "gsb0, 0x0", False)
    early = sass.Instruction(opcode, operands, False)
    kept = sass.Instruction(opcode, operands.replace("R8", "R3").replace("R90", "R30"), False)
    assert ptx_gates.reused([sass.Block([wgmma, kept, wait, early])]) == []
    problems = ptx_gates.reused([sass.Block([wgmma, early]), sass.Block([wait])])
    assert f"{opcode} {operands} over what HGMMA {product} may still read" in problems


def test_what_another_group_overwrites_is_caught(launched: launch.Launch, forward: str) -> None:
    """The loop without its barrier: copies go where the other four warps' wgmma still read."""

    def caught(ptx: str) -> list[str]:
        return compile_check.first_block(
            launched, 90, lambda one: replace(triton_kernels.of(one).code(90), ptx=ptx)
        )

    assert caught(forward) == []
    found = [caught(ptx) for ptx in without(forward, r"^\s*bar\.sync[^;]*;")]
    over = [one for one in found if one and "copy over what a wgmma may still read" in one[0]]
    assert over, found


def test_a_wait_that_leaves_nothing_under_way_is_caught(forward: str) -> None:
    assert ptx_gates.ahead(forward) == 1.0
    emptied = re.sub(r"cp\.async\.wait_group\s+\d+", "cp.async.wait_group 0", forward)
    share = ptx_gates.ahead(emptied)
    assert share is not None
    assert share < AHEAD
