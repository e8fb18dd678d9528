"""Cards by their datasheets: what they hold, and what they do in a second."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Card:
    """A card by its datasheet.

    Attributes:
        name: as it is sold.
        device: what CUDA calls it, the whole name. A longer name is another card: an RTX 4090 D or
            a laptop's has fewer multiprocessors, an H100 PCIe or NVL another memory.
        memory: bytes, as CUDA tells them.
        bandwidth: bytes/s of its memory.
        flops_32: FLOP/s of float32 products.
        flops_16: dense FLOP/s of 16-bit products, float32 accumulation.
        flops_16_accumulate: those of float16 with float16 accumulation.
        flops_8: those of 8-bit products with float32 accumulation; 0 without 8-bit floats.
        sustained: share of these rates that large products keep.
        kernels: the card whose compiled kernels stand for this one's (:mod:`cmpose.train.cost`).
    """

    name: str
    device: str
    memory: int
    bandwidth: float
    flops_32: float
    flops_16: float
    flops_16_accumulate: float
    flops_8: float
    sustained: float
    kernels: str

    @property
    def option(self) -> str:
        """``rtx-4090-d``: what ``--card`` takes."""
        return self.name.lower().replace(" ", "-")


def _geforce(name: str, mib: int, gb_s: float, tflops: float, *, fp8: bool = True) -> Card:
    """One whose dense 16-bit products with float32 accumulation have half the others' rate."""
    rate = tflops * 1e12
    return Card(name, f"NVIDIA GeForce {name}", mib << 20, gb_s * 1e9, rate / 2, rate, 2 * rate,
                2 * rate * fp8, SUSTAINED_GEFORCE, "RTX 4090")  # fmt: skip


# Many parameters: they are a datasheet's.
def _data_center(
    name: str, device: str, mib: int, gb_s: float, fp32: float, tflops: float, *, fp8: bool = True
) -> Card:
    """One that accumulates in float32 as fast as in float16."""
    rate = tflops * 1e12
    return Card(name, f"NVIDIA {device}", mib << 20, gb_s * 1e9, fp32 * 1e12, rate, rate,
                2 * rate * fp8, SUSTAINED_DATA_CENTER, "H200 SXM")  # fmt: skip


SUSTAINED_GEFORCE = 0.91
"""Assumed; their clock goes above the one that the datasheet's rate is of."""

SUSTAINED_DATA_CENTER = 0.8
"""An H100's large products within its power: 794.5 of 989 TFLOP/s (stas00/ml-engineering)."""

CARDS = (
    _geforce("RTX 4090", 24564, 1008, 165.2),
    _geforce("RTX 4090 D", 24564, 1008, 147.1),
    _geforce("RTX 4090 Laptop GPU", 16376, 576, 79.4),
    _geforce("RTX 3090", 24576, 936, 71.2, fp8=False),
    _geforce("RTX 5090", 32607, 1792, 209.5),
    _data_center("H200 SXM", "H200", 143771, 4800, 67, 989),
    _data_center("H200 NVL", "H200 NVL", 143771, 4800, 60, 835.5),
    _data_center("H100 SXM", "H100 80GB HBM3", 81559, 3350, 67, 989),
    _data_center("H100 PCIe", "H100 PCIe", 81559, 2000, 51, 756),
    _data_center("H100 NVL", "H100 NVL", 95830, 3900, 60, 835.5),
    _data_center("A100 SXM 80 GB", "A100-SXM4-80GB", 81920, 2039, 19.5, 312, fp8=False),
    _data_center("A100 PCIe 80 GB", "A100 80GB PCIe", 81920, 1935, 19.5, 312, fp8=False),
)

RTX_4090 = CARDS[0]
"""The 24 GB card."""


def card_of(device: str) -> Card | None:
    """The card that CUDA calls so; None for one whose datasheet is not here."""
    return next((card for card in CARDS if card.device == device), None)


def cards_for(option: str) -> tuple[Card, ...]:
    """What ``--card`` means.

    Args:
        option: names of cards with commas between, or nothing: the card at hand, and without one
            that is known an RTX 4090 and an H200.

    Raises:
        ValueError: for a card whose datasheet is not here.
    """
    cards = {card.option: card for card in CARDS}
    if not option:
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
        own = card_of(device)
        return (own,) if own else (cards["rtx-4090"], cards["h200-sxm"])
    for name in option.split(","):
        if name not in cards:
            raise ValueError(f"--card={option}: {name!r} is none of {', '.join(cards)}")
    return tuple(cards[name] for name in option.split(","))
