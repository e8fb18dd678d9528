"""Writes the generated parts of docs/performance.md: ``make performance-docs``.

    python -m bench.report [--check]

Figures come from ``bench/results`` only. ``--check`` writes nothing and fails if anything is
stale or was edited.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import traffic
from bench.harness import records
from bench.profile import results
from bench.report import charts, profiles, tables
from bench.report.markers import rendered
from bench.report.tables import NOT_YET, Card
from cmpose.provenance import PROJECT

PAGE = PROJECT / "docs" / "performance.md"
ON_CPU = records.RESULTS / "cpu" / "ops.json"
GAIN = records.RESULTS / "cpu" / "gain.json"
IMAGES = PROJECT / "docs" / "images" / "performance"


def render(page: Path, cards: list[Card]) -> tuple[str, dict[str, bytes]]:
    """The page with its generated parts renewed, and its charts by file name."""
    on_cpu = records.load(ON_CPU)["records"] if ON_CPU.is_file() else []
    gain = records.load_as(GAIN, records.Gain) if GAIN.is_file() else None
    drawn = {name: svg for card in cards for name, svg in charts.draw(card).items()}
    pictures = "\n\n".join(f"![{name}](images/performance/{name})" for name in drawn)
    parts = {
        "status": tables.status(cards),
        "targets": tables.targets(cards),
        "charts": pictures or f"Charts: none; {NOT_YET}.",
        "results": tables.results(cards),
        "train-step": tables.train_step(cards),
        "estimates": profiles.hot_spots(results.load(results.TARGETS, "profiles"), cards),
        "published": profiles.published(results.load(results.PUBLISHED, "published")),
        "estimated-peers": profiles.peers(results.load(results.PEERS, "peers")),
        "cpu-ratios": tables.cpu_ratios(on_cpu),
        "cpu-gain": tables.cpu_gain(gain),
        "bytes": traffic.table(traffic.count()),
    }
    return rendered(page.read_text(), parts), drawn


def problems(page: Path, images: Path, cards: list[Card]) -> list[str]:
    """What on the page or among its charts is stale or was edited."""
    text, drawn = render(page, cards)
    said = [why for name, svg in drawn.items() if (why := charts.stale(images / name, svg))]
    if text != page.read_text():
        said.append(f"{page.name}: a generated part is stale or was edited")
    extra = {path.name for path in images.glob("*.svg")} - set(drawn)
    return said + [f"{name} belongs to no records" for name in sorted(extra)]


def write(page: Path, images: Path, cards: list[Card]) -> None:
    """Renews the page and its charts."""
    text, drawn = render(page, cards)
    page.write_text(text)
    for path in images.glob("*.svg"):
        path.unlink()
    for name, svg in drawn.items():
        images.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(svg)


def gpu_cards(folder: Path = records.RESULTS) -> list[Card]:
    """Committed results of GPUs; a CPU's are no performance results."""
    cards = [records.load(path) for path in sorted(folder.glob("*.json"))]
    return [c for c in cards if all(r["provenance"]["gpu"] for r in c["records"])]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report")
    parser.add_argument("--check", action="store_true", help="writes nothing; fails if stale")
    options = parser.parse_args(arguments)
    cards = gpu_cards()
    if not options.check:
        write(PAGE, IMAGES, cards)
        return 0
    said = problems(PAGE, IMAGES, cards)
    print("\n".join([*said, "run make performance-docs"] if said else ["up to date"]))
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main())
