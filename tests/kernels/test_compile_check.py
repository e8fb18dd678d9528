"""Every shipped kernel compiles for every card that is supported, and fits it.

Kernels are compiled for real, by subprocesses: this process runs Triton's interpreter. What has
been compiled before comes from Triton's cache.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest

from cmpose.kernels import configs
from cmpose.kernels.configs import Lines, c
from tests.fuzz.conftest import FACTOR
from tests.kernels import gate
from tests.kernels.compile_check import ARCHS, LOOP_ARCHS, LOOPS, OPS, Compiled
from tests.shared_data import PROJECT

SHARED = {80: 166_912, 89: 101_376, 90: 232_448, 120: 101_376}
"""Bytes of shared memory that a block may have: A100, RTX 4090, H100 and H200, RTX 5090."""

REGISTERS = 65_536
"""Registers of an SM; a block's must fit."""


class Limit(NamedTuple):
    """What a kernel may need at most over all its cases and cards.

    Attributes:
        registers: a thread.
        shared: bytes a block.
        mma: whether tensor cores do its products in float16 and bfloat16. In float32 none does:
            they would round to TF32.
    """

    registers: int
    shared: int
    mma: bool = False


LIMITS = {
    "temporal_attention.temporal_attention_rows_forward": Limit(96, 0),
    "temporal_attention.temporal_attention_rows_backward": Limit(251, 0),
    "temporal_attention.temporal_attention_tile_forward": Limit(126, 49152, mma=True),
    "temporal_attention.temporal_attention_tile_backward": Limit(176, 69632, mma=True),
    "spatial_attention.spatial_attention_forward": Limit(200, 88064, mma=True),
    "spatial_attention.spatial_attention_backward_dq": Limit(226, 65536, mma=True),
    "spatial_attention.spatial_attention_backward_dkv": Limit(255, 143488, mma=True),
    "corrupt_tokens.forward_kernel": Limit(110, 0),
    "corrupt_tokens.backward_kernel": Limit(128, 128),
    "corrupt_tokens.keypoints_kernel": Limit(58, 0),
    "reconstruction_loss.forward_kernel": Limit(96, 4096),
    "reconstruction_loss.scale_kernel": Limit(74, 0),
    "heatmap_loss.forward_kernel": Limit(64, 8192),
    "heatmap_loss.scale_kernel": Limit(40, 0),
    "reduce.block_sums_kernel": Limit(43, 128),
    "reduce.finish_kernel": Limit(64, 64),
    "warp_clips._warp_clips": Limit(96, 0),
    "warp_clips._warp_clips sm_90": Limit(157, 0),
}
"""Of a kernel on all cards but those with a line of their own, as Triton 3.7 compiles them. Another
version's kernels must fit the cards and not spill."""

if not gate.has_their_triton():
    LIMITS = {
        kernel: limit._replace(registers=255, shared=max(SHARED.values()))
        for kernel, limit in LIMITS.items()
    }

SPILLS = (
    {
        ("spatial_attention.spatial_attention_backward_dkv", 89): 16,
        ("temporal_attention.temporal_attention_tile_backward", 89): 8,
    }
    if version("triton").startswith("3.6.")
    else {}
)
"""Kernel and card → bytes that a thread spills in Triton 3.6's code, in cases that docs/versions.md
names."""

AHEAD = 0.4
"""The least share of a loop's matrix products behind which the next tile is being copied; half of
the whole backward's come before its copies."""

