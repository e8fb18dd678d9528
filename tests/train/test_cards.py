"""Cards are told apart by their whole names."""

from __future__ import annotations

import pytest
import torch

from cmpose.train.cards import CARDS, card_of, cards_for


def test_a_longer_name_is_another_card(monkeypatch):
    alike = [
        ("RTX 4090", "NVIDIA GeForce RTX 4090", 165.2),
        ("RTX 4090 D", "NVIDIA GeForce RTX 4090 D", 147.1),
        ("RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 Laptop GPU", 79.4),
        ("H100 SXM", "NVIDIA H100 80GB HBM3", 989),
        ("H100 PCIe", "NVIDIA H100 PCIe", 756),
        ("H100 NVL", "NVIDIA H100 NVL", 835.5),
        ("H200 SXM", "NVIDIA H200", 989),
        ("H200 NVL", "NVIDIA H200 NVL", 835.5),
    ]
    for name, device, rate in alike:
        card = card_of(device)
        assert card is not None
        assert (card.name, card.flops_16) == (name, rate * 1e12)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=device: device)
        assert cards_for("") == (card,)
    for device in ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090 Ti", "4090"):
        assert card_of(device) is None
    assert len({card.device for card in CARDS}) == len({card.option for card in CARDS})


def test_a_card_that_is_not_known_is_named():
    assert [card.name for card in cards_for("rtx-4090,h200-nvl")] == ["RTX 4090", "H200 NVL"]
    with pytest.raises(ValueError, match=r"--card=rtx-4090,gtx: 'gtx' is none of rtx-4090, rtx-40"):
        cards_for("rtx-4090,gtx")
