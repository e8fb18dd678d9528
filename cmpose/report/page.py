"""Makes a report into one HTML file, which holds its text, pictures, script and data itself."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Sequence
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
class Thumbnail:
    """A picture with two lines of text; a click opens what it shows.

    Attributes:
        picture: a data URI.
        alt: what it shows, for those who do not see it.
        heading: the first line.
        detail: the second.
        clip: the person's, an index into the report's clips; None where nothing is known of them.
        shown: whether that clip starts with this very frame: then a click opens the clip, else the
            picture, large, beside a way to the clip.
        large: what is opened in its place, a data URI; empty: the picture itself.
    """

    picture: str
    alt: str
    heading: str
    detail: str
    clip: int | None = None
    shown: bool = True
    large: str = ""


@dataclass
class ClipFrame:
    """One frame of a clip.

    Attributes:
        label: its name.
        record: as ``cmpose.viz.record`` makes it.
        note: written beside it.
        size: what errors are divided by, in crop pixels; None if not known.
        unit: the name of that.
    """

    label: str
    record: dict[str, Any]
    note: str = ""
    size: float | None = None
    unit: str = "head sizes"


@dataclass
class Clip:
    """Frames of one person; ``start`` is the one that is shown first."""

    name: str
    frames: list[ClipFrame]
    start: int = 0


@dataclass
class Report:
    """What a page shows. If a part is empty, its entry in ``absent`` is written in its stead.

    A part without an entry there is left out of the page.

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
        sources: reports of which the page shows one at a time, below what it shows of this one.
        sources_are: what they are, e.g. ``Video``.
    """

    kind: str
    title: str
    lead: str
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    table_notes: list[str] = field(default_factory=list)
    measure: str = ""
    worst: list[Thumbnail] = field(default_factory=list)
    best: list[Thumbnail] = field(default_factory=list)
    clips: list[Clip] = field(default_factory=list)
    clips_intro: str = ""
    facts: list[tuple[str, str]] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    groups: tuple[str, str] = ("Worst", "Best")
    sources: list[Report] = field(default_factory=list)
    sources_are: str = "Source"

    def parts(self) -> list[Report]:
        """This report and those of its sources."""
        return [self, *self.sources]


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
        "charts": [_chart_data(chart) for part in report.parts() for chart in part.charts],
        "clips": [
            _clip_data(clip, number - 1)
            for number, part in enumerate(report.parts())
            for clip in part.clips
        ],
    }
    sections = {
        ("curves", "Curves", "Curves"): _of_parts(report, "curves", _charts),
        ("ap", "AP", "Average precision"): _of_parts(report, "ap", _tables),
        ("clips", _groups(report), ""): _clips(report),
        ("tokens", "Tokens", "What a pose was read from"): _explorer(report),
        ("facts", "Facts", "Facts"): _of_parts(report, "facts", _facts),
    }
    sections = {names: text for names, text in sections.items() if text}
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
        nav="\n".join(f'<a href="#{part}">{escape(name)}</a>' for part, name, _ in sections),
        choice=_choice(report),
        sections="\n".join(
            f'<section id="{part}" aria-labelledby="{part}-title">\n'
            f'<h2 id="{part}-title">{escape(title or name)}</h2>\n{text}\n</section>'
            for (part, name, title), text in sections.items()
        ),
        foot=escape(
            f"Written by cmpose {_version.__version__}. This file is all there is: it loads "
            "nothing and sends nothing."
        ),
        data=embedded_json(data),
    )


def _chart_data(chart: Chart) -> dict[str, Any]:
    lines = [{"name": line.name, "points": thinned(line.points)} for line in chart.lines]
    return {
        "title": chart.title,
        "x": chart.x,
        "log": chart.log,
        "zero": chart.zero,
        "lines": lines,
    }


def _clip_data(clip: Clip, source: int) -> dict[str, Any]:
    """A clip as the page's script reads it; ``source`` is negative where there are none."""
    frames = [
        {"label": f.label, "note": f.note, "size": f.size, "unit": f.unit, "record": f.record}
        for f in clip.frames
    ]
    return {"name": clip.name, "start": clip.start, "source": source, "frames": frames}


