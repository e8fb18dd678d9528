"""Bytes that an op must move, and those that plain PyTorch moves: ``python -m bench.traffic``.

At the reference shape in bfloat16. Plain PyTorch is each op's reference with autograd on meta
tensors, or :data:`PLAIN`: every ATen call that is not a view reads its inputs and writes its
outputs once (an expanded dimension counts once).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from bench import corrupt_tokens, warp_clips
from bench.harness.shapes import BACKWARD, BF16, FORWARD
from bench.harness.targets import bench_of
from bench.harness.workload import Workload, tensors
from bench.report import tables
from cmpose.train.trace import Trace

COUNTED = ("spatial_attention", "temporal_attention", "corrupt_tokens", "reconstruction_loss",
           "heatmap_loss", "warp_clips")  # fmt: skip
PLAIN: dict[str, Callable[..., Any]] = {
    "corrupt_tokens": corrupt_tokens.plain, "warp_clips": warp_clips.plain,
}  # fmt: skip
"""Op → what one would write with torch's own generator or grid_sample."""

SHAPES = {"temporal_attention": {"N": 207, "K": 0}}
"""Op → sizes in place of the reference shape's: the model attends over patches and keypoints."""


def count() -> list[tuple[str, str, int, int, int]]:
    """Every op that has a Triton kernel, forward and backward: plain bytes, calls, fused bytes."""
    counts = []
    for op in COUNTED:
        bench = bench_of(op)
        there, back = (
            Workload(op, direction, {**bench.shapes[0], **SHAPES.get(op, {})}, BF16)
            for direction in (FORWARD, BACKWARD)
        )
        arguments = bench.arguments(there, "meta")
        function = PLAIN.get(op) or partial(bench.call, backend="reference")
        with Trace() as forward:
            result = function(**arguments)
        counts.append((op, FORWARD, forward.moved, len(forward.calls), bench.bytes_of(there)))
        if bench.gradients:
            output = tensors(result)[0]
            upstream = torch.empty_like(output)
            with Trace() as backward:
                torch.autograd.grad(output, [arguments[n] for n in bench.gradients], upstream)
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
