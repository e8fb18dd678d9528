"""Records of measurements: their schema, and the files that hold them.

``bench/results/<card>.json`` is written by the commands of this folder and never by hand; it
appears whole or not at all, so that a cut run leaves a whole file behind.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from cmpose.files import write_json
from cmpose.provenance import PROJECT

VERSION = 2
RESULTS = PROJECT / "bench" / "results"
NOT_A_RESULT = "CPU: not a performance result"

Record = dict[str, Any]


class SchemaError(ValueError):
    """A record is not as it should be; the message starts with the field's path."""


# -- the schema -----------------------------------------------------------------------------------

Check = Callable[[str, Any], None]
"""(path of a value in the file, the value) → raises SchemaError unless it is as it should be."""


def _fail(path: str, what: str, value: Any) -> NoReturn:
    raise SchemaError(f"{path} must be {what}, got {value!r}")


def _value(what: str, holds: Callable[[Any], bool]) -> Check:
    def check(path: str, value: Any) -> None:
        if not holds(value):
            _fail(path, what, value)

    return check


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_time_or_failure(value: Any) -> bool:
    if isinstance(value, str):
        return value.startswith("error: ") and len(value) > len("error: ")
    return _is_number(value) and value > 0


text = _value("text", lambda v: isinstance(v, str) and v != "")
flag = _value("true or false", lambda v: isinstance(v, bool))
count = _value("a whole number ≥ 0", lambda v: type(v) is int and v >= 0)
positive = _value("a finite number > 0", lambda v: _is_number(v) and v > 0)
not_negative = _value("a finite number ≥ 0", lambda v: _is_number(v) and v >= 0)
time_or_failure = _value("microseconds or 'error: <message>'", _is_time_or_failure)


def one_of(*names: str) -> Check:
    return _value(f"one of {', '.join(names)}", lambda v: v in names)


def or_none(check: Check) -> Check:
    return lambda path, value: None if value is None else check(path, value)


def mapping(check: Check) -> Check:
    """An object whose values are all alike."""

    def checked(path: str, value: Any) -> None:
        if not isinstance(value, dict):
            _fail(path, "an object", value)
        for name, entry in value.items():
            check(f"{path}.{name}", entry)

    return checked


def list_of(check: Check) -> Check:
    def checked(path: str, value: Any) -> None:
        if not isinstance(value, list):
            _fail(path, "a list", value)
        for index, entry in enumerate(value):
            check(f"{path}[{index}]", entry)

    return checked


def fields(**checks: Check) -> Check:
    """An object that has these fields, all of them, and no others."""

    def checked(path: str, value: Any) -> None:
        if not isinstance(value, dict):
            _fail(path, "an object", value)
        for name in checks:
            if name not in value:
                raise SchemaError(f"{path}.{name} is missing")
        for name, entry in value.items():
            if name not in checks:
                raise SchemaError(f"{path}.{name} is no field; there are {', '.join(checks)}")
            checks[name](f"{path}.{name}", entry)

    return checked


_QUANTILES = fields(p20=positive, p50=positive, p80=positive)
_TIMER = one_of("graph", "events", "host")

_PROVENANCE = fields(
    gpu=or_none(text),
    cpu=text,
    driver=or_none(text),
    cuda=or_none(text),
    torch=text,
    triton=or_none(text),
    python=text,
    commit=text,
    dirty=flag,
    command=text,
    utc=text,
)

_RATES = fields(
    copy_bytes_per_s=positive,
    bf16_flops_per_s=positive,
    fp32_flops_per_s=positive,
    tf32_flops_per_s=positive,
)

_OP_TESTS = fields(
    status=one_of("passed", "failed", "not run"), tests=count, failed=count, command=text
)

# One workload on one backend; docs/benchmarks.md says what each field means.
_RECORD = fields(
    op=text,
    direction=one_of("forward", "backward", "forward_backward"),
    shape=mapping(count),
    dtype=text,
    backend=text,
    us=_QUANTILES,
    wall_us=positive,
    timer=_TIMER,
    input_sets=count,
    cold=flag,
    peak_bytes=count,
    bytes=count,
    flops=count,
    dram_bytes=or_none(count),
    bound_us=positive,
    percent_of_bound=positive,
    percent_of_copy=positive,
    peers=mapping(time_or_failure),
    peers_wall_us=mapping(positive),
    peers_peak_bytes=mapping(count),
    peers_timer=mapping(_TIMER),
    best_peer=or_none(text),
    speedup_vs_best_peer=or_none(positive),
    error_vs_fp64=or_none(not_negative),
    peers_error_vs_fp64=mapping(not_negative),
    kernels=mapping(list_of(text)),
    op_tests=_OP_TESTS,
    setting=one_of("quick", "full"),
    rates=_RATES,
    note=or_none(text),
    provenance=_PROVENANCE,
)

_VARIANT = fields(
    clips_per_s=positive,
    ms=_QUANTILES,
    peak_bytes=count,
    model_flops_per_clip=count,
    mfu=or_none(positive),
    loss=or_none(positive),
    parts_ms=mapping(not_negative),
)


