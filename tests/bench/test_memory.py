"""The memory bench counts what a call holds, and finds the kernel's workspace when there is one."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from bench import memory
from cmpose import ops
from cmpose.ops.dpc_knn import squared_distances
from tests.shared_data import PROJECT


def test_the_peak_is_what_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def call(x: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        for _ in range(3):
            torch.empty(1000)  # freed at once
        kept = torch.empty(5000)
        torch.empty(2000)
        return kept

    monkeypatch.setattr(ops, "dpc_knn", call)
    peak = memory.reference_peak(4, 8)
    assert 4 * 7000 <= peak < 4 * 7000 + 1024  # the allocator may round up


def test_the_reference_grows_as_the_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few channels, and row by row, M² is nearly all there is."""
    monkeypatch.setitem(squared_distances.__globals__["_CHUNK"], "cpu", 1)
    small, large = memory.reference_peak(256, 2), memory.reference_peak(1024, 2)
    assert 15 < large / small < 17
    assert large >= 2 * 4 * 1024**2  # two matrices in float32 at least


def test_rows() -> None:
    rows = list(memory.measure((16, 64, 128), measured=64, kernel=lambda m: 10 * m))
    assert [r.tokens for r in rows] == [16, 64, 128]
    assert [r.kernel for r in rows] == [160, 640, 1280]
    assert [r.input for r in rows] == [m * 768 * 2 for m in (16, 64, 128)]
    assert rows[0].reference < rows[1].reference
    assert rows[2].reference is None
    assert str(memory.Row(4096, 6_291_456, 2_000_049_000, 12_345_678)) == (
        "| 4,096 | 6.3 | 2,000.0 | 12.3 |"
    )
    assert str(memory.Row(8192, 0, None, None)) == "| 8,192 | 0.0 | not run | not built |"
    assert memory.HEAD.count("|") == 2 * str(rows[0]).count("|")


def test_the_kernels_workspace_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def workspace(*arguments: int) -> int:
        asked.append(arguments)
        return 1000

    native = types.ModuleType("cmpose.native")
    native.module = lambda: types.SimpleNamespace(dpc_knn_workspace=workspace)  # type: ignore
    monkeypatch.setitem(sys.modules, "cmpose.native", native)
    found = memory.native_workspace()
    assert found is not None
    results = ops.dpc_knn(torch.zeros(1, 40, 1), 5, 32)
    assert found(40) == 1000 + sum(t.numel() * t.element_size() for t in results)
    assert asked == [(2, 1, 40, 768, 5, 32)]

    def missing() -> None:
        raise ImportError("cmpose._C is not built")

    native.module = missing  # type: ignore
    assert memory.native_workspace() is None


def test_documents_state_what_is_measured() -> None:
    text = (PROJECT / "docs" / "performance.md").read_text()
    assert memory.HEAD in text
    table = text.split(memory.HEAD)[1].split("\n\n")[0].strip().splitlines()
    assert len(table) == len(memory.SIZES)
    for written, row in zip(table, memory.measure(memory.SIZES, measured=512), strict=True):
        stated = [cell.strip() for cell in written.strip("|").split("|")]
        found = [cell.strip() for cell in str(row).strip("|").split("|")]
        assert stated[:2] == found[:2]
        if row.reference is not None:
            assert float(stated[2]) == pytest.approx(row.reference / 1e6, rel=0.05)
