"""Profiles as records: what ``--json`` writes, and the two files that the documents are made from.

They hold counts, bounds and estimates, never a measurement; ``bench/results/<card>.json`` has
those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bench.harness import records
from bench.harness.records import Positive, Record, SchemaError, Text, struct
from cmpose import provenance
from cmpose.data.formats.reader import convert, parse_file
from cmpose.files import write_json

if TYPE_CHECKING:  # the documents are written without Triton
    from bench.harness.workload import Workload
    from bench.profile import model
    from bench.profile.published import Published

VERSION = 1
FOLDER = records.RESULTS / "profile"
PUBLISHED = FOLDER / "published.json"
TARGETS = FOLDER / "targets.json"

NotNegative = records.NotNegative

Launch = struct(
    "Launch",
    counts=dict[str, Any],
    blocks_an_sm=records.Count,
    limit=Text,
    waves=Positive,
    tail=NotNegative,
    us=dict[str, NotNegative],
    bound_us=NotNegative,
    bound_by=Text,
    estimate_us=Positive,
)
_TIMES = {"bound_us": Positive, "bound_by": Text, "estimate_us": Positive, "band": Positive}
ProfileRecord = struct(
    "ProfileRecord",
    op=Text,
    direction=Text,
    shape=dict[str, records.Count],
    dtype=Text,
    card=Text,
    arch=records.Count,
    floor_us=NotNegative,
    target_us=Positive | None,
    launches=list[Launch],  # type: ignore[valid-type]
    provenance=records.Provenance,
    **_TIMES,
)
PublishedRecord = struct(
    "PublishedRecord",
    kernel=Text,
    card=Text,
    figure=Positive,
    unit=Text,
    source=Text,
    published_us=Positive,
    error=float,
    launches=list[Launch],  # type: ignore[valid-type]
    provenance=records.Provenance,
    **_TIMES,
)
File = struct(
    "File",
    schema=Literal[VERSION],
    profiles=list[ProfileRecord],  # type: ignore[valid-type]
    published=list[PublishedRecord],  # type: ignore[valid-type]
)


def _launch(launch: model.Launch) -> Record:
    counts = asdict(launch.counts)
    counts["access_bytes"] = {str(size): n for size, n in counts["access_bytes"].items()}
    return {
        "counts": counts,
        "blocks_an_sm": launch.occupancy.blocks,
        "limit": launch.occupancy.limit,
        "waves": launch.occupancy.waves,
        "tail": launch.occupancy.tail,
        "us": launch.times,
        "bound_us": launch.bound_us,
        "bound_by": launch.bound_by,
        "estimate_us": launch.estimate_us,
    }


def _common(profile: model.Profile) -> Record:
    return {
        "card": profile.card.name,
        "bound_us": profile.bound_us,
        "bound_by": profile.bound_by,
        "estimate_us": profile.estimate_us,
        "band": profile.band,
        "launches": [_launch(launch) for launch in profile.launches],
        "provenance": provenance.provenance(),
    }


def record(workload: Workload, profile: model.Profile, target_us: float | None) -> Record:
    """Of an op's workload."""
    return {
        **asdict(workload),
        **_common(profile),
        "arch": profile.card.arch,
        "floor_us": profile.floor_us,
        "target_us": target_us,
    }


def published_record(row: Published, profile: model.Profile) -> Record:
    """Of a published figure; its error is the estimate over the published time, less 1."""
    return {
        **_common(profile),
        "kernel": row.kernel,
        "figure": float(row.figure),
        "unit": row.unit,
        "source": row.source,
        "published_us": row.us,
        "error": profile.estimate_us / row.us - 1,
    }


def load(path: Path) -> Record:
    """Reads a file of profiles; raises SchemaError, which names the file and the field."""
    content = parse_file(path, SchemaError)
    convert(content, File, path.name, SchemaError)
    return content


def load_or_empty(path: Path) -> Record:
    """What a file holds; nothing if there is none. Raises SchemaError as ``load`` does."""
    return load(path) if path.is_file() else {"profiles": [], "published": []}


def put(path: Path, workload: Workload, card: str, record: Record | None) -> None:
    """Puts a workload's profile into a file, in place of an earlier one; None takes that out."""
    names = asdict(workload) | {"card": card}
    held = load_or_empty(path)["profiles"]
    others = [old for old in held if any(old[name] != value for name, value in names.items())]
    save(path, profiles=[*others, *([record] if record else [])])


def save(path: Path, profiles: Sequence[Record] = (), published: Sequence[Record] = ()) -> None:
    """Checks and writes a file of profiles."""
    content = {"schema": VERSION, "profiles": list(profiles), "published": list(published)}
    convert(content, File, path.name, SchemaError)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, content)
