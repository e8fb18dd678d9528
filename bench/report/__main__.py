"""Writes the generated parts of docs/performance.md: ``make performance-docs``.

Figures come from ``bench/results`` only.
"""

from __future__ import annotations

from pathlib import Path

from bench import traffic
from bench.harness import records
from bench.profile import results
from bench.profile import tables as profiles
from bench.report import tables
from bench.report.tables import Card, rendered
from cmpose.files import write_text
from cmpose.provenance import PROJECT

PAGE = PROJECT / "docs" / "performance.md"
ON_CPU = records.RESULTS / "cpu" / "ops.json"
GAIN = records.RESULTS / "cpu" / "gain.json"
COUNTERS = "counters-*.json"


def render(page: Path, cards: list[Card]) -> str:
    """The page with its generated parts renewed."""
    parts = {
        "status": tables.status(cards),
        "targets": tables.targets(cards),
        "charts": tables.charts(cards),
        "results": tables.results(cards),
        "train-step": tables.train_step(cards),
        "estimates": profiles.hot_spots(results.load(results.TARGETS, "profiles"), cards),
        "published": profiles.published(results.load(results.PUBLISHED, "published")),
        "counters": profiles.counters(counted(), read_counters()),
        "estimated-peers": profiles.peers(results.load(results.PEERS, "peers")),
        "cpu-ratios": tables.cpu_ratios(records.load(ON_CPU)["records"]),
        "cpu-gain": tables.cpu_gain(records.load(GAIN, records.Gain)),
        "bytes": traffic.table(),
    }
    return rendered(page.read_text(), parts)


def gpu_cards(folder: Path = records.RESULTS) -> list[Card]:
    """Committed results of GPUs; a CPU's are no performance results."""
    paths = [path for path in sorted(folder.glob("*.json")) if not path.match(COUNTERS)]
    cards = map(records.load, paths)
    return [
        c for c in cards if all(of["provenance"]["gpu"] for of in c["records"] + c["train_step"])
    ]


def counted() -> list[records.Record]:
    """Profiles of the targets: of the code that cards ran when their counters were read, then of
    today's."""
    paths = [*sorted(results.FOLDER.glob("counted-*.json")), results.TARGETS]
    return [profile for path in paths for profile in results.load(path, "profiles")]


def read_counters(folder: Path = records.RESULTS) -> list[records.Record]:
    """Committed counters of cards."""
    return [records.load(path, records.Counters) for path in sorted(folder.glob(COUNTERS))]


def main() -> None:
    write_text(PAGE, render(PAGE, gpu_cards()))


if __name__ == "__main__":
    main()
