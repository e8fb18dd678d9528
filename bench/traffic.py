"""Bytes that an op must move, and those that plain PyTorch moves: ``python -m bench.traffic``.

At the reference shape in bfloat16. Plain PyTorch is each op's eager peer with autograd on meta
tensors: every ATen call that is not a view reads its inputs and writes its outputs once (an
expanded dimension counts once).
"""

from __future__ import annotations

import torch

from bench.harness.shapes import BACKWARD, BF16, FORWARD
from bench.harness.targets import bench_of
from bench.harness.workload import Workload
from bench.report import tables
from cmpose.train.trace import Trace

COUNTED = ("spatial_attention", "temporal_attention", "corrupt_tokens", "reconstruction_loss",
           "heatmap_loss", "warp_clips")  # fmt: skip

SHAPES = {"temporal_attention": {"N": 207, "K": 0}}
"""Op → sizes in place of the reference shape's: the model attends over patches and keypoints."""


def count() -> list[tuple[str, str, int, int, int]]:
    """Every op that has a Triton kernel, forward and backward: plain bytes, calls, fused bytes."""
    counts = []
    for op in COUNTED:
        bench = bench_of(op)
        shape = bench.shapes[0] | SHAPES.get(op, {})
        there, back = (Workload(op, direction, shape, BF16) for direction in (FORWARD, BACKWARD))
        arguments = bench.arguments(there, "meta")
        with Trace() as forward:
            result = bench.peers["eager"].build(False)(**arguments)
        counts.append((op, FORWARD, forward.moved, len(forward.calls), bench.bytes_of(there)))
        if bench.gradients:
            upstream = torch.empty_like(result)
            with Trace() as backward:
                torch.autograd.grad(result, [arguments[n] for n in bench.gradients], upstream)
            counts.append((op, BACKWARD, backward.moved, len(backward.calls), bench.bytes_of(back)))
    return counts


def table() -> str:
    """The counts as Markdown."""
    rows = [
        (f"`{op}`", direction, f"{plain / 1e6:,.1f}", str(calls), f"{fused / 1e6:,.1f}",
         f"{plain / fused:.1f}×")
        for op, direction, plain, calls, fused in count()
    ]  # fmt: skip
    head = ("op", "direction", "plain PyTorch, MB", "in calls", "fused, MB", "ratio")
    return tables.table(head, rows)


if __name__ == "__main__":
    print(table())
