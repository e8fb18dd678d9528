"""Peak memory of dpc_knn against the number of tokens: ``python -m bench.memory``, on any machine.

One clip of bfloat16 tokens with 768 channels, k = 5, 32 clusters. The reference is measured: the
most that torch's CPU allocator has handed out at a time during a call, over what there was before
it, results included. The kernel is computed, from the workspace that it asks for and its results;
no card is needed, but the CUDA C++ core must be built.
"""

from __future__ import annotations

import importlib
import platform
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch

from bench.harness.timing import peak_bytes
from cmpose import ops

B, D, NEIGHBORS, CLUSTERS = 1, 768, 5, 32
BFLOAT16 = 2  # the core's code
SIZES = (256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
MEASURED = 4096
"""Up to here the reference is run: it takes minutes, and beyond gigabytes."""

HEAD = "| M | tokens, MB | reference, MB | kernel, MB |\n|---|---|---|---|"

Workspace = Callable[[int], int]  # tokens → bytes


class Row(NamedTuple):
    """Bytes at a number of tokens; None: not run, or not built."""

    tokens: int
    input: int
    reference: int | None
    kernel: int | None

    def __str__(self) -> str:
        """As a line of a Markdown table."""
        sizes = (self.input, ""), (self.reference, "not run"), (self.kernel, "not built")
        cells = (missing if size is None else f"{size / 1e6:,.1f}" for size, missing in sizes)
        return f"| {self.tokens:,} | {' | '.join(cells)} |"


def reference_peak(tokens: int, channels: int = D) -> int:
    """Bytes that a call of the reference has allocated at its peak."""
    x = torch.randn(B, tokens, channels, generator=torch.Generator().manual_seed(0)).bfloat16()
    clusters = min(CLUSTERS, tokens)
    return peak_bytes(lambda: ops.dpc_knn(x, NEIGHBORS, clusters, backend="reference"), "cpu")


def native_workspace() -> Workspace | None:
    """The kernel's workspace and results by the number of tokens; None if it is not built."""
    try:
        core = importlib.import_module("cmpose.native").module()
    except ImportError:
        return None

    def size(tokens: int) -> int:
        workspace = core.dpc_knn_workspace(BFLOAT16, B, tokens, D, NEIGHBORS, CLUSTERS)
        return int(workspace) + B * (tokens * (4 + 4 + 8) + CLUSTERS * 8)

    return size


def measure(
    sizes: Iterable[int] = SIZES, measured: int = MEASURED, kernel: Workspace | None = None
) -> Iterator[Row]:
    """A row a number of tokens, as it is measured; the reference up to ``measured`` of them."""
    for size in sizes:
        reference = reference_peak(size) if size <= measured else None
        yield Row(size, B * size * D * 2, reference, kernel(size) if kernel else None)


if __name__ == "__main__":
    print(f"torch {torch.__version__}, Python {platform.python_version()}, CPU\n")
    print(HEAD)
    for row in measure(kernel=native_workspace()):
        print(row, flush=True)