BEHIND = {
    ("spatial_attention_backward_dkv", "80 89 120", "S (49|128|207) d (32|64|128)"): (
        0.2,
        "the copies stand behind dV of the round's five products",
    ),
    ("spatial_attention_backward_dkv", "80 89 120", "S 207 d 80"): (0.0, "no registers for stages"),
    ("spatial_attention_backward_dkv", "120", "d (80|96|128)"): (0.0, "two stages spill"),
    ("spatial_attention_backward_dkv", "90", "S 4096 d|S 207 d 128|options S 207 d 80"): (
        0.0,
        "a third stage costs a block an SM",
    ),
    ("spatial_attention_backward_dq", "89 90 120", "d (80|96|128)"): (0.0, "two stages, as tuned"),
    ("spatial_attention_forward", "80 89 90 120", "^sliced"): (
        0.0,
        "rows that are no multiple of 16 bytes cannot be copied asynchronously",
    ),
}
"""Kernel, cards and cases that may be under :data:`AHEAD` → their least, and why; docs/profile.md
says what would mend it."""

SLACK = Limit(16, 1024)
"""A limit may be this far above the largest need, so that a change does not go unnoticed."""

HALVES = ((89,), (80, 90, 120))
"""One process compiles all ops for these: it takes longer to start than most ops do."""


class Report(NamedTuple):
    """What the compile check found for an op: see ``tests.kernels.compile_check``."""

    compiled: list[Compiled]
    reached: set[tuple[str, str, int]]
    unpinned: list[str]
    summary: list[str]


@contextmanager
def check(
    ops: list[str], archs: tuple[int, ...], folder: Path
) -> Iterator[Callable[[str], Report]]:
    """Runs the compile check on ops, in a process of its own; op → its report, once it is there."""
    command = [sys.executable, "-m", "tests.kernels.compile_check", *ops, "--json", str(folder)]
    for arch in archs:
        command += ["--arch", str(arch)]
    if FACTOR > 1:
        command.append("--every")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    with (folder / "printed").open("w") as printed:
        process = subprocess.Popen(
            command,
            cwd=PROJECT,
            env=environment | {"OMP_NUM_THREADS": "1"},
            stdout=printed,
            stderr=subprocess.STDOUT,
        )

    def report(op: str) -> Report:
        path = folder / f"{op}.json"
        while process.poll() is None and not path.exists():
            time.sleep(0.05)
        assert path.exists(), (folder / "printed").read_text()[-6000:]
        read = json.loads(path.read_text())
        return Report(
            [Compiled(**row | {"wrong": tuple(row["wrong"])}) for row in read["compiled"]],
            {tuple(line) for line in read["reached"]},  # type: ignore[misc]
            read["unpinned"],
            [read["summary"]],
        )

    try:
        yield report
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def reports(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], Report]]:
    """Op → its report. Two processes compile what tests ask for."""
    items = [i for i in request.session.items if "reports" in getattr(i, "fixturenames", ())]
    specs = [getattr(i, "callspec", None) for i in items]
    requested = {op for spec in specs for op in ([spec.params["op"]] if spec else OPS)}
    ops = [op for op in OPS if op in requested]  # as the tests ask for them

    with ExitStack() as stack:
        halves = [
            stack.enter_context(check(ops, archs, tmp_path_factory.mktemp("compile_check")))
            for archs in HALVES
        ]

        def report(op: str) -> Report:
            parts = [half(op) for half in halves]
            return Report(
                [row for part in parts for row in part.compiled],
                set().union(*(part.reached for part in parts)),
                [kernel for part in parts for kernel in part.unpinned],
                [line for part in parts for line in part.summary],
            )

        yield report


def least_ahead(row: Compiled) -> float:
    """What :data:`AHEAD` and :data:`BEHIND` ask of a kernel that multiplies matrices in a loop."""
    allowed = [
        least
        for (kernel, archs, cases), (least, _) in BEHIND.items()
        if row.kernel.endswith(f".{kernel}")
        and str(row.arch) in archs.split()
        and re.search(cases, row.case)
    ]
    return min(allowed, default=AHEAD)


def line_of(row: Compiled, limits: dict[str, Limit]) -> str:
    """Which of the limits a kernel has on a card."""
    of_card = f"{row.kernel} sm_{row.arch}"
    return of_card if of_card in limits else row.kernel


