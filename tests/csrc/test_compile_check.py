"""Every CUDA C++ kernel compiles for every card that is supported, fits it, and does not spill."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from csrc import build
from tests.csrc import compile_check
from tests.csrc.compile_check import ARCHS, Report, Row
from tests.kernels import gate
from tests.ptx_on_cpu import machine

SHARED = {80: 166_912, 89: 101_376, 90: 232_448, 120: 101_376}
"""Bytes of shared memory that a block may have: A100, RTX 4090, H100 and H200, RTX 5090."""

LIMITS = {
    "dpc_knn.center_tokens": 80,
    "dpc_knn.cluster_clip": 128,
    "dpc_knn.density_rows": 72,
    "dpc_knn.distance_pass": 240,
    "dpc_knn.find_among_nearest": 64,
    "dpc_knn.finish_clip": 96,
    "dpc_knn.gram_clip": 152,
    "dpc_knn.merge_neighbors": 48,
    "dpc_knn.neighbor_tiles": 240,
    "dpc_knn.rank_centers": 40,
    "dpc_knn.search_rows": 250,
    "dpc_knn.settle_rows": 40,
    "merge_clusters.mark_clips": 32,
    "merge_clusters.merge_backward": 64,
    "merge_clusters.order_clips": 32,
    "merge_clusters.sum_kernel": 80,
    "select_tokens.select_backward": 80,
    "select_tokens.select_forward": 104,
    "spatial_attention.spatial_attention_forward": 255,
    "spatial_attention_backward.attention_backward": 255,
    "unmerge_tokens.gather_causal": 72,
    "unmerge_tokens.unmerge_forward": 56,
}
"""Kernel → registers a thread that it may need, over all cards; a line without template arguments,
or with the first ones, stands for all that begin so (``compile_check.matches``).

As nvcc 13.0 compiles them; another version's kernels must not spill and must fit the cards.
"""

SLACK = 16
"""A limit may be this far above the largest need, so that a change does not go unnoticed."""

STACK: dict[str, tuple[int, str]] = {}
"""Kernel → bytes of stack that it may have, and why; other kernels must have none."""


def findings(
    rows: list[Row],
    limits: dict[str, int],
    stack: dict[str, tuple[int, str]],
    dynamic: dict[str, int],
) -> list[str]:
    """What is wrong with compiled kernels, a line each.

    Args:
        rows: of the report.
        limits: as :data:`LIMITS`.
        stack: as :data:`STACK`.
        dynamic: kernel → bytes of dynamic shared memory.
    """
    problems = []
    for row in rows:
        line = compile_check.line_for(row.kernel, limits)
        limit = 255 if line is None else limits[line]
        shared = row.shared + compile_check.dynamic_of(row, dynamic)
        excuse = compile_check.line_for(row.kernel, stack)
        stack_limit = 0 if excuse is None else stack[excuse][0]
        checks = {
            "has no line in LIMITS": line is None,
            f"{row.registers} registers > {limit}": row.registers > limit,
            f"spills: {row.spill_stores} bytes stored, {row.spill_loads} loaded": (
                row.spill_stores + row.spill_loads > 0
            ),
            f"{row.stack} bytes of stack > {stack_limit}": row.stack > stack_limit,
            f"shared memory {shared} > {SHARED[row.arch]} of the card": shared > SHARED[row.arch],
        }
        problems += [f"sm_{row.arch} {row.kernel}: {what}" for what, bad in checks.items() if bad]
    kernels = {row.kernel for row in rows}
    names = {row.name for row in rows}
    for table, lines, known in (
        ("LIMITS", limits, kernels),
        ("STACK", stack, kernels),
        ("shared_memory()", dynamic, names),
    ):
        strangers = [n for n in lines if not any(compile_check.matches(n, k) for k in known)]
        problems += [f"{table} has {name}, which is no kernel" for name in sorted(strangers)]
    return problems


def loose(rows: list[Row], limits: dict[str, int]) -> list[str]:
    """Limits that stand too far above what any kernel needs."""
    most: dict[str, int] = {}
    for row in rows:
        line = compile_check.line_for(row.kernel, limits)
        if line is not None:
            most[line] = max(most.get(line, 0), row.registers)
    return [
        f"{line}: {limits[line]} registers, {needed} needed at most"
        for line, needed in most.items()
        if limits[line] > needed + SLACK
    ]


@pytest.fixture(scope="module")
def plan():
    compile_check.require_nvcc()
    return compile_check.plan_for(ARCHS)


@pytest.fixture(scope="module")
def report(plan) -> Report:
    return compile_check.compile_all(plan)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Report:
    compile_check.require_nvcc()
    folder = tmp_path_factory.mktemp("planted")
    return compile_check.compile_all(
        compile_check.plan_for((89,), source=Path(__file__).parent / "planted", folder=folder)
    )


def test_every_kernel_fits_every_card(report: Report, plan, record_property) -> None:
    for line in compile_check.summary(report.rows):
        record_property("compiled", line)
    for kernel in {row.kernel for row in report.rows}:
        assert {row.arch for row in report.rows if row.kernel == kernel} == set(ARCHS), kernel
    limits = LIMITS
    if plan.nvcc.version != "13.0":
        limits = dict.fromkeys(LIMITS, 255)
    assert findings(report.rows, limits, STACK, compile_check.dynamic_shared_memory(plan)) == []


def test_the_limits_are_close(report: Report, plan) -> None:
    if plan.nvcc.version != "13.0":
        pytest.skip(f"the limits are for nvcc 13.0, this is {plan.nvcc.version}")
    assert loose(report.rows, LIMITS) == []


def test_blocks_an_sm(report: Report, plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every launch of the reference shape, on every card; a kernel that needs more is named."""
    if plan.nvcc.version != "13.0":
        pytest.skip(f"the budgets are for nvcc 13.0, this is {plan.nvcc.version}")
    if machine.compiler() is None:
        pytest.skip("needs g++")
    if torch.cuda.is_available():
        pytest.skip("launches are seen in a run on the CPU; here tests run on a GPU")
    budgets, now = gate.read(gate.BLOCKS), gate.cuda_lines(report.rows)
    assert set(now) == set(budgets)
    for op in gate.CUDA.directions:
        lines = {line: row for line, row in now.items() if line.startswith(f"{op} ")}
        assert {line.split()[2] for line in lines} == {f"sm_{arch}" for arch in ARCHS}
        gate.check(op, lines, budgets)
    one = replace(gate.CUDA, directions={"select_tokens": ("forward",)})
    monkeypatch.setattr(gate, "CUDA", one)
    problems = gate.worse(
        gate.cuda_lines([replace(row, shared=150_000) for row in report.rows]), budgets
    )
    assert any("sm_89" in line and " blocks an SM, budget 1, -100.0 %" in line for line in problems)


