"""The least time that a case can take, from rates measured on the card in the same run.

    python -m bench.roofline [--json FILE] [--ncu CSV --op OP --direction DIRECTION]

The floor of a case is the larger of its bytes over the card's copy rate and its matrix products'
operations over the card's matrix rate in that dtype. Bytes are algorithmic: each input element that
is needed read once, each output written once.

The command prints what these say of an RTX 4090, from its datasheet. Nothing of it was measured on
one: every such figure is a prediction and says so. With ``--ncu`` the bytes are those that Nsight
Compute counted on the card at hand:

    ncu --csv --profile-from-start off --metrics dram__bytes_read.sum,dram__bytes_write.sum \\
        python -m bench OP --once DIRECTION > CSV
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import timing
from bench.cases import FP32, element_size

PREDICTION = "prediction"


@dataclass(frozen=True)
class Rates:
    """What a card does in a second.

    Attributes:
        copy_bytes_per_s: read and written bytes of a large device-to-device copy.
        bf16_flops_per_s, fp32_flops_per_s, tf32_flops_per_s: of a large square matrix product.
    """

    copy_bytes_per_s: float
    bf16_flops_per_s: float
    fp32_flops_per_s: float
    tf32_flops_per_s: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def matrix(self, dtype: str) -> float:
        """Products of a dtype at its full precision.

        float32 takes its own units or three TF32 products, whichever is faster: kernels may do
        either, and a floor that a kernel could beat would be none.
        """
        if dtype == FP32:
            return max(self.fp32_flops_per_s, self.tf32_flops_per_s / 3)
        return self.bf16_flops_per_s


RTX_4090 = Rates(1008e9, 165.2e12, 82.6e12, 82.6e12)
"""Datasheet: 1,008 GB/s; dense rates with float32 accumulation."""


def floor_seconds(moved: float, flops: float, dtype: str, rates: Rates) -> float:
    """max(bytes / copy rate, flops / matrix rate)."""
    return max(moved / rates.copy_bytes_per_s, flops / rates.matrix(dtype))


# -- measuring the card ---------------------------------------------------------------------------


def _median_seconds(call: Callable[[], Any], clock: timing.Clock, samples: int) -> float:
    ready = clock.prepare(lambda: [call])
    return sorted(clock.seconds(ready) for _ in range(samples))[samples // 2]


def measure_rates(
    device: str, clock: timing.Clock | None = None, *, side: int = 0, copied: int = 0
) -> Rates:
    """The rates of the card, or of the CPU, in this process and now.

    Args:
        device: ``cuda`` or ``cpu``.
        clock: None is the device's.
        side: of the square matrices; 0 takes 8192 on a card.
        copied: bytes of the tensor that is copied; 0 takes 2 GiB on a card.
    """
    clock = clock or timing.clock_for(device)
    on_card = device == "cuda"
    side = side or (8192 if on_card else 512)
    copied = copied or ((1 << 31) if on_card else (1 << 26))
    if on_card:
        copied = min(copied, timing.free_bytes(device) // 4)
    samples = 10 if on_card else 3
    source = torch.empty(copied // 4, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / _median_seconds(lambda: target.copy_(source), clock, samples)
    rates = {}
    for name, dtype, precision in (
        ("bf16", torch.bfloat16, "highest"),
        ("fp32", torch.float32, "highest"),
        ("tf32", torch.float32, "high"),
    ):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            seconds = _median_seconds(partial(torch.mm, a, b, out=out), clock, samples)
        finally:
            torch.set_float32_matmul_precision(before)
        rates[name] = 2 * side**3 / seconds
    return Rates(copy, rates["bf16"], rates["fp32"], rates["tf32"])


# -- Nsight Compute -------------------------------------------------------------------------------

_UNITS = {"byte": 1, "kbyte": 1e3, "mbyte": 1e6, "gbyte": 1e9}
NCU_METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum")


def ncu_bytes(text: str) -> int:
    """Bytes that all kernels of an ``ncu --csv`` output read from and wrote to device memory.

    Raises:
        ValueError: there is no such metric in it.
    """
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        raise ValueError('no line of ncu\'s CSV header ("ID",...): run ncu with --csv')
    total, seen = 0.0, set()
    for row in csv.DictReader(io.StringIO("\n".join(lines[start:]))):
        if row.get("Metric Name") in NCU_METRICS:
            unit = _UNITS[row["Metric Unit"].lower()]
            total += float(row["Metric Value"].replace(",", "")) * unit
            seen.add(row["Metric Name"])
    missing = [name for name in NCU_METRICS if name not in seen]
    if missing:
        raise ValueError(
            f"no metric {missing[0]} in ncu's CSV: run it with --metrics {','.join(NCU_METRICS)}"
        )
    return round(total)


# -- the RTX 4090 ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """What the datasheet of a card that was not measured says of a case.

    Attributes:
        floor_us: no implementation is faster.
        us: at the percentage of its floor that was reached on the card that was measured; None
            without such a measurement.
        bytes_are: ``algorithmic`` or ``measured by ncu``.
        label: always ``prediction``.
    """

    floor_us: float
    us: float | None
    bytes_are: str
    label: str = PREDICTION


def predict_4090(
    moved: int,
    flops: int,
    dtype: str,
    *,
    measured_bytes: int | None = None,
    percent_of_floor: float | None = None,
) -> Prediction:
    """The 4090's floor for a case and, from what was reached elsewhere, a time.

    Args:
        moved, flops: algorithmic.
        dtype: of the case.
        measured_bytes: by ncu; they replace ``moved``. Another L2 cache may change them.
        percent_of_floor: reached on another card.
    """
    counted = moved if measured_bytes is None else measured_bytes
    floor = floor_seconds(counted, flops, dtype, RTX_4090) * 1e6
    reached = None
    if percent_of_floor:
        algorithmic = floor_seconds(moved, flops, dtype, RTX_4090) * 1e6
        reached = algorithmic / (percent_of_floor / 100)
    return Prediction(
        round(floor, 2),
        None if reached is None else round(reached, 2),
        "algorithmic" if measured_bytes is None else "measured by ncu",
    )


def table(rows: list[tuple[str, Prediction]]) -> str:
    """As a Markdown table."""
    lines = [
        "| case | RTX 4090 floor, µs (prediction) | RTX 4090 time, µs (prediction) | bytes are |",
        "|---|---|---|---|",
    ]
    for name, p in rows:
        time = "–" if p.us is None else f"{p.us:,.1f}"
        lines.append(f"| {name} | {p.floor_us:,.1f} | {time} | {p.bytes_are} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    from bench import records, targets

    parser = argparse.ArgumentParser(
        prog="python -m bench.roofline", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--json", type=Path, help="results of a card whose percentages are used")
    parser.add_argument("--ncu", type=Path, help="ncu's CSV of one call")
    parser.add_argument("--op", help="what --ncu is of")
    parser.add_argument("--direction", default="forward")
    options = parser.parse_args(arguments)
    if options.ncu and not options.op:
        parser.error("--ncu needs --op")
    held = records.load(options.json)["records"] if options.json else []
    counted = ncu_bytes(options.ncu.read_text()) if options.ncu else None
    rows = []
    for target in targets.TARGETS:
        case = target.case
        bench = targets.bench_of(case.op)
        record = targets.best_record(held, case)
        own = counted if (case.op, case.direction) == (options.op, options.direction) else None
        if own is None and record is not None:
            own = record["measured_bytes"]
        prediction = predict_4090(
            bench.bytes(case.shape, element_size(case.dtype), case.direction),
            bench.flops(case.shape, case.direction),
            case.dtype,
            measured_bytes=own,
            percent_of_floor=record["percent_of_floor"] if record else None,
        )
        rows.append((str(case), prediction))
    print("Predictions from the RTX 4090's datasheet; nothing here was measured on one.")
    print(table(rows))


if __name__ == "__main__":
    main()
