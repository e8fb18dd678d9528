"""Profiles as records: what ``--json`` writes, and the files that the documents are made from.

They hold counts, bounds and estimates, never a measurement; ``bench/results/<card>.json`` has
those.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from bench.harness import records
from bench.harness.records import Failure, Positive, Record, SchemaError, Text, struct
from cmpose import provenance
from cmpose.data.formats.reader import parse_file

if TYPE_CHECKING:  # the documents are written without Triton
    from bench.profile import model

VERSION = 1
FOLDER = records.RESULTS / "profile"
PUBLISHED = FOLDER / "published.json"
TARGETS = FOLDER / "targets.json"
PEERS = FOLDER / "peers.json"

_WORKLOAD = {"op": Text, "direction": Text, "shape": dict[str, records.Count], "dtype": Text}
_PROFILE = {
    "card": Text,
    "bound_us": Positive,
    "bound_by": Text,
    "estimate_us": Positive,
    "band": Positive,
    "launches": list[dict[str, Any]],
    "provenance": records.Provenance,
}
ProfileRecord = struct(
    "ProfileRecord",
    **_WORKLOAD,
    **_PROFILE,
    backend=Text,
    arch=records.Count,
    floor_us=records.NotNegative,
    target_us=Positive | None,
)
PublishedRecord = struct(
    "PublishedRecord",
    **_PROFILE,
    kernel=Text,
    figure=Positive,
    unit=Text,
    source=Text,
    published_us=Positive,
    error=float,
    arch=(records.Count, 0),  # which older ones do not say, nor that there is no floor
    floor_us=(records.NotNegative, 0.0),
)
_Times = list[tuple[Text, records.NotNegative]]
"""Of kernels or calls, in their order: name, µs."""
Peer = struct("Peer", kernels=_Times, calls=_Times, bound_us=Positive, estimate_us=Positive)
PeersRecord = struct(
    "PeersRecord",
    **_WORKLOAD,
    card=Text,
    estimate_us=Positive,
    peers=dict[str, Peer | Failure],  # type: ignore[valid-type]
    provenance=records.Provenance,
)
_KINDS = {"profiles": ProfileRecord, "published": PublishedRecord, "peers": PeersRecord}
File = struct(
    "File",
    schema=Literal[VERSION],
    **{name: (list[kind], []) for name, kind in _KINDS.items()},  # type: ignore[valid-type]
)


def record(profile: model.Profile, **more: Any) -> Record:
    """A profile, with what else is to be said of it: of which workload, or published figure."""
    plain = msgspec.to_builtins(profile, str_keys=True)
    return {**plain, "provenance": provenance.provenance(), **more}


def load(path: Path, kind: str) -> list[Record]:
    """The ``profiles``, ``published`` or ``peers`` of a file; none if there is no file.

    Raises:
        SchemaError: it is not as it should be; the message names the file and the field.
    """
    content = parse_file(path, SchemaError) if path.is_file() else {"schema": VERSION}
    records.check(content, File, path.name)
    return content.get(kind, [])


def save(path: Path, kind: str, entries: Sequence[Record]) -> None:
    """Checks and writes a file of one kind of records."""
    records.save(path, {"schema": VERSION, kind: list(entries)}, File)


def put(path: Path, kind: str, names: Record, record: Record | None) -> None:
    """Puts a record into a file, in place of the one of these names; None takes that out."""
    others = [old for old in load(path, kind) if not names.items() <= old.items()]
    save(path, kind, [*others, *([record] if record else [])])
