"""Records of measurements: their schema, and the files that hold them.

``bench/results/<card>.json`` is written by the commands of this folder and never by hand; it
appears whole or not at all, so that a cut run leaves a whole file behind. A :class:`Journal` tells
the next process what a cut run was doing and has done.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from bench.harness.workload import Workload
from cmpose.data.formats.reader import convert, parse_file
from cmpose.files import write_json
from cmpose.provenance import PROJECT

VERSION = 3
RESULTS = PROJECT / "bench" / "results"
NOT_A_RESULT = "CPU: not a performance result"

SLOWER = 1.10
"""A time may be this many times the one on record."""

Record = dict[str, Any]


class SchemaError(ValueError):
    """A record is not as it should be; the message names the field."""


_LARGEST = sys.float_info.max  # excludes infinity; nan is within no limits
Text = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0, le=_LARGEST)]
NotNegative = Annotated[float, Meta(ge=0, le=_LARGEST)]
Failure = Annotated[str, Meta(pattern="^(error|does not fit): .")]
Timer = Literal["graph", "events", "host"]


def struct(name: str, **fields: Any) -> Any:
    """An object that has these fields and no others; a field may be a pair of kind and default."""
    each = [(key, *(kind if isinstance(kind, tuple) else (kind,))) for key, kind in fields.items()]
    return msgspec.defstruct(name, each, forbid_unknown_fields=True)


def _all(kind: Any, names: str) -> dict[str, Any]:
    """Fields of one kind."""
    return dict.fromkeys(names.split(), kind)


Quantiles = struct("Quantiles", **_all(Positive, "p20 p50 p80"))
_RATES = "copy_bytes_per_s bf16_flops_per_s fp32_flops_per_s tf32_flops_per_s"
Rates = struct("Rates", **_all(Positive, _RATES))
Provenance = struct(
    "Provenance",
    **_all(Text, "cpu torch python commit command utc"),
    **_all(Text | None, "gpu driver cuda triton"),
    dirty=bool,
)
Verdict = Literal["passed", "failed", "not run"]
OpTests = struct("OpTests", status=Verdict, command=Text, **_all(Count, "tests failed"))
# One workload on one backend; docs/benchmarks.md says what each field means.
OpRecord = struct(
    "OpRecord",
    **_all(Text, "op dtype backend"),
    **_all(Count, "input_sets peak_bytes bytes flops"),
    **_all(Positive, "wall_us bound_us percent_of_bound percent_of_copy"),
    direction=Literal["forward", "backward", "forward_backward"],
    **_all(dict[str, Count], "shape peers_peak_bytes"),
    us=Quantiles,
    timer=Timer,
    cold=bool,
    peers=dict[str, Positive | Failure],
    peers_wall_us=dict[str, Positive],
    peers_timer=dict[str, Timer],
    peers_error_vs_fp64=dict[str, NotNegative],
    **_all(Text | None, "best_peer note"),
    speedup_vs_best_peer=Positive | None,
    error_vs_fp64=NotNegative | None,
    kernels=dict[str, list[Text]],
    op_tests=OpTests,
    setting=Literal["quick", "full"],
    rates=Rates,
    provenance=Provenance,
)
Variant = struct(
    "Variant",
    **_all(Count, "peak_bytes model_flops_per_clip"),
    **_all(Positive | None, "mfu loss"),
    clips_per_s=Positive,
    ms=Quantiles,
    parts_ms=dict[str, NotNegative],
)
TrainStep = struct(
    "TrainStep",
    backbone=Text,
    batch=Count,
    precision=Literal["bf16", "fp32"],
    shape=dict[str, Count],
    variants=dict[str, Variant | Failure],  # type: ignore[valid-type]
    rates=Rates,
    note=Text | None,
    provenance=Provenance,
)
StageRun = struct(
    "StageRun",
    stage=Text,
    status=Literal["passed", "failed", "cut", "not run"],
    seconds=NotNegative,
    counts=dict[str, Count],
    details=list[Text],
    provenance=Provenance,
)
Results = struct(
    "Results",
    schema=Literal[VERSION],
    card=Text,
    records=list[OpRecord],  # type: ignore[valid-type]
    train_step=list[TrainStep],  # type: ignore[valid-type]
    runs=dict[str, StageRun],  # type: ignore[valid-type]
)


# What the ops' path for a CPU gains: bench/cpu_gain.py.
_GAIN = struct("GainRow", case=Text, threads=Count, **_all(Positive, "auto reference gain"))
Gain = struct("Gain", provenance=Provenance, pairs=Count, rows=list[_GAIN])  # type: ignore[valid-type]
# What a prediction costs: bench/predict.py.
_PREDICTED = struct(
    "PredictRow", model=Text, **_all(Count, "people frames"), fps=Positive, ms=dict[str, float]
)
Prediction = struct(
    "Prediction",
    **_all(Text, "benchmark opencv"),
    threads=Count,
    frame_size=list[Count],
    detector_ms=Positive,
    rows=list[_PREDICTED],  # type: ignore[valid-type]
    provenance=Provenance,
    note=(str, ""),  # which the command wrote once
)
# What the card's counters say of the targets' workloads: bench/counters.py.
_READ = struct(
    "ReadKernel",
    kernel=Text,
    **_all(Count, "launches registers"),
    **_all(Positive, "us instructions"),
    **_all(
        NotNegative | None,
        "sectors_read sectors_written dram_bytes_read dram_bytes_written shared_wavefronts "
        "shared_conflicts issue_percent warps_percent",
    ),
)
_READ_WORKLOAD = struct(
    "ReadWorkload",
    **_all(Text, "op direction dtype backend"),
    shape=dict[str, Count],
    kernels=list[_READ],  # type: ignore[valid-type]
)
Counters = struct(
    "Counters",
    card=Text,
    workloads=list[_READ_WORKLOAD],  # type: ignore[valid-type]
    provenance=Provenance,
)


def check(content: Any, kind: Any = Results, source: str = "results") -> None:
    """Raises SchemaError, which names the field, unless the content is of that kind.

    An op's records must also say nothing that they must not, see :func:`_check_claims`; in a card's
    file all are that card's. ``source`` is what messages call the content.
    """
    convert(content, kind, source, SchemaError)
    if kind is OpRecord:
        _check_claims(content, f"{source}: ")
    for index, record in enumerate(content["records"] if kind is Results else ()):
        _check_claims(record, f"{source}: records[{index}].")
        machine = record["provenance"]["gpu"] or record["provenance"]["cpu"]
        if machine != content["card"]:
            where = f"{source}: records[{index}].provenance"
            raise SchemaError(f"{where}: expected that of {content['card']}, got {machine!r}")


def _check_claims(record: Record, at: str) -> None:
    """Raises SchemaError unless quantiles ascend, the best peer is a peer that ran under the same
    timer and none is faster, and a speed-up stands only where the op's tests passed in the same
    run, is that of the medians, and belongs to a GPU."""

    def require(holds: bool, field: str, expected: str) -> None:
        if not holds:
            raise SchemaError(f"{at}{field}: expected {expected}, got {record[field]!r}")

    us = record["us"]
    require(us["p20"] <= us["p50"] <= us["p80"], "us", "ascending quantiles")
    ran = [n for n, t in record["peers"].items() if not isinstance(t, str)]
    require(
        set(record["peers_timer"]) == set(ran), "peers_timer", f"those of the peers that ran, {ran}"
    )
    times = comparable(record)
    best = next(iter(times), None)
    require(record["best_peer"] == best, "best_peer", f"{best!r}, the fastest under this timer")
    speedup, tests = record["speedup_vs_best_peer"], record["op_tests"]
    if speedup is not None:
        proven = tests["status"] == "passed" and tests["tests"] and not tests["failed"]
        field = "speedup_vs_best_peer"
        require(proven, field, "null, as the op's tests did not pass")
        require(record["provenance"]["gpu"] is not None, field, "null without a GPU")
        ratio = times[best] / us["p50"] if best else 0.0
        require(math.isclose(speedup, ratio, rel_tol=1e-3), field, "best peer over p50")


def comparable(record: Record) -> dict[str, float]:
    """Times that ours may be compared with, the shortest first: of peers under the same timer."""
    timers = record["peers_timer"]
    times = [(t, n) for n, t in record["peers"].items() if timers.get(n) == record["timer"]]
    return {name: time for time, name in sorted(times)}


def load(path: Path, kind: Any = Results) -> Record:
    """Reads a file; raises SchemaError, which names the file and the field."""
    content = parse_file(path, SchemaError)
    check(content, kind, path.name)
    return content


def save(path: Path, content: Record, kind: Any = Results) -> None:
    """Checks and writes a file."""
    check(content, kind, path.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)


def slug(name: str) -> str:
    """A card's name as a file's: ``NVIDIA GeForce RTX 4090`` → ``nvidia-geforce-rtx-4090``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def counters_beside(results: Path) -> Path:
    """The file of a card's counters, beside that of its times."""
    return results.with_name(f"counters-{results.name}")