def findings(rows: Iterable[Compiled], limits: dict[str, Limit]) -> list[str]:
    """What is wrong with compiled kernels, a line each."""
    problems = []
    for row in rows:
        limit = limits.get(line_of(row, limits))
        checks = {
            f"does not compile: {row.error}": bool(row.error),
            "has no line in LIMITS": limit is None,
            f"spills: {row.stack} bytes of stack": (
                row.stack > SPILLS.get((row.kernel, row.arch), 0)
            ),
            f"shared memory {row.shared} > {SHARED[row.arch]} of the card": (
                row.shared > SHARED[row.arch]
            ),
            f"{row.registers} registers × {32 * row.warps} threads > {REGISTERS}": (
                row.registers * 32 * row.warps > REGISTERS
            ),
        }
        if limit is not None and not row.error:
            checks |= {
                f"{row.registers} registers > {limit.registers}": row.registers > limit.registers,
                f"shared memory {row.shared} > {limit.shared}": row.shared > limit.shared,
                f"a tile is copied ahead of {row.ahead} of the products": (
                    row.half and row.ahead is not None and row.ahead < least_ahead(row)
                ),
                "does not use tensor cores": limit.mma and row.half and not row.mma,
                "uses tensor cores": row.mma and not (limit.mma and row.half),
            }
        checks |= dict.fromkeys(row.wrong, True)
        problems += [
            f"sm_{row.arch} {row.kernel} ({row.case}): {w}" for w, bad in checks.items() if bad
        ]
    return problems


def unreached(table: dict[str, Lines], reached: set[tuple[str, str, int]]) -> list[str]:
    """Entries of a configuration table that no lookup found."""
    entries = [
        (kernel, repr(variant), arch)
        for kernel, lines in table.items()
        for variant, entry in lines.items()
        for arch in entry
    ]
    return [
        f"{kernel}, variant {variant}, {arch}"
        for kernel, variant, arch in entries
        if (kernel, variant, arch) not in reached
    ]


def loose(rows: Iterable[Compiled], limits: dict[str, Limit]) -> list[str]:
    """Limits that stand more than SLACK above what is needed, or that nothing has."""
    rows = list(rows)
    problems = []
    for kernel, limit in limits.items():
        own = [row for row in rows if line_of(row, limits) == kernel]
        if not own:
            problems.append(f"{kernel}: no case launches it")
            continue
        registers, shared = max(r.registers for r in own), max(r.shared for r in own)
        if registers + SLACK.registers < limit.registers or shared + SLACK.shared < limit.shared:
            problems.append(f'"{kernel}": needs Limit({registers}, {shared}), has {limit}')
    return problems


def test_every_op_with_kernels_has_cases() -> None:
    launchers = {
        path.stem
        for path in (PROJECT / "kernels").glob("*.py")
        if re.search(r"^def forward\(", path.read_text(), re.MULTILINE)
    }
    assert launchers == set(OPS)


@pytest.mark.parametrize("op", OPS)
def test_compiles_and_fits(
    op: str,
    reports: Callable[[str], Report],
    record_property: Callable[[str, object], None],
) -> None:
    report = reports(op)
    for line in report.summary:
        record_property("compiled", line)
    assert {row.arch for row in report.compiled} == set(ARCHS)
    wrong = findings(report.compiled, LIMITS)
    assert not wrong, "\n".join(wrong)
    if gate.has_their_triton():  # whose loops the budgets are of
        gate.check(op, gate.static_lines(op, report.compiled), gate.read(gate.LOOPS))
    assert not report.unpinned, f"launched past the table of configurations: {report.unpinned}"


def test_every_configuration_is_compiled(reports: Callable[[str], Report]) -> None:
    reached = set().union(*(reports(op).reached for op in OPS))
    missing = unreached(configs.CONFIGS, reached)
    assert not missing, "no case reaches\n" + "\n".join(missing)