def _choice(report: Report) -> str:
    """What chooses one of the sources; nothing where there are none."""
    if not report.sources:
        return ""
    options = "".join(
        f'<option value="{i}">{escape(part.title)}</option>'
        for i, part in enumerate(report.sources)
    )
    return (
        f'<label class="field choice"><span>{escape(report.sources_are)}</span>'
        f'<select id="source">{options}</select></label>'
    )


def _of_parts(report: Report, part: str, draw: Callable[[Report], str]) -> str:
    """A section: of the report, then of each source, in an element that can be hidden.

    Args:
        report: the page's.
        part: the section's key in ``absent``.
        draw: what makes the section of one report; nothing where it has nothing to show.
    """
    drawn = []
    for number, each in enumerate(report.parts()):
        text = draw(each) or _absent(each, part)
        if text and number:
            text = (
                f'<div data-source="{number - 1}"><h3 class="source">{escape(each.title)}</h3>'
                f"{text}</div>"
            )
        drawn.append(text)
    return "".join(drawn)


def _asset(name: str) -> str:
    return (files("cmpose.report") / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """A source that a content security policy lets through."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _fill(template: str, **slots: str) -> str:
    """Puts slots into ``{{name}}``, in one pass: what is put in is not looked at again."""
    return re.sub(r"\{\{(\w+)\}\}", lambda slot: slots[slot[1]], _asset(template))


def _absent(report: Report, part: str) -> str:
    reason = report.absent.get(part, "")
    return f'<p class="absent">{escape(reason)}</p>' if reason else ""


def _charts(report: Report) -> str:
    if not report.charts:
        return ""
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
    return _absent(report, "curves") + f'<div class="charts">{"".join(drawn)}</div>'


def _tables(report: Report) -> str:
    if not report.tables:
        return ""
    parts = [f"<p>{escape(note)}</p>" for note in report.table_notes]
    parts.append('<div class="ap">')
    for table in report.tables:
        head = "".join(f'<th scope="col" class="number">{_heading(c)}</th>' for c in table.columns)
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


def _heading(column: str) -> str:
    """A column's heading: what stands in brackets is a line of its own."""
    name, bracket, rest = column.partition(" (")
    more = f"<span>{escape(bracket.strip() + rest)}</span>" if bracket else ""
    return escape(name) + more


def _groups(report: Report) -> str:
    """``Worst and best``: of the report, or of its first source."""
    shown = [part for part in report.parts() if part.worst] or [report]
    worst, best = shown[0].groups
    if not any(part.best for part in shown):
        return worst
    return f"{worst} and {best.lower()}" if best else worst


def _clips(report: Report) -> str:
    first = 0  # of a part's clips among those of the page
    numbers = {}
    for part in report.parts():
        numbers[id(part)] = first
        first += len(part.clips)
    return _of_parts(report, "clips", lambda part: _tiles(part, numbers[id(part)]))


def _tiles(report: Report, first: int) -> str:
    if not report.worst:
        return ""
    parts = [f"<p>{escape(report.measure)} A click on a picture opens it.</p>"]
    for name, tiles in zip(report.groups, (report.worst, report.best), strict=True):
        if not tiles:
            continue
        parts.append(f'<h3>{escape(name)}</h3><ul class="tiles">')
        parts += [f'<li class="tile">{_tile(tile, first)}</li>' for tile in tiles]
        parts.append("</ul>")
    return "".join(parts)


def _tile(tile: Thumbnail, first: int) -> str:
    opens = "" if tile.clip is None else f' data-clip="{first + tile.clip}"'
    if tile.clip is None or not tile.shown:
        opens += f' data-large="{escape(tile.large)}"'
    return (
        f'<button type="button"{opens}><img src="{escape(tile.picture)}" alt="{escape(tile.alt)}">'
        f"<b>{escape(tile.heading)}</b><span>{escape(tile.detail)}</span></button>"
    )


def _explorer(report: Report) -> str:
    if not any(part.clips for part in report.parts()):
        return _of_parts(report, "tokens", lambda part: "")
    intros = _of_parts(
        report, "tokens", lambda part: f"<p>{escape(part.clips_intro)}</p>" if part.clips else ""
    )
    return intros + _asset("explorer.html")


def _facts(report: Report) -> str:
    entries = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in report.facts if v)
    return f"<dl>{entries}</dl>" if entries else ""
