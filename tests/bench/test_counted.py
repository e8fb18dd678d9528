"""What is counted without a card: overhead of a call, bytes moved, memory held."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from bench import memory, overhead, traffic
from bench.harness.workload import size_in_memory
from cmpose import ops
from cmpose.ops import library
from cmpose.ops.backends import OPS
from cmpose.ops.dpc_knn import squared_distances
from tests.shared_data import PROJECT

# -- overhead -------------------------------------------------------------------------------------


def test_every_registered_op_is_measured() -> None:
    before = {name: dict(entries) for name, entries in library.IMPLEMENTATIONS.items()}
    result = overhead.measure(seconds=0.01)
    assert before == library.IMPLEMENTATIONS
    assert set(result) == {*OPS, overhead.SDPA}
    for plain, forward, both in result.values():
        assert plain > 0
        if both is not None:
            assert both > forward > 0
    assert overhead.table(result).count("\n") == len(result) + 1


def test_bodies_do_not_run() -> None:
    qkv = torch.randn(1, 2, 1, 3, 1, 8)
    expected = ops.temporal_attention(qkv)
    with overhead.without_bodies(lambda: ops.temporal_attention(qkv)):
        assert torch.equal(ops.temporal_attention(qkv + 1), expected)  # what it gave before
    assert not torch.equal(ops.temporal_attention(qkv + 1), expected)


# -- traffic --------------------------------------------------------------------------------------


def test_reads_inputs_and_writes_outputs_once() -> None:
    a, b = (torch.empty(4, 5, dtype=torch.bfloat16, device="meta") for _ in range(2))
    with traffic.Traffic() as counted:
        a + b
        a + a  # one input
        a.t().contiguous().view(20)  # views, and a copy between them
    assert counted.bytes == 2 * 20 * (3 + 2 + 2)
    assert counted.calls == 3


def test_an_expanded_dimension_counts_once() -> None:
    row = torch.empty(1, 8, device="meta").expand(16, 8)
    assert size_in_memory(row) == 8 * 4
    assert size_in_memory(torch.empty(0, 3, device="meta")) == 0
    with traffic.Traffic() as counted:
        row * 2
    assert counted.bytes == 4 * (8 + 16 * 8)


def test_fused_bytes_are_those_of_the_tensors() -> None:
    """Attention moves its packed input and its output, and three and four of them backward."""
    result = {(c.op, c.direction): c.fused_bytes for c in traffic.count()}
    one = 3 * 32 * 3 * 192 * 768 * 2
    assert result["temporal_attention", "forward"] == 4 * one
    assert result["temporal_attention", "backward"] == 7 * one
    tokens, slots = 32 * 3 * 192 * 768 * 2, 32 * 3 * 207 * 768 * 2
    learnt = (15 + 3 * 207) * 768 * 2  # keypoint tokens and position, read or their gradients
    flags = 32 * 3 * 192
    assert result["corrupt_tokens", "forward"] == tokens + 3 * slots + learnt + 2 * flags
    assert result["corrupt_tokens", "backward"] == tokens + 3 * slots + learnt + flags


def test_documents_state_what_is_counted() -> None:
    counted = traffic.count()
    text = " ".join((PROJECT / "docs" / "ops.md").read_text().split())
    sentences = traffic.sentences(counted)
    assert set(sentences) == set(OPS[:6])
    for op, sentence in sentences.items():
        assert sentence in text, f"docs/ops.md, {op}: python -m bench.traffic says {sentence!r}"
    assert traffic.table(counted) in (PROJECT / "docs" / "performance.md").read_text()


# -- memory ---------------------------------------------------------------------------------------


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
    result = memory.native_workspace()
    assert result is not None
    results = ops.dpc_knn(torch.zeros(1, 40, 1), 5, 32)
    assert result(40) == 1000 + sum(t.numel() * t.element_size() for t in results)
    assert asked == [(2, 1, 40, 768, 5, 32)]

    def missing() -> None:
        raise ImportError("cmpose._C is not built")

    native.module = missing  # type: ignore
    assert memory.native_workspace() is None


def test_documents_state_the_memory() -> None:
    text = (PROJECT / "docs" / "performance.md").read_text()
    assert memory.HEAD in text
    table = text.split(memory.HEAD)[1].split("\n\n")[0].strip().splitlines()
    assert len(table) == len(memory.SIZES)
    for written, row in zip(table, memory.measure(memory.SIZES, measured=512), strict=True):
        stated = [cell.strip() for cell in written.strip("|").split("|")]
        result = [cell.strip() for cell in str(row).strip("|").split("|")]
        assert stated[:2] == result[:2]
        if row.reference is not None:
            assert float(stated[2]) == pytest.approx(row.reference / 1e6, rel=0.05)
