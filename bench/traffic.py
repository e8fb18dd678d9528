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


def table() -> str:
    """Every op that has a Triton kernel, forward and backward, as Markdown."""
    rows = []
    for op in COUNTED:
        bench = bench_of(op)
        shape = bench.shapes[0] | SHAPES.get(op, {})
        arguments = bench.arguments(Workload(op, FORWARD, shape, BF16), "meta")
        with Trace() as forward:
            result = bench.peers["eager"].build(False)(**arguments)
        traces = {FORWARD: forward}
        if bench.gradients:
            inputs = [arguments[name] for name in bench.gradients]
            with Trace() as backward:
                torch.autograd.grad(result, inputs, torch.empty_like(result))
            traces[BACKWARD] = backward
        for direction, trace in traces.items():
            plain, fused = trace.moved, bench.bytes_of(Workload(op, direction, shape, BF16))
            moved = f"{plain / 1e6:,.1f}", str(len(trace.calls)), f"{fused / 1e6:,.1f}"
            rows.append((f"`{op}`", direction, *moved, f"{plain / fused:.1f}×"))
    head = ("op", "direction", "plain PyTorch, MB", "in calls", "fused, MB", "ratio")
    return tables.table(head, rows)


if __name__ == "__main__":
    print(table())