def test_the_core_stays_small(report: Report, plan) -> None:
    """At most 8 MB, of which CUDA's runtime, the C++ library and the bindings take up to 2.

    The code of four architectures with the sources' lines and PTX is what is compiled here: each
    source's object is larger than with the five architectures of a wheel, which has no lines.
    """
    assert plan.line_info
    assert sum(path.stat().st_size for path in plan.objects) < 6_000_000


def test_nothing_is_warned_of(report: Report) -> None:
    assert report.warnings == []


def test_a_second_run_compiles_nothing(report: Report, plan, capsys) -> None:
    """It reads the same from the reports of the first run."""
    assert compile_check.compile_all(plan) == report
    assert "nvcc" not in capsys.readouterr().out


def test_ptx_is_kept_with_the_sources_that_it_was_made_of(tmp_path: Path) -> None:
    """Gates take it in place of compiling anew, unless a source or header has changed."""
    compile_check.require_nvcc()
    source, header = tmp_path / "one.cu", tmp_path / "one.cuh"
    header.write_text("constexpr float kValue = 1.f;\n")
    source.write_text('#include "one.cuh"\n__global__ void one(float* out) { *out = kValue; }\n')
    plan = compile_check.plan_for((80, 89, 120), source=tmp_path, folder=tmp_path / "build")
    rows = compile_check.compile_all(plan).rows
    # While another process still keeps what it has compiled, a second one waits.
    with ThreadPoolExecutor(1) as pool, build.locked(plan.folder / "ptx"):
        second = pool.submit(compile_check.compile_all, plan)
        assert not wait([second], 0.5).done
    assert second.result().rows == rows
    for arch in (80, 89, 120):
        ptx = compile_check.kept_ptx(plan, source, arch)
        assert ptx is not None
        assert f".target sm_{arch}\n" in ptx.read_text()
    assert compile_check.kept_ptx(plan, source, 90) is None
    header.write_text("constexpr float kValue = 2.f;\n")
    assert compile_check.kept_ptx(plan, source, 89) is None


# -- the check itself --

PLANTED_LIMITS = {
    "planted.modest_kernel": 32,
    "planted.spilling_kernel": 64,
    "planted.hungry_kernel": 96,
    "planted.stack_kernel": 64,
    "planted.calling_kernel": 64,
    "planted.helper": 0,
}


