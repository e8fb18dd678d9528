"""The configuration of every kernel, pinned per architecture.

Nothing is tuned at a user's first step: what runs is what stands here, the same in every process.
Each line is one variant of a kernel: its name, the variant, and per compute capability the block
sizes, warps and pipeline stages. A card takes the line of the highest capability that is not
above its own. ``python -m cmpose.kernels.tune`` measures other settings on the card at hand.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from cmpose.kernels.launch import Config

Variant = Hashable
Lines = dict[Variant, dict[int, Config]]


def c(num_warps: int = 4, num_stages: int = 1, **blocks: int) -> Config:
    """One entry of the table."""
    return Config(blocks, num_warps, num_stages)


# --- temporal_attention ----------------------------------------------------------------------

# --- spatial_attention -----------------------------------------------------------------------

# --- corrupt_tokens --------------------------------------------------------------------------

# --- reconstruction_loss ---------------------------------------------------------------------
# The variant is the tile's channels.
RECONSTRUCTION_LOSS: dict[str, Lines] = {
    "reconstruction_loss_forward": {
        64: {80: c(4, ROWS=64, BLOCK_D=64)},
        128: {80: c(4, ROWS=32, BLOCK_D=128)},
        256: {80: c(4, ROWS=16, BLOCK_D=256)},
    },
    "reconstruction_loss_scale": {
        64: {80: c(4, ROWS=64, BLOCK_D=64)},
        128: {80: c(4, ROWS=32, BLOCK_D=128)},
        256: {80: c(4, ROWS=16, BLOCK_D=256)},
    },
    "block_sums": {None: {80: c(32, BLOCK=32768)}},
    "finish": {None: {80: c(8, BLOCK=4096)}},
}

# --- heatmap_loss ----------------------------------------------------------------------------
# The variant is the tile's columns: a heatmap's, or 128 of them.
HEATMAP_LOSS: dict[str, Lines] = {
    "heatmap_loss_forward": {
        32: {80: c(4, BLOCK_H=32, BLOCK_W=32)},
        64: {80: c(8, BLOCK_H=64, BLOCK_W=64)},
        128: {80: c(8, BLOCK_H=32, BLOCK_W=128)},
    },
    "heatmap_loss_scale": {None: {80: c(4, BLOCK=4096)}},
}

# --- warp_clips ------------------------------------------------------------------------------


CONFIGS: dict[str, Lines] = {
    **RECONSTRUCTION_LOSS,
    **HEATMAP_LOSS,
}
"""Kernel name → variant → compute capability → configuration."""


class Lookup(NamedTuple):
    """One time that :func:`config` was asked: for which line, and for which capability it is."""

    kernel: str
    variant: Variant
    arch: int
    config: Config


_noted: list[Lookup] | None = None


@contextmanager
def noting() -> Iterator[list[Lookup]]:
    """Within it lookups are noted, each with a configuration object of its own.

    So a recorded launch tells by the identity of its configuration which line it comes from.
    """
    global _noted
    before, _noted = _noted, []
    try:
        yield _noted
    finally:
        _noted = before


def config(kernel: str, variant: Variant, arch: int) -> Config:
    """What ``kernel`` runs with on a card of compute capability ``arch``.

    Raises:
        KeyError: the table has no such kernel or variant, which is a bug.
    """
    line = CONFIGS[kernel][variant]
    entry = max((known for known in line if known <= arch), default=min(line))
    if _noted is None:
        return line[entry]
    found = Lookup(kernel, variant, entry, Config(*line[entry]))
    _noted.append(found)
    return found.config
