"""Records for tests: of a card that does not exist, so that none is taken for a result."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from bench.harness import records
from bench.harness.targets import TARGETS
from cmpose.config import ModelConfig

CARD = "Test Card 9000"

RATES = {"copy_bytes_per_s": 4.0e12, "bf16_flops_per_s": 8.0e14, "fp32_flops_per_s": 5.0e13,
         "tf32_flops_per_s": 4.0e14}  # fmt: skip

ORIGIN = {"gpu": CARD, "cpu": "some processor", "driver": "580.1", "cuda": "13.0",
          "torch": "2.13.0", "triton": "3.7.1", "python": "3.12.3", "commit": "0123456789abcdef",
          "dirty": False, "command": "python -m bench --full",
          "utc": "2026-01-02T03:04:05Z"}  # fmt: skip

PASSED = {"status": "passed", "tests": 12, "failed": 0, "command": "python -m pytest"}


def record(**changes: Any) -> dict[str, Any]:
    """A whole record of temporal attention, three times as fast as the best of its peers."""
    sample = vars(TARGETS[2].workload) | {
        "backend": "triton", "us": {"p20": 99.0, "p50": 100.0, "p80": 101.0}, "wall_us": 130.0,
        "timer": "graph", "input_sets": 2, "cold": True, "peak_bytes": 1000,
        "bytes": 340_000_000, "flops": 1000, "bound_us": 85.0,
        "percent_of_bound": 85.0, "percent_of_copy": 85.0,
        "peers": {"eager": 900.0, "compile": 300.0, "sdpa_flash": "error: RuntimeError: no"},
        "peers_wall_us": {"eager": 950.0, "compile": 340.0},
        "peers_peak_bytes": {"eager": 2000, "compile": 1500},
        "peers_timer": {"eager": "graph", "compile": "graph"}, "best_peer": "compile",
        "speedup_vs_best_peer": 3.0, "error_vs_fp64": 1e-3, "peers_error_vs_fp64": {"eager": 2e-3},
        "kernels": {"ours": ["temporal_attention_rows_forward"]}, "op_tests": PASSED,
        "setting": "full", "rates": RATES, "note": None, "provenance": ORIGIN,
    }  # fmt: skip
    return copy.deepcopy(sample | changes)


def _variant(clips_per_s: float, ms: float, gigabytes: int, **others: Any) -> dict[str, Any]:
    times = {"p20": ms - 1, "p50": ms, "p80": ms + 1}
    return {"clips_per_s": clips_per_s, "ms": times, "peak_bytes": gigabytes * 10**9,
            "model_flops_per_clip": 655_000_000_000, "loss": 3.0, **others}  # fmt: skip


def step(**changes: Any) -> dict[str, Any]:
    """A train step of ViT-B in three variants, one of which failed."""
    plain, ours = {"input": 1.0, "backbone": 159.0}, {"input": 0.5, "backbone": 45.0}
    sample = {
        "backbone": "base", "batch": 32, "precision": "bf16",
        "shape": {"T": 3, "K": 15, "height": 256, "width": 192},
        "variants": {
            "eager reference": _variant(200.0, 160.0, 30, mfu=0.13, parts_ms=plain),
            "ours": _variant(700.0, 45.7, 20, mfu=0.46, parts_ms=ours),
            "compiled reference": "error: RuntimeError: no",
        },
        "rates": RATES, "note": None, "provenance": ORIGIN,
    }  # fmt: skip
    return copy.deepcopy(sample | changes)


def content(*result: dict[str, Any], steps: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    """A results file's content."""
    results = records.load_or_empty(Path("none"), CARD)
    records.add(results, result, steps)
    return results


def tiny(**fields: Any) -> ModelConfig:
    """The smallest model that has every part."""
    fields_of_tiny = {"backbone": "tiny", "depth": 1, "image_size": (64, 48), "num_keypoints": 2,
            "tokens_per_keypoint": 2, "num_clusters": 3, "neighbors": 2, "head_channels": 8,
            "backend": "reference"}  # fmt: skip
    return ModelConfig(**(fields_of_tiny | fields))
