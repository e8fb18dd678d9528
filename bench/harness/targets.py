"""What must be reached, as data: microseconds at the reference shape in bfloat16.

The RTX 4090's are estimates from its bound.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from bench.harness.records import comparable
from bench.harness.shapes import BACKWARD, BF16, BOTH, FORWARD
from bench.harness.timing import RTX_4090
from bench.harness.workload import OpBench, Workload
from cmpose.ops.backends import OPS


def bench_of(op: str) -> OpBench:
    """How an op is measured: ``bench/<op>.py``'s.

    Raises:
        ValueError: no such op.
    """
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")
    return importlib.import_module(f"bench.{op}").BENCH


@dataclass(frozen=True)
class Target:
    """One hot spot."""

    label: str  # as the documents call it
    op: str
    direction: str
    h200_us: float  # at most
    rtx_4090_us: float
    # The beginning of peers' names → how many times faster than the fastest of these peers.
    ratios: dict[str, float]
    shape: dict[str, int] = field(default_factory=dict)  # sizes unlike the reference shape's

    @property
    def workload(self) -> Workload:
        shape = {**bench_of(self.op).shapes[0], **self.shape}
        return Workload(self.op, self.direction, shape, BF16)

    @property
    def rtx_4090_bound_us(self) -> float:
        """By its datasheet, see ``timing.py``."""
        workload, bench = self.workload, bench_of(self.op)
        flops = bench.flops(workload.shape, workload.direction)
        return RTX_4090.bound_us(bench.bytes_of(workload), flops, workload.dtype)


_LOSS = "reconstruction loss forward + backward, one task of two, 30 % corrupted"
_OVER_FORWARD = {"compile": 1.3, "sdpa_flash": 25.0}
_OVER_BACKWARD = {"compile": 1.5, "sdpa_flash": 40.0}
_SLOTS = {"N": 207, "K": 0}  # the model attends along the frames at the keypoint tokens too
_TEMPORAL = "temporal_attention"

TARGETS = (
    Target("spatial attention forward", "spatial_attention", FORWARD, 105, 395, {"": 1.5}),
    Target("spatial attention backward", "spatial_attention", BACKWARD, 230, 760, {"": 1.6}),
    Target("temporal attention forward", _TEMPORAL, FORWARD, 91, 385, _OVER_FORWARD, _SLOTS),
    Target("temporal attention backward", _TEMPORAL, BACKWARD, 158, 675, _OVER_BACKWARD, _SLOTS),
    Target("corruption forward", "corrupt_tokens", FORWARD, 34, 135, {"": 2}),
    Target("corruption backward", "corrupt_tokens", BACKWARD, 32, 125, {"": 1.2}),
    Target("DPC-kNN, M = 192, to labels", "dpc_knn", FORWARD, 15, 25, {"": 5, "eager": 12}),
    Target("DPC-kNN, M = 1024", "dpc_knn", FORWARD, 200, 500, {"": 4}, {"M": 1024, "L": 256}),
    Target("DPC-kNN, M = 4096", "dpc_knn", FORWARD, 3200, 8000, {"": 3}, {"M": 4096, "L": 1024}),
    Target("merge forward + backward", "merge_clusters", BOTH, 15, 36, {"": 3}),
    Target("token selection", "select_tokens", FORWARD, 6, 6, {"": 3}),
    Target("crops out of 720p frames", "warp_clips", FORWARD, 12, 30, {"": 3}),
    # 26 and 102 µs are wanted for both tasks; a workload is one of them.
    Target(_LOSS, "reconstruction_loss", BOTH, 13, 51, {"": 2}, {"p": 30}),
    Target("heatmap loss forward + backward", "heatmap_loss", BOTH, 5, 9, {"": 3}),
)

CLIPS_PER_S = {"H200": 800, "RTX 4090": 200}
"""Of the full train step of ViT-B."""
FP8_CLIPS_PER_S = 280
"""The same on an RTX 4090 in fp8."""
STEP_RATIOS = {"eager reference": 2.0, "compiled reference": 1.3}


def workload_of(record: dict[str, Any]) -> Workload:
    """What a record is of."""
    return Workload(record["op"], record["direction"], record["shape"], record["dtype"])


def best_record(records: Iterable[dict[str, Any]], workload: Workload) -> dict[str, Any] | None:
    """The fastest backend's record of a workload, or None."""
    own = [record for record in records if workload_of(record) == workload]
    return min(own, key=lambda record: record["us"]["p50"], default=None)


def reached_ratio(record: dict[str, Any], peer: str) -> float | None:
    """How many times faster than the fastest peer whose name begins so; None if there is none."""
    times = [t for name, t in comparable(record).items() if name.startswith(peer)]
    return times[0] / record["us"]["p50"] if times else None