@pytest.mark.skipif(
    not gate.has_their_triton(), reason=f"the limits are those of Triton {gate.MADE_WITH}"
)
def test_limits_are_tight(reports: Callable[[str], Report]) -> None:
    wrong = loose([row for op in OPS for row in reports(op).compiled], LIMITS)
    assert not wrong, "\n".join(wrong)


# -- what is planted is caught --------------------------------------------------------------------

PLANTED_CASES = "tests.kernels.planted"
PLANTED = {
    f"{PLANTED_CASES}.{name}": limit
    for name, limit in {
        "harmless_kernel": Limit(32, 0),
        "spilling_kernel": Limit(255, 0),
        "product_kernel": Limit(255, 200_000, mma=True),
    }.items()
}


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Report:
    with check([PLANTED_CASES], (89,), tmp_path_factory.mktemp("planted")) as report:
        return report(PLANTED_CASES)


def found_in(report: Report, case: str, limits: dict[str, Limit] = PLANTED) -> list[str]:
    rows = [row for row in report.compiled if row.case == case]
    assert len(rows) == 1
    return [line.partition("): ")[2] for line in findings(rows, limits)]


def test_a_planted_spill_is_caught(planted: Report) -> None:
    [line] = found_in(planted, "spills")
    assert line.startswith("spills: ")


def test_planted_shared_memory_is_caught(planted: Report) -> None:
    [line] = found_in(planted, "shared")
    assert line == "shared memory 196608 > 101376 of the card"
    [row] = [row for row in planted.compiled if row.case == "shared"]
    assert findings([replace(row, arch=90)], PLANTED) == []


def test_a_planted_compile_error_is_caught(planted: Report) -> None:
    error, limit = found_in(planted, "does not compile")
    assert error.startswith("does not compile: CompilationError")
    assert limit == "has no line in LIMITS"


def test_planted_tensor_cores_are_caught(planted: Report) -> None:
    """Where they would round float32 to TF32, and where they are expected and not used."""
    assert found_in(planted, "tensor cores round") == ["uses tensor cores"]
    harmless = "tests.kernels.planted.harmless_kernel"
    assert found_in(planted, "harmless") == []
    [line] = found_in(planted, "harmless", {harmless: Limit(32, 0, mma=True)})
    assert line == "does not use tensor cores"


def test_a_kernel_over_its_limits_is_caught(planted: Report) -> None:
    [row] = [row for row in planted.compiled if row.case == "shared"]
    [line] = found_in(planted, "shared", {row.kernel: Limit(row.registers - 1, 200_000, True)})[1:]
    assert line == f"{row.registers} registers > {row.registers - 1}"
    lines = found_in(planted, "shared", {row.kernel: Limit(row.registers, row.shared - 1, True)})
    assert lines[-1] == f"shared memory {row.shared} > {row.shared - 1}"


def test_a_block_with_too_many_registers_is_caught() -> None:
    row = Compiled("a.kernel", "case", 90, warps=16, registers=160)
    [line] = findings([row], {"a.kernel": Limit(255, 0)})
    assert line.endswith("160 registers × 512 threads > 65536")


def test_a_limit_of_one_card_is_of_no_other() -> None:
    on_90, on_89 = (Compiled("a.kernel", "case", arch, 4, registers=99) for arch in (90, 89))
    limits = {"a.kernel": Limit(96, 0), "a.kernel sm_90": Limit(99, 0)}
    [line] = findings([on_90, on_89], limits)
    assert line == "sm_89 a.kernel (case): 99 registers > 96"
    assert loose([on_90, on_89], {**limits, "a.kernel sm_90": Limit(140, 0)}) != []


