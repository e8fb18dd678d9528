"""Peak memory of dpc_knn against the number of tokens: ``python -m bench.memory``, on any machine.

One clip of bfloat16 tokens with 768 channels, k = 5, 32 clusters. The reference is measured: the
most that torch's CPU allocator has handed out at a time during a call, over what there was before
it, results included. The kernel is computed, from the workspace that it asks for and its results;
no card is needed, but the CUDA C++ core must be built.
"""

from __future__ import annotations

import platform

import torch

from bench.harness.timing import peak_bytes
from bench.report.tables import table
from cmpose import native, ops

B, D, NEIGHBORS, CLUSTERS = 1, 768, 5, 32
BFLOAT16 = 2  # the core's code
SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
MEASURED = 4096
"""Up to here the reference is run: it takes minutes, and beyond gigabytes."""

HEAD = ("M", "tokens, MB", "reference, MB", "kernel, MB")


def reference_bytes(tokens: int) -> int:
    """What a call of the reference has allocated at its peak."""
    x = torch.randn(B, tokens, D, generator=torch.Generator().manual_seed(0)).bfloat16()
    return peak_bytes(lambda: ops.dpc_knn(x, NEIGHBORS, CLUSTERS, backend="reference"), "cpu")


def kernel_bytes(tokens: int) -> int | None:
    """The kernel's workspace and results; None if it is not built."""
    try:
        core = native.module()
    except ImportError:
        return None
    workspace = core.dpc_knn_workspace(BFLOAT16, B, tokens, D, NEIGHBORS, CLUSTERS)
    return int(workspace) + B * (tokens * (4 + 4 + 8) + CLUSTERS * 8)


def row(tokens: int, measured: int = MEASURED) -> list[str]:
    """A row of the table; the reference is run up to ``measured`` tokens."""
    reference = reference_bytes(tokens) if tokens <= measured else None
    sizes = (B * tokens * D * 2, ""), (reference, "not run"), (kernel_bytes(tokens), "not built")
    cells = (missing if size is None else f"{size / 1e6:,.1f}" for size, missing in sizes)
    return [f"{tokens:,}", *cells]


if __name__ == "__main__":
    print(f"torch {torch.__version__}, Python {platform.python_version()}, CPU\n")
    print(table(HEAD, map(row, SIZES)))
