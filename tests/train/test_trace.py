"""What a step runs, what it moves, and what that costs on a card."""

from __future__ import annotations

import torch

from cmpose.train.trace import Trace, size_in_memory


def test_reads_inputs_and_writes_outputs_once():
    """An expanded dimension counts once."""
    a, b = (torch.empty(4, 5, dtype=torch.bfloat16, device="meta") for _ in range(2))
    with Trace() as counted:
        a + b
        a + a  # one input
        a.t().contiguous().view(20)  # views, and a copy between them
    assert counted.moved == 2 * 20 * (3 + 2 + 2)
    assert len(counted.calls) == 3
    row = torch.empty(1, 8, device="meta").expand(16, 8)
    assert size_in_memory(row) == 8 * 4
    assert size_in_memory(torch.empty(0, 3, device="meta")) == 0
    with Trace() as counted:
        row * 2
    assert counted.moved == 4 * (8 + 16 * 8)