def test_what_the_code_does_wrong_is_found() -> None:
    """Its planted faults are in tests/kernels/test_gate.py."""
    row = Compiled("a.kernel", "case", 90, 4, half=True, mma=True, ahead=0.4)
    limits = {"a.kernel": Limit(255, 0, mma=True)}
    assert findings([row], limits) == []
    [line] = findings([replace(row, ahead=0.2)], limits)
    assert line.endswith("a tile is copied ahead of 0.2 of the products")
    [line] = findings([replace(row, wrong=("(C7515) serialized",))], limits)
    assert line.endswith("(C7515) serialized")
    kernel = "x.spatial_attention_backward_dkv"
    allowed = replace(row, kernel=kernel, arch=89, case="S 207 d 64 bfloat16", ahead=0.2)
    assert least_ahead(allowed) == 0.2
    assert least_ahead(replace(allowed, arch=90)) == AHEAD


def test_the_budgets_of_loops() -> None:
    """Every case of the reference shape has one, on every card; what is worse is named."""
    budgets = gate.read(gate.LOOPS)
    lines = {f"{op} {case} sm_{arch}" for op in OPS for case in LOOPS[op] for arch in ARCHS}
    assert {line.rpartition(" ")[0] for line in budgets} == lines
    name = "spatial_attention.spatial_attention_forward"
    [case] = LOOPS["spatial_attention"]
    for arch in LOOP_ARCHS:
        line = f"spatial_attention {case} sm_{arch} {name}"
        loop = {pipe.partition(" ")[0]: n for pipe, n in budgets[line].items() if "loop" in pipe}
        worse = {**loop, "mufu": 2 * loop["mufu"]}
        row = Compiled(name, case, arch, warps=8, registers=255, shared=60_000, loop=worse)
        problems = gate.worse(gate.static_lines("spatial_attention", [row]), budgets)
        assert any(" mufu in the loop, budget " in one for one in problems), problems


def test_blocks_an_sm_are_held() -> None:
    row = Compiled("a.kernel", "bfloat16 by float64", 89, warps=4, registers=64)
    line = "warp_clips bfloat16 by float64 sm_89 a.kernel"
    budgets = gate.static_lines("warp_clips", [row])
    assert budgets == {line: {"blocks an SM": 8}}
    slower = gate.static_lines("warp_clips", [replace(row, registers=72)])
    assert gate.worse(slower, budgets) == [f"{line}: 7 blocks an SM, budget 8, -12.5 %"]


def test_a_launch_past_the_table_is_caught(planted: Report) -> None:
    assert len(planted.unpinned) == 4
    assert planted.reached == set()


def test_a_planted_unreachable_configuration_is_caught() -> None:
    table: dict[str, Lines] = {
        "used": {None: {80: c(), 90: c()}, "wide": {80: c()}},
        "unused": {64: {80: c()}},
    }
    reached: set[tuple[str, str, int]] = {("used", "None", 80), ("used", "'wide'", 80)}
    assert unreached(table, reached) == ["used, variant None, 90", "unused, variant 64, 80"]


def test_a_loose_limit_is_caught() -> None:
    rows = [Compiled("a.kernel", "case", 90, 4, registers, 0, 512) for registers in (40, 50)]
    assert loose(rows, {"a.kernel": Limit(66, 1024)}) == []
    [line] = loose(rows, {"a.kernel": Limit(67, 1024)})
    assert line.startswith('"a.kernel": needs Limit(50, 512)')
    assert len(loose(rows, {"a.kernel": Limit(66, 2048)})) == 1
    assert loose(rows, {"a.kernel": Limit(66, 1024), "b.kernel": Limit(9, 9)}) == [
        "b.kernel: no case launches it"
    ]


def test_equal_launches_compile_once(tmp_path: Path) -> None:
    """Launches that differ only by case share one compiled kernel."""
    with check([PLANTED_CASES], (89, 89), tmp_path) as report_of:
        report = report_of(PLANTED_CASES)
    assert len(report.compiled) == 10
    assert "10 launches, 5 kernels compiled" in report.summary[0]