def _variant_or_failure(path: str, value: Any) -> None:
    check = time_or_failure if isinstance(value, str) else _VARIANT
    check(path, value)


_TRAIN_STEP = fields(
    backbone=text,
    batch=count,
    precision=one_of("bf16", "fp32"),
    shape=mapping(count),
    variants=mapping(_variant_or_failure),
    rates=_RATES,
    note=or_none(text),
    provenance=_PROVENANCE,
)

_STAGE_RUN = fields(
    stage=text,
    status=one_of("passed", "failed", "cut"),
    seconds=not_negative,
    counts=mapping(count),
    details=list_of(text),
    provenance=_PROVENANCE,
)

_RESULTS = fields(
    schema=count,
    card=text,
    records=list_of(_RECORD),
    train_step=list_of(_TRAIN_STEP),
    runs=mapping(_STAGE_RUN),
)


def check_record(record: Record, path: str = "record") -> None:
    """Raises SchemaError unless a record is whole and says nothing that it must not.

    Beyond types: quantiles ascend, the best peer is a peer that ran under the same timer and none
    is faster, and a speed-up stands only where the op's tests passed in the same run, is that of
    the medians, and belongs to a GPU.
    """
    _RECORD(path, record)
    us, peers = record["us"], record["peers"]
    if not us["p20"] <= us["p50"] <= us["p80"]:
        _fail(f"{path}.us", "ascending quantiles", us)
    timers = record["peers_timer"]
    ran = {n: t for n, t in peers.items() if not isinstance(t, str)}
    if set(timers) != set(ran):
        _fail(f"{path}.peers_timer", f"of the peers that ran ({', '.join(ran)})", sorted(timers))
    comparable = {n: t for n, t in ran.items() if timers[n] == record["timer"]}
    best = min(comparable, key=comparable.__getitem__, default=None)
    if record["best_peer"] != best:
        _fail(f"{path}.best_peer", f"{best!r}, the fastest that ran alike", record["best_peer"])
    speedup = record["speedup_vs_best_peer"]
    if speedup is None:
        return
    op_tests = record["op_tests"]
    if op_tests["status"] != "passed" or not op_tests["tests"] or op_tests["failed"]:
        _fail(f"{path}.speedup_vs_best_peer", "null unless the op's tests passed", speedup)
    if record["provenance"]["gpu"] is None:
        _fail(f"{path}.speedup_vs_best_peer", "null without a GPU", speedup)
    if best is None or not math.isclose(speedup, comparable[best] / us["p50"], rel_tol=1e-3):
        _fail(f"{path}.speedup_vs_best_peer", "best peer over p50", speedup)


def check_file(content: Any, path: str = "results") -> None:
    """Raises SchemaError unless a results file is as it should be."""
    _RESULTS(path, content)
    if content["schema"] != VERSION:
        _fail(f"{path}.schema", f"{VERSION}", content["schema"])
    for index, record in enumerate(content["records"]):
        check_record(record, f"{path}.records[{index}]")
        machine = record["provenance"]["gpu"] or record["provenance"]["cpu"]
        if machine != content["card"]:
            _fail(f"{path}.records[{index}].provenance", f"of {content['card']}", machine)


# -- files ----------------------------------------------------------------------------------------


def slug(name: str) -> str:
    """A card's name as a file's: ``NVIDIA GeForce RTX 4090`` → ``nvidia-geforce-rtx-4090``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def path_of(card: str) -> Path:
    """Where a card's results are committed."""
    return RESULTS / f"{slug(card)}.json"


def load(path: Path) -> Record:
    """Reads a results file.

    Raises:
        SchemaError: naming the file and the field.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise SchemaError(f"{path.name} is not JSON: {error}") from None
    check_file(content, path.name)
    return content


def load_or_empty(path: Path, card: str) -> Record:
    """Reads a card's results file, or gives one without results if there is none.

    Raises:
        SchemaError: it is not as it should be, or is another card's.
    """
    if not path.is_file():
        return {"schema": VERSION, "card": card, "records": [], "train_step": [], "runs": {}}
    content = load(path)
    if content["card"] != card:
        raise SchemaError(
            f"{path.name}: card is {content['card']!r}, this machine's is {card!r}; "
            "give another --json"
        )
    return content


def save(path: Path, content: Record) -> None:
    """Checks and writes a results file."""
    check_file(content, path.name)
    write_json(path, content)


def _key(entry: Record) -> tuple[Any, ...]:
    """What a record or a train step is of."""
    if "op" not in entry:
        return entry["backbone"], entry["batch"], entry["precision"]
    shape = tuple(sorted(entry["shape"].items()))
    return entry["op"], entry["direction"], shape, entry["dtype"], entry["backend"]


def add(content: Record, records: Iterable[Record] = (), steps: Iterable[Record] = ()) -> None:
    """Puts records into a results file; a newer one replaces the older of the same workload."""
    for name, new in (("records", records), ("train_step", steps)):
        content[name] = list({_key(entry): entry for entry in [*content[name], *new]}.values())


def all_cards(folder: Path = RESULTS) -> list[Record]:
    """Every committed results file, by card."""
    return [load(path) for path in sorted(folder.glob("*.json"))]
