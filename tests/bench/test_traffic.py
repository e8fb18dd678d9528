"""Counted bytes: by hand on small cases, and as the documents state them."""

from __future__ import annotations

import torch

from bench import traffic
from bench.harness.workload import size_in_memory
from cmpose.ops.backends import OPS
from tests.shared_data import PROJECT


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
    found = {(c.op, c.direction): c.fused_bytes for c in traffic.count()}
    one = 3 * 32 * 3 * 192 * 768 * 2
    assert found["temporal_attention", "forward"] == 4 * one
    assert found["temporal_attention", "backward"] == 7 * one
    tokens, slots = 32 * 3 * 192 * 768 * 2, 32 * 3 * 207 * 768 * 2
    learnt = (15 + 3 * 207) * 768 * 2  # keypoint tokens and position, read or their gradients
    flags = 32 * 3 * 192
    assert found["corrupt_tokens", "forward"] == tokens + 3 * slots + learnt + 2 * flags
    assert found["corrupt_tokens", "backward"] == tokens + 3 * slots + learnt + flags


def test_documents_state_what_is_counted() -> None:
    counted = traffic.count()
    text = " ".join((PROJECT / "docs" / "ops.md").read_text().split())
    sentences = traffic.sentences(counted)
    assert set(sentences) == set(OPS[:6])
    for op, sentence in sentences.items():
        assert sentence in text, f"docs/ops.md, {op}: python -m bench.traffic says {sentence!r}"
    assert traffic.table(counted) in (PROJECT / "docs" / "performance.md").read_text()