def load_or_empty(path: Path, card: str) -> Record:
    """Reads a card's results file, or gives an empty one; raises SchemaError as ``load`` does."""
    if not path.is_file():
        return {"schema": VERSION, "card": card, "records": [], "train_step": [], "runs": {}}
    content = load(path)
    if content["card"] != card:
        raise SchemaError(
            f"{path.name}: card is {content['card']!r}, this machine's is {card!r}; "
            "give another --json"
        )
    return content


def key(entry: Record) -> str:
    """What a record or a train step is of; of two that are of the same the newer one is kept."""
    names = ("op", "direction", "shape", "dtype", "backend", "backbone", "batch", "precision")
    return json.dumps([entry.get(name) for name in names], sort_keys=True)


def slow_downs(content: Record, records: Iterable[Record]) -> list[str]:
    """Which records of a card are over 10 % slower than those whose place they are to take."""
    before = {key(r): r for r in content["records"] if r["provenance"]["gpu"]}
    pairs = ((new, before.get(key(new))) for new in records)
    return [
        f"{new['backend']}: {new['us']['p50']:,.1f} µs, over 10 % more than the "
        f"{old['us']['p50']:,.1f} µs of commit {old['provenance']['commit'][:9]}"
        for new, old in pairs
        if old and new["us"]["p50"] > SLOWER * old["us"]["p50"]
    ]