def test_planted_kernels_are_refused(planted: Report) -> None:
    problems = findings(planted.rows, PLANTED_LIMITS, {}, {})
    rows = {row.name.partition("<")[0]: row for row in planted.rows}
    spilling, hungry, stack = rows["spilling_kernel"], rows["hungry_kernel"], rows["stack_kernel"]
    assert stack.kernel == "planted.stack_kernel<64>"
    assert spilling.registers <= 64
    assert hungry.spill_stores == 0
    assert sorted(problems) == sorted(
        [
            f"sm_89 planted.spilling_kernel: spills: {spilling.spill_stores} bytes stored, "
            f"{spilling.spill_loads} loaded",
            f"sm_89 planted.spilling_kernel: {spilling.stack} bytes of stack > 0",
            f"sm_89 planted.hungry_kernel: {hungry.registers} registers > 96",
            "sm_89 planted.stack_kernel<64>: 256 bytes of stack > 0",
            f"sm_89 planted.calling_kernel: {rows['calling_kernel'].stack} bytes of stack > 0",
        ]
    )
    assert spilling.spill_stores > 0
    assert rows["calling_kernel"].stack >= 128


def test_what_is_allowed_passes(planted: Report) -> None:
    modest = [row for row in planted.rows if row.kernel == "planted.modest_kernel"]
    limits = {"planted.modest_kernel": 32}
    assert modest[0].shared == 4096
    assert findings(modest, limits, {}, {"modest_kernel": 101_376 - 4096}) == []
    assert findings(modest, limits, {}, {"modest_kernel": 101_377 - 4096}) == [
        "sm_89 planted.modest_kernel: shared memory 101377 > 101376 of the card"
    ]
    stack = [row for row in planted.rows if row.kernel == "planted.stack_kernel<64>"]
    allowed = {"planted.stack_kernel": (256, "planted")}
    assert findings(stack, {"planted.stack_kernel": 64}, allowed, {}) == []


def test_lines_of_no_kernel_are_found(planted: Report) -> None:
    modest = [row for row in planted.rows if row.kernel == "planted.modest_kernel"]
    assert findings(modest, {"planted.gone_kernel": 32}, {"other": (8, "")}, {"old_kernel": 8}) == [
        "sm_89 planted.modest_kernel: has no line in LIMITS",
        "LIMITS has planted.gone_kernel, which is no kernel",
        "STACK has other, which is no kernel",
        "shared_memory() has old_kernel, which is no kernel",
    ]


def test_lines_with_some_template_arguments(planted: Report) -> None:
    row = replace(planted.rows[0], kernel="a.f<float, 8>", registers=40, shared=0, stack=0)
    other = replace(row, kernel="a.f<fp16, 8>", registers=90)
    limits = {"a.f<float>": 40, "a.f": 90, "a.f<float, 80>": 1}
    dynamic = {"f<float, 8>": 101_376, "f<fp16>": 101_377}
    assert findings([row, other], limits, {}, dynamic) == [
        "sm_89 a.f<fp16, 8>: shared memory 101377 > 101376 of the card",
        "LIMITS has a.f<float, 80>, which is no kernel",
    ]
    assert loose([row, other], {"a.f<float>": 57, "a.f": 106}) == [
        "a.f<float>: 57 registers, 40 needed at most"
    ]


def test_a_loose_limit_is_found(planted: Report) -> None:
    row = replace(planted.rows[0], kernel="a.b_kernel", registers=40)
    assert loose([row], {"a.b_kernel": 56}) == []
    assert loose([row], {"a.b_kernel": 57}) == ["a.b_kernel: 57 registers, 40 needed at most"]


def test_a_report_that_cannot_be_read_is_an_error() -> None:
    with pytest.raises(AssertionError, match="of 0 kernels 0 could be read"):
        compile_check.parse("planted", "ptxas info    : 0 bytes gmem")
    report = "ptxas info    : Compiling entry function '_Z1fv' for 'sm_89'\n"
    with pytest.raises(AssertionError, match="of 1 kernels 0 could be read"):
        compile_check.parse("planted", report)


def test_without_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nowhere")
    monkeypatch.delenv("CMPOSE_REQUIRE_NVCC", raising=False)
    with pytest.raises(pytest.skip.Exception, match="no bin/nvcc in CUDA_HOME=/nowhere"):
        compile_check.require_nvcc()
    monkeypatch.setenv("CMPOSE_REQUIRE_NVCC", "1")
    with pytest.raises(pytest.fail.Exception, match="CMPOSE_REQUIRE_NVCC=1, but there is no bin"):
        compile_check.require_nvcc()
