"""Bounds by hand, rates by an injected clock, Nsight Compute's CSV."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from bench.gpu import dram_bytes
from bench.harness import bound, records, timing
from bench.harness.bound import RTX_4090, Rates
from bench.harness.shapes import BF16, FP32
from tests.bench.samples import RATES, content, record

H200 = Rates(4.3e12, 788e12, 50e12, 386e12)


def test_a_bound_is_the_larger_of_two_times() -> None:
    assert H200.bound_us(4.3e12, 0, BF16) == 1e6
    assert H200.bound_us(4.3e12, 2 * 788e12, BF16) == 2e6
    # float32 may take its own units or three TF32 products.
    assert H200.bound_us(0, 386e12 / 3, FP32) == 1e6
    assert RTX_4090.bound_us(0, 82.6e12, FP32) == 1e6


class Counting(timing.Clock):
    """Each pass takes half a second."""

    def seconds(self, ready: timing.Pass) -> float:
        return 0.5


def test_rates_count_both_sides_of_a_copy_and_two_operations_a_product() -> None:
    assert set(RATES) == set(asdict(Rates(**RATES)))  # as records hold them
    before = torch.get_float32_matmul_precision()
    result = bound.measure_rates("cpu", Counting(), side=64, copied=4096)
    assert result.copy_bytes_per_s == 2 * 4096 / 0.5
    assert result.bf16_flops_per_s == result.fp32_flops_per_s == 2 * 64**3 / 0.5
    assert torch.get_float32_matmul_precision() == before


CSV = """==PROF== Connected to process 1
some output
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","a","dram__bytes_read.sum","Mbyte","1,200.5"
"0","1","a","dram__bytes_write.sum","Kbyte","500"
"1","1","b","dram__bytes_read.sum","byte","7"
"1","1","b","dram__bytes_write.sum","Gbyte","0.001"
"1","1","b","sm__cycles_elapsed.max","cycle","99"
"""


def test_bytes_of_ncu_are_summed_over_kernels() -> None:
    assert dram_bytes.summed(CSV) == 1_200_500_000 + 500_000 + 7 + 1_000_000


def test_output_without_the_metrics_is_an_error() -> None:
    with pytest.raises(ValueError, match="run ncu with --csv"):
        dram_bytes.summed("==ERROR== no permission\n")
    with pytest.raises(ValueError, match=r"no metric dram__bytes_write\.sum"):
        dram_bytes.summed("\n".join(x for x in CSV.splitlines() if "write" not in x))


def test_counted_bytes_are_put_into_the_records_of_the_reference_shape(tmp_path: Path) -> None:
    other = record(shape={**record()["shape"], "T": 8})
    held = content(record(), record(backend="cuda"), other)
    dram_bytes.put(held, "temporal_attention", "forward", {"triton": 12345})
    assert [r["dram_bytes"] for r in held["records"]] == [12345, None, None]
    records.save(tmp_path / "r.json", held)
    line = dram_bytes.command("dpc_knn", "forward", "cuda")
    assert line[:6] == ["ncu", "--csv", "--profile-from-start", "off", "--clock-control", "none"]
    assert line[-5:] == ["dpc_knn", "--once", "forward", "--backend", "cuda"]