def add(content: Record, records: Iterable[Record] = (), steps: Iterable[Record] = ()) -> None:
    """Puts records into a results file; a newer one replaces the older of the same workload."""
    for name, new in (("records", records), ("train_step", steps)):
        content[name] = list({key(entry): entry for entry in [*content[name], *new]}.values())


class Journal:
    """Kept in a file, which a process that is lost leaves to the one that follows it.

    Args:
        path: None keeps nothing on disk.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.state: dict[str, Any] = {"running": None, "died": [], "failed": {}, "done": []}
        if path is not None and path.is_file():
            self.state = json.loads(path.read_text())
        if (lost := self.state["running"]) is not None:
            # The process before this one did not get past it; once can have been lack of time.
            if lost in self.state["died"]:
                workload, entrant = lost
                self.fail(workload, entrant, "error: the process died or was stopped in it twice")
            self.state["died"].append(lost)
            self._save()

    def _save(self, running: list[str] | None = None) -> None:
        self.state["running"] = running
        if self.path is not None:
            write_json(self.path, self.state)

    def began(self, workload: Workload, entrant: str) -> None:
        self._save([str(workload), entrant])

    def fail(self, workload: str, entrant: str, message: str) -> None:
        self.state["failed"].setdefault(workload, {})[entrant] = message
        self._save()

    def failures(self, workload: Workload) -> dict[str, str]:
        """Entrant → why it failed in a process before this one."""
        return self.state["failed"].get(str(workload), {})

    def finish(self, workload: Workload) -> None:
        self.state["done"].append(str(workload))
        self._save()

    def is_done(self, workload: Workload) -> bool:
        return str(workload) in self.state["done"]
