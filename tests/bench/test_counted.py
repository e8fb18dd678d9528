"""What is counted without a card: overhead of a call, bytes moved, memory held."""

from __future__ import annotations

import pytest
import torch

from bench import memory, overhead, traffic
from bench.harness.workload import size_in_memory
from bench.report import tables
from cmpose import ops
from cmpose.ops import library
from cmpose.ops.backends import OPS
from tests.shared_data import PROJECT


def test_every_registered_op_is_measured() -> None:
    before = {name: dict(entries) for name, entries in library.IMPLEMENTATIONS.items()}
    result = overhead.measure(seconds=0.01)
    assert before == library.IMPLEMENTATIONS
    assert set(result) == {*OPS, overhead.SDPA}
    for plain, forward, both in result.values():
        assert plain > 0
        if both is not None:
            assert both > forward > 0


def test_bodies_do_not_run() -> None:
    qkv = torch.randn(1, 2, 1, 3, 1, 8)
    expected = ops.temporal_attention(qkv)
    with overhead.without_bodies(lambda: ops.temporal_attention(qkv)):
        assert torch.equal(ops.temporal_attention(qkv + 1), expected)  # what it gave before
    assert not torch.equal(ops.temporal_attention(qkv + 1), expected)


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


def test_documents_state_what_is_counted() -> None:
    counted = traffic.count()
    text = " ".join((PROJECT / "docs" / "ops.md").read_text().split())
    sentences = traffic.sentences(counted)
    assert set(sentences) == set(OPS[:6])
    for op, sentence in sentences.items():
        assert sentence in text, f"docs/ops.md, {op}: python -m bench.traffic says {sentence!r}"
    assert traffic.table(counted) in (PROJECT / "docs" / "performance.md").read_text()


def test_documents_state_the_memory() -> None:
    text = (PROJECT / "docs" / "performance.md").read_text()
    rows = text.split(tables.table(memory.HEAD, []))[1].split("\n\n")[0].strip().splitlines()
    for written, tokens in zip(rows, memory.SIZES, strict=True):
        stated = [cell.strip() for cell in written.strip("|").split("|")]
        counted = memory.row(tokens, measured=512)
        assert stated[:2] == counted[:2]
        if counted[2] != "not run":
            assert float(stated[2]) == pytest.approx(float(counted[2]), rel=0.05)
        if counted[3] != "not built":
            assert stated[3] == counted[3]
