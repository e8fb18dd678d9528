"""Records of measurements: their schema, and the files that hold them.

``bench/results/<card>.json`` is ``{"schema", "card", "records", "train_step", "runs"}``. It is
written by the commands of this folder and never by hand; a file is written beside the old one and
renamed, so that a cut run leaves a whole file behind.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from bench.provenance import PROJECT, slug

VERSION = 1
RESULTS = PROJECT / "bench" / "results"

Record = dict[str, Any]


class SchemaError(ValueError):
    """A record is not as it should be; the message starts with the field's path."""


# -- the schema -----------------------------------------------------------------------------------

Check = Callable[[str, Any], None]


def _fail(path: str, what: str, value: Any) -> None:
    raise SchemaError(f"{path} must be {what}, got {value!r}")


def text(path: str, value: Any) -> None:
    if not isinstance(value, str) or not value:
        _fail(path, "text", value)


def flag(path: str, value: Any) -> None:
    if not isinstance(value, bool):
        _fail(path, "true or false", value)


def count(path: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        _fail(path, "a whole number ≥ 0", value)


def positive(path: str, value: Any) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value <= 0:
        _fail(path, "a finite number > 0", value)


def not_negative(path: str, value: Any) -> None:
    if value != 0:
        positive(path, value)


def one_of(*names: str) -> Check:
    def check(path: str, value: Any) -> None:
        if value not in names:
            _fail(path, f"one of {', '.join(names)}", value)

    return check


def or_none(check: Check) -> Check:
    def checked(path: str, value: Any) -> None:
        if value is not None:
            check(path, value)

    return checked


def time_or_error(path: str, value: Any) -> None:
    if isinstance(value, str):
        if not value.startswith("error: ") or len(value) <= len("error: "):
            _fail(path, "microseconds or 'error: <message>'", value)
    else:
        positive(path, value)


def mapping(check: Check) -> Check:
    def checked(path: str, value: Any) -> None:
        if not isinstance(value, dict):
            _fail(path, "an object", value)
        for name, entry in value.items():
            check(f"{path}.{name}", entry)

    return checked


def _list(check: Check) -> Check:
    def checked(path: str, value: Any) -> None:
        if not isinstance(value, list):
            _fail(path, "a list", value)
        for index, entry in enumerate(value):
            check(f"{path}[{index}]", entry)

    return checked


def fields(**checks: Check) -> Check:
    def checked(path: str, value: Any) -> None:
        if not isinstance(value, dict):
            _fail(path, "an object", value)
        for name in checks:
            if name not in value:
                raise SchemaError(f"{path}.{name} is missing")
        for name in value:
            if name not in checks:
                raise SchemaError(f"{path}.{name} is no field; there are {', '.join(checks)}")
        for name, check in checks.items():
            check(f"{path}.{name}", value[name])

    return checked


_QUANTILES = fields(p20=positive, p50=positive, p80=positive)

PROVENANCE = fields(
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

RATES = fields(
    copy_bytes_per_s=positive,
    bf16_flops_per_s=positive,
    fp32_flops_per_s=positive,
    tf32_flops_per_s=positive,
)

GATE = fields(status=one_of("passed", "failed", "not run"), tests=count, failed=count, command=text)

_RECORD = fields(
    op=text,
    direction=one_of("forward", "backward", "forward_backward"),
    shape=mapping(count),
    dtype=text,
    backend=text,
    us=_QUANTILES,
    wall_us=positive,
    timer=one_of("graph", "events", "host"),
    input_sets=count,
    cold=flag,
    peak_bytes=count,
    bytes=count,
    flops=count,
    measured_bytes=or_none(count),
    floor_us=positive,
    percent_of_floor=positive,
    percent_of_copy=positive,
    peers=mapping(time_or_error),
    peers_wall_us=mapping(positive),
    peers_peak_bytes=mapping(count),
    peers_timer=mapping(one_of("graph", "events", "host")),
    best_peer=or_none(text),
    speedup_vs_best_peer=or_none(positive),
    error_vs_fp64=or_none(not_negative),
    peers_error_vs_fp64=mapping(not_negative),
    kernels=mapping(_list(text)),
    gate=GATE,
    setting=one_of("quick", "full"),
    rates=RATES,
    note=or_none(text),
    provenance=PROVENANCE,
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


def _variant(path: str, value: Any) -> None:
    if isinstance(value, str):
        time_or_error(path, value)
    else:
        _VARIANT(path, value)


_TRAIN_STEP = fields(
    backbone=text,
    batch=count,
    precision=one_of("bf16", "fp32"),
    shape=mapping(count),
    variants=mapping(_variant),
    rates=RATES,
    note=or_none(text),
    provenance=PROVENANCE,
)

_RUN = fields(
    stage=text,
    status=one_of("passed", "failed", "cut"),
    seconds=not_negative,
    counts=mapping(count),
    details=_list(text),
    provenance=PROVENANCE,
)

_FILE = fields(
    schema=count,
    card=text,
    records=_list(_RECORD),
    train_step=_list(_TRAIN_STEP),
    runs=mapping(_RUN),
)


def check_record(record: Record, path: str = "record") -> None:
    """Raises SchemaError unless a record is whole and says nothing that it must not.

    Beyond types: quantiles ascend, the best peer is a peer that ran under the same timer and none
    is faster, and a speed-up stands only where the op's contract passed in the same run, is that
    of the medians, and belongs to a GPU.
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
    gate = record["gate"]
    if gate["status"] != "passed" or not gate["tests"] or gate["failed"]:
        _fail(f"{path}.speedup_vs_best_peer", "null unless the op's tests passed", speedup)
    if record["provenance"]["gpu"] is None:
        _fail(f"{path}.speedup_vs_best_peer", "null without a GPU", speedup)
    if best is None or not math.isclose(speedup, comparable[best] / us["p50"], rel_tol=1e-3):
        _fail(f"{path}.speedup_vs_best_peer", "best peer over p50", speedup)


def check_file(content: Any, path: str = "results") -> None:
    """Raises SchemaError unless a results file is as it should be."""
    _FILE(path, content)
    if content["schema"] != VERSION:
        _fail(f"{path}.schema", f"{VERSION}", content["schema"])
    for index, record in enumerate(content["records"]):
        check_record(record, f"{path}.records[{index}]")
        gpu = record["provenance"]["gpu"] or record["provenance"]["cpu"]
        if gpu != content["card"]:
            _fail(f"{path}.records[{index}].provenance", f"of {content['card']}", gpu)


# -- files ----------------------------------------------------------------------------------------


def key(record: Record) -> tuple[Any, ...]:
    """What a record is of; a newer one of the same key replaces it."""
    shape = tuple(sorted(record["shape"].items()))
    return record["op"], record["direction"], shape, record["dtype"], record["backend"]


def _step_key(step: Record) -> tuple[Any, ...]:
    return step["backbone"], step["batch"], step["precision"]


def empty(card: str) -> Record:
    """A results file without results."""
    return {"schema": VERSION, "card": card, "records": [], "train_step": [], "runs": {}}


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
    """Reads a results file if it is there.

    Raises:
        SchemaError: it is not as it should be, or is another card's.
    """
    if not path.is_file():
        return empty(card)
    content = load(path)
    if content["card"] != card:
        raise SchemaError(
            f"{path.name}: card is {content['card']!r}, this machine's is {card!r}; "
            "give another --json"
        )
    return content


def write_json(path: Path, content: Any) -> None:
    """Writes beside ``path`` and renames."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_text(json.dumps(content, indent=1, ensure_ascii=False, sort_keys=False) + "\n")
    os.replace(beside, path)


def save(path: Path, content: Record) -> None:
    """Checks and writes a results file."""
    check_file(content, path.name)
    write_json(path, content)


def add(content: Record, records: Iterable[Record] = (), steps: Iterable[Record] = ()) -> None:
    """Puts records into a results file, in the place of older ones of the same key."""
    for name, new, key_of in (("records", records, key), ("train_step", steps, _step_key)):
        held = {key_of(entry): entry for entry in content[name]}
        held |= {key_of(entry): entry for entry in new}
        content[name] = list(held.values())


def all_cards(folder: Path = RESULTS) -> list[Record]:
    """Every committed results file, by card."""
    return [load(path) for path in sorted(folder.glob("*.json"))]
