"""Records for tests: of a card that does not exist, so that none is taken for a result."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from bench.harness import records
from bench.harness.targets import TARGETS

CARD = "Test Card 9000"

RATES = {
    "copy_bytes_per_s": 4.0e12,
    "bf16_flops_per_s": 8.0e14,
    "fp32_flops_per_s": 5.0e13,
    "tf32_flops_per_s": 4.0e14,
}

ORIGIN = {
    "gpu": CARD,
    "cpu": "some processor",
    "driver": "580.1",
    "cuda": "13.0",
    "torch": "2.13.0",
    "triton": "3.7.1",
    "python": "3.12.3",
    "commit": "0123456789abcdef",
    "dirty": False,
    "command": "python -m bench --full",
    "utc": "2026-01-02T03:04:05Z",
}

PASSED = {"status": "passed", "tests": 12, "failed": 0, "command": "python -m pytest"}


def record(**changes: Any) -> dict[str, Any]:
    """A whole record of temporal attention, three times as fast as the best of its peers."""
    workload = TARGETS[2].workload
    made = {
        "op": workload.op,
        "direction": workload.direction,
        "shape": dict(workload.shape),
        "dtype": workload.dtype,
        "backend": "triton",
        "us": {"p20": 99.0, "p50": 100.0, "p80": 101.0},
        "wall_us": 130.0,
        "timer": "graph",
        "input_sets": 2,
        "cold": True,
        "peak_bytes": 1000,
        "bytes": 340_000_000,
        "flops": 1000,
        "dram_bytes": None,
        "bound_us": 85.0,
        "percent_of_bound": 85.0,
        "percent_of_copy": 85.0,
        "peers": {"eager": 900.0, "compile": 300.0, "sdpa_flash": "error: RuntimeError: no"},
        "peers_wall_us": {"eager": 950.0, "compile": 340.0},
        "peers_peak_bytes": {"eager": 2000, "compile": 1500},
        "peers_timer": {"eager": "graph", "compile": "graph"},
        "best_peer": "compile",
        "speedup_vs_best_peer": 3.0,
        "error_vs_fp64": 1e-3,
        "peers_error_vs_fp64": {"eager": 2e-3},
        "kernels": {"ours": ["temporal_attention_rows_forward"]},
        "op_tests": dict(PASSED),
        "setting": "full",
        "rates": dict(RATES),
        "note": None,
        "provenance": dict(ORIGIN),
    }
    return copy.deepcopy(made | changes)


def step(**changes: Any) -> dict[str, Any]:
    """A train step of ViT-B in two variants, one of which failed."""
    made = {
        "backbone": "base",
        "batch": 32,
        "precision": "bf16",
        "shape": {"T": 3, "K": 15, "height": 256, "width": 192},
        "variants": {
            "eager reference": {
                "clips_per_s": 200.0,
                "ms": {"p20": 159.0, "p50": 160.0, "p80": 161.0},
                "peak_bytes": 30_000_000_000,
                "model_flops_per_clip": 655_000_000_000,
                "mfu": 0.13,
                "loss": 3.0,
                "parts_ms": {"input": 1.0, "backbone": 159.0},
            },
            "ours": {
                "clips_per_s": 700.0,
                "ms": {"p20": 45.0, "p50": 45.7, "p80": 46.0},
                "peak_bytes": 20_000_000_000,
                "model_flops_per_clip": 655_000_000_000,
                "mfu": 0.46,
                "loss": 3.0,
                "parts_ms": {"input": 0.5, "backbone": 45.0},
            },
            "compiled reference": "error: RuntimeError: no",
        },
        "rates": dict(RATES),
        "note": None,
        "provenance": dict(ORIGIN),
    }
    return copy.deepcopy(made | changes)


def content(*found: dict[str, Any], steps: tuple[dict[str, Any], ...] = ()) -> dict[str, Any]:
    """A results file's content."""
    made = records.load_or_empty(Path("none"), CARD)
    records.add(made, found, steps)
    return made
