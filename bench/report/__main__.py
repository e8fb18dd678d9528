"""Writes the generated parts of docs/performance.md: ``make performance-docs``.

    python -m bench.report [--check]

Figures come from ``bench/results/*.json`` only. ``--check`` writes nothing and fails if anything is
stale or was edited.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench import traffic
from bench.harness import records
from bench.report import charts, tables
from bench.report.markers import rendered
from bench.report.tables import NOT_YET, Card
from cmpose.provenance import PROJECT

PAGE = PROJECT / "docs" / "performance.md"
IMAGES = PROJECT / "docs" / "images" / "performance"


def parts(cards: list[Card], drawn: dict[str, bytes]) -> dict[str, str]:
    """All generated parts of the page."""
    pictures = "\n\n".join(f"![{name}](images/performance/{name})" for name in drawn)
    return {
        "status": tables.status(cards),
        "targets": tables.targets(cards),
        "charts": pictures or f"Charts: none; {NOT_YET}.",
        "results": tables.results(cards),
        "train-step": tables.train_step(cards),
        "estimates": tables.estimates(cards),
        "bytes": traffic.table(traffic.count()),
    }


def problems(page: Path, images: Path, cards: list[Card]) -> list[str]:
    """What on the page or among its charts is stale or was edited."""
    drawn: dict[str, bytes] = {}
    said = []
    for card in cards:
        own = charts.draw(card)
        drawn |= own
        said += [why for name, svg in own.items() if (why := charts.stale(images / name, svg))]
    text = page.read_text()
    if rendered(text, parts(cards, drawn)) != text:
        said.append(f"{page.name}: a generated part is stale or was edited")
    extra = {path.name for path in images.glob("*.svg")} - set(drawn)
    return said + [f"{name} belongs to no records" for name in sorted(extra)]


def write(page: Path, images: Path, cards: list[Card]) -> None:
    """Renews the page and its charts."""
    drawn = {name: content for card in cards for name, content in charts.draw(card).items()}
    page.write_text(rendered(page.read_text(), parts(cards, drawn)))
    for path in images.glob("*.svg"):
        if path.name not in drawn:
            path.unlink()
    for name, content in drawn.items():
        images.mkdir(parents=True, exist_ok=True)
        (images / name).write_bytes(content)


def gpu_cards(folder: Path = records.RESULTS) -> list[Card]:
    """Committed results of GPUs; a CPU's are no performance results."""
    cards = records.all_cards(folder)
    return [c for c in cards if all(r["provenance"]["gpu"] for r in c["records"])]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.report", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--check", action="store_true", help="writes nothing; fails if stale")
    options = parser.parse_args(arguments)
    cards = gpu_cards()
    if options.check:
        said = problems(PAGE, IMAGES, cards)
        print("\n".join([*said, "run make performance-docs"] if said else ["up to date"]))
        return int(bool(said))
    write(PAGE, IMAGES, cards)
    return 0


if __name__ == "__main__":
    sys.exit(main())
