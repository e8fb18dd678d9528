"""The parts of a document that a command writes.

Such a part stands between ``<!-- generated: NAME -->`` and ``<!-- end: NAME -->``; the rest of the
page is written by hand and left alone.
"""

from __future__ import annotations

import re


class PageError(ValueError):
    """A page's markers are not as they should be."""


def rendered(text: str, parts: dict[str, str]) -> str:
    """The page with every generated part replaced.

    Raises:
        PageError: a part has no place, a place has no part, or a marker is alone.
    """
    names = re.findall(r"<!-- generated: ([\w-]+) -->", text)
    for name in names:
        if name not in parts:
            raise PageError(f"no part is called {name!r}; there are {', '.join(parts)}")
    for name, content in parts.items():
        start, end = f"<!-- generated: {name} -->", f"<!-- end: {name} -->"
        if names.count(name) != 1 or text.count(end) != 1:
            raise PageError(f"the page must have {start!r} and {end!r} once each")
        before, rest = text.split(start)
        if end not in rest:
            raise PageError(f"{end!r} stands before {start!r}")
        text = f"{before}{start}\n\n{content.strip()}\n\n{end}{rest.split(end)[1]}"
    return text
