"""The overhead bench runs, measures what it says, and leaves the ops as they were."""

from __future__ import annotations

import torch

from bench import overhead
from cmpose import ops
from cmpose.ops import library
from cmpose.ops.backends import OPS


def test_every_registered_op_is_measured() -> None:
    before = {name: dict(entries) for name, entries in library.IMPLEMENTATIONS.items()}
    found = overhead.measure(seconds=0.01)
    assert before == library.IMPLEMENTATIONS
    assert set(found) == {*OPS, overhead.SDPA}
    for plain, forward, both in found.values():
        assert plain > 0
        if both is not None:
            assert both > forward > 0
    assert overhead.table(found).count("\n") == len(found) + 1


def test_bodies_do_not_run() -> None:
    qkv = torch.randn(1, 2, 1, 3, 1, 8)
    expected = ops.temporal_attention(qkv)
    with overhead.without_bodies(lambda: ops.temporal_attention(qkv)):
        assert torch.equal(ops.temporal_attention(qkv + 1), expected)  # what it gave before
    assert not torch.equal(ops.temporal_attention(qkv + 1), expected)
