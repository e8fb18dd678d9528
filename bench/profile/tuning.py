"""What ``python -m cmpose.kernels.tune`` ranks configurations by where there is no card."""

from __future__ import annotations

from torch import Tensor

from bench.harness.shapes import FP32
from bench.profile import model
from bench.profile.cards import BY_ARCH
from bench.profile.counts import count
from tests.ptx_on_cpu.triton_kernels import Launch


def milliseconds(launches: list[Launch], arch: int) -> float:
    """The estimate of some launches together, on the card that stands for a capability.

    Raises:
        KeyError: no card of that capability is known.
        ValueError: a block does not fit.
    """
    card = BY_ARCH[arch]
    us = 0.0
    for launched in launches:
        half = {str(t.dtype)[6:] for t in launched.arguments if isinstance(t, Tensor)}
        [dtype] = half & {"bfloat16", "float16"} or {FP32}
        [counts] = count([launched], arch)
        us += model.estimated(model.resources(counts, card, dtype), card)
    return us / 1e3
