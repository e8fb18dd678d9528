"""The configuration of every kernel, pinned per architecture.

Nothing is tuned at a user's first step: what runs is what stands here, the same in every process.
Each line is one variant of a kernel: its name, the variant, and per compute capability the block
sizes, warps and pipeline stages. A card takes the line of the highest capability that is not
above its own. ``python -m cmpose.kernels.tune`` measures other settings on the card at hand.
"""

from __future__ import annotations

from collections.abc import Hashable

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

# --- heatmap_loss ----------------------------------------------------------------------------

# --- warp_clips ------------------------------------------------------------------------------


CONFIGS: dict[str, Lines] = {}
"""Kernel name → variant → compute capability → configuration."""


def config(kernel: str, variant: Variant, arch: int) -> Config:
    """What ``kernel`` runs with on a card of compute capability ``arch``.

    Raises:
        KeyError: the table has no such kernel or variant, which is a bug.
    """
    line = CONFIGS[kernel][variant]
    return line[max((known for known in line if known <= arch), default=min(line))]
