"""Bags of rows, sorted in each of the ways that there are."""

from __future__ import annotations

import pytest
import torch

from cmpose.ops.cpu import bags


@pytest.mark.parametrize(
    ("count", "numpy"), [(100, True), (2**14, True), (2**14 + 1, True), (100, False)]
)
def test_members_bag_by_bag_in_the_order_of_their_indices(
    count: int, numpy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bags, "_HAS_NUMPY", numpy)
    bag = torch.randint(count, (2, 500), generator=torch.Generator().manual_seed(0))
    bag[1, :3] = count - 1
    order, starts = bags.sorted_bags(bag, count)
    flat = [clip * count + number for clip, row in enumerate(bag.tolist()) for number in row]
    expected = sorted(range(1000), key=lambda member: (flat[member], member))
    assert order.tolist() == expected
    passed = torch.bincount(torch.tensor(flat), minlength=2 * count).cumsum(0)
    assert starts.tolist() == [0, *passed[:-1].tolist()]
