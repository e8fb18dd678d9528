"""Makes a report into one HTML file, which holds its text, pictures, script and data itself."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from typing import Any

from cmpose import _version

_SCRIPTS = ("charts.js", "explorer.js", "page.js")
_LONGEST = 400
"""A line in a chart has at most so many points; neighbours of a longer one are averaged."""


@dataclass
class Line:
    """A curve: ``points`` are (x, y) in order of x."""

    name: str
    points: list[tuple[float, float]]


@dataclass
class Chart:
    """Curves over one x.

    Attributes:
        title: what the curves show.
        x: the name of the x axis.
        lines: at most eight, because there are eight colours; the first is drawn on top.
        note: written below the title.
        log: whether y has a logarithmic scale, if every value is positive.
        zero: whether y starts at 0, if its scale is not logarithmic.
    """

    title: str
    x: str
    lines: list[Line]
    note: str = ""
    log: bool = False
    zero: bool = True


@dataclass
class Table:
    """Numbers by row and column. None is shown as a dash, and rows named in ``strong`` in bold."""

    caption: str
    columns: list[str]
    rows: list[tuple[str, list[float | None]]]
    strong: frozenset[str] = frozenset()


@dataclass
class Tile:
    """A picture (a data URI) with two lines of text; ``clip`` is what a click on it opens."""

    picture: str
    alt: str
    heading: str
    detail: str
    clip: int | None = None


@dataclass
class ClipFrame:
    """One frame of a clip.

    Attributes:
        label: its name.
        record: as ``cmpose.viz.record`` makes it.
        note: written beside it.
        head: the head's size in crop pixels, by which errors are divided; None if not known.
    """

    label: str
    record: dict[str, Any]
    note: str = ""
    head: float | None = None


@dataclass
class Clip:
    """Frames of one person; ``start`` is the one that is shown first."""

    name: str
    frames: list[ClipFrame]
    start: int = 0


@dataclass
class Report:
    """What a page shows. If a part is empty, its entry in ``absent`` is written in its stead.

    Attributes:
        kind: of what, e.g. ``Training run``.
        title: its name.
        lead: the gist, in a sentence or two.
        charts: of losses or scores; if empty, ``absent["curves"]``.
        tables: of AP; if empty, ``absent["ap"]``.
        table_notes: what a reader of the tables should know.
        measure: says how worst and best are measured.
        worst: tiles, the worst first; if empty, ``absent["clips"]``.
        best: tiles, the best first.
        clips: to look into; if empty, ``absent["tokens"]``.
        clips_intro: written above the clips.
        facts: (name, value).
        absent: part → why it is not there.
        groups: what ``worst`` and ``best`` are called.
    """

    kind: str
    title: str
    lead: str
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    table_notes: list[str] = field(default_factory=list)
    measure: str = ""
    worst: list[Tile] = field(default_factory=list)
    best: list[Tile] = field(default_factory=list)
    clips: list[Clip] = field(default_factory=list)
    clips_intro: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    groups: tuple[str, str] = ("Worst", "Best")


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most 400 points: of more, runs of equal length are replaced by their mean, at their end.

    The last point's x is kept.
    """
    length = -(-len(points) // _LONGEST)
    if length <= 1:
        return list(points)
    runs = [points[i : i + length] for i in range(0, len(points), length)]
    return [(run[-1][0], sum(y for _, y in run) / len(run)) for run in runs]


def embedded_json(value: Any) -> str:
    """JSON that may stand in a ``<script>`` element: no ``<``, so that nothing in it ends it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def render(report: Report) -> str:
    """The page; its policy forbids to load anything but its own script, style and data URIs."""
    style = _asset("page.css")
    script = "\n".join(_asset(name) for name in _SCRIPTS)
    data = {
        "charts": [
            {
                "title": chart.title,
                "x": chart.x,
                "log": chart.log,
                "zero": chart.zero,
                "lines": [
                    {"name": line.name, "points": thinned(line.points)} for line in chart.lines
                ],
            }
            for chart in report.charts
        ],
        "clips": [
            {
                "start": clip.start,
                "frames": [
                    {"label": f.label, "note": f.note, "head": f.head, "record": f.record}
                    for f in clip.frames
                ],
            }
            for clip in report.clips
        ],
    }
    return _fill(
        "page.html",
        style_hash=_hash(style),
        script_hash=_hash(script),
        version=escape(_version.__version__),
        kind=escape(report.kind),
        title=escape(report.title),
        lead=escape(report.lead),
        style=style,
        script=script,
        curves=_charts(report),
        ap=_tables(report),
        clips=_tiles(report),
        tokens=_explorer(report),
        facts=_facts(report),
        foot=escape(
            f"Written by cmpose {_version.__version__}. This file is all there is: it loads "
            "nothing and sends nothing."
        ),
        data=embedded_json(data),
    )


def _asset(name: str) -> str:
    return (files("cmpose.report") / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """A source that a content security policy lets through."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _fill(template: str, **slots: str) -> str:
    """Puts slots into ``{{name}}``, in one pass: what is put in is not looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda slot: slots[slot[1]], _asset(template))


def _absent(report: Report, part: str) -> str:
    return f'<p class="absent">{escape(report.absent[part])}</p>'


def _charts(report: Report) -> str:
    if not report.charts:
        return _absent(report, "curves")
    drawn = []
    for chart in report.charts:
        longest = max(len(line.points) for line in chart.lines)
        note = chart.note
        if longest > _LONGEST:
            note += f" Each point is the mean of {-(-longest // _LONGEST)} logged ones."
        drawn.append(
            f'<figure class="chart"><figcaption><b>{escape(chart.title)}</b>'
            f"<span>{escape(note.strip())}</span></figcaption>"
            '<div class="legend" role="group" aria-label="Curves"></div>'
            '<div class="plot"></div><p class="reading" aria-live="polite"></p></figure>'
        )
    said = _absent(report, "curves") if "curves" in report.absent else ""
    return said + f'<div class="charts">{"".join(drawn)}</div>'


def _tables(report: Report) -> str:
    if not report.tables:
        return _absent(report, "ap")
    parts = [f"<p>{escape(note)}</p>" for note in report.table_notes]
    parts.append('<div class="ap">')
    for table in report.tables:
        head = "".join(f'<th scope="col" class="number">{escape(c)}</th>' for c in table.columns)
        rows = []
        for name, values in table.rows:
            cells = "".join(
                f'<td class="number">{"–" if value is None else f"{value:.1f}"}</td>'
                for value in values
            )
            strong = ' class="strong"' if name in table.strong else ""
            rows.append(f'<tr{strong}><th scope="row">{escape(name)}</th>{cells}</tr>')
        parts.append(
            f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(table.caption)}">'
            f"<table><caption>{escape(table.caption)}</caption>"
            f'<thead><tr><th scope="col"></th>{head}</tr></thead>'
            f"<tbody>{''.join(rows)}</tbody></table></div>"
        )
    return "".join(parts) + "</div>"


def _tiles(report: Report) -> str:
    if not report.worst:
        return _absent(report, "clips")
    measure = report.measure
    if any(tile.clip is not None for tile in report.worst + report.best):
        measure += " A click on a picture opens it below."
    parts = [f"<p>{escape(measure)}</p>"]
    for name, tiles in zip(report.groups, (report.worst, report.best), strict=True):
        if not tiles:
            continue
        parts.append(f'<h3>{escape(name)}</h3><ul class="tiles">')
        for tile in tiles:
            inside = (
                f'<img src="{escape(tile.picture)}" alt="{escape(tile.alt)}">'
                f"<b>{escape(tile.heading)}</b><span>{escape(tile.detail)}</span>"
            )
            if tile.clip is not None:
                inside = f'<button type="button" data-clip="{tile.clip}">{inside}</button>'
            parts.append(f'<li class="tile">{inside}</li>')
        parts.append("</ul>")
    return "".join(parts)


def _explorer(report: Report) -> str:
    if not report.clips:
        return _absent(report, "tokens")
    options = "".join(
        f'<option value="{i}">{escape(clip.name)}</option>' for i, clip in enumerate(report.clips)
    )
    return _fill("explorer.html", intro=escape(report.clips_intro), options=options)


def _facts(report: Report) -> str:
    entries = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in report.facts)
    return f"<dl>{entries}</dl>"
