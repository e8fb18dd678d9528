"""How messages about files name a value, and what msgspec found wrong with a document."""

from __future__ import annotations

import math
import re
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from unicodedata import normalize

_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxlist, _repr.maxtuple, _repr.maxdict = 2, 6, 6, 6
_repr.maxstring = _repr.maxother = _repr.maxlong = 60


def short(value: Any) -> str:
    """``repr`` cut to a length that fits in a message, at any depth of nesting."""
    text = _repr.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def folded(name: str) -> str:
    """A name without what differs between file systems: upper case, and how accents are coded."""
    return normalize("NFC", normalize("NFC", name).casefold())


def nearly(name: str, names: Iterable[str]) -> str | None:
    """The first of ``names`` that differs from ``name`` in what :func:`folded` takes away alone."""
    key = folded(name)
    return next((each for each in sorted(names) if each != name and folded(each) == key), None)


ONLY_NEARLY = "differs from it in upper case or its letters' Unicode form alone; write both alike"
"""What is said of such a name."""


def comma_list(names: Iterable[str]) -> str:
    """Names with commas between them, cut to a length that fits in a message."""
    text = ", ".join(names)
    return text if len(text) <= 400 else text[:397] + "..."


def counted(counts: Mapping[str, int]) -> str:
    """``3 × reason, 1 × other reason``, of reasons and how often each was met."""
    met = sorted((reason, count) for reason, count in counts.items() if count)
    return ", ".join(f"{count} × {reason}" for reason, count in met) or "nothing"


_KINDS = {
    "int": "an integer",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_TYPES = {"int": int, "float": float, "str": str, "bool": bool, "array": list, "object": dict}


def message(source: str, path: str, problem: str, remedy: str) -> str:
    """``file: path: what is wrong; what to do``; the last three may be empty."""
    path = path.removeprefix(".")
    path = path if len(path) <= 200 else path[:197] + "..."
    return f"{source}: {path}{': ' if path else ''}{problem}{'; ' if remedy else ''}{remedy}"


def explain(fault: Exception, document: Any) -> tuple[str, str]:
    """The path to what msgspec did not take; what was expected there and what was found."""
    if isinstance(fault, RecursionError):
        return "", "nested too deeply; no such file has more than a few levels"
    text, _, path = str(fault).partition(" - at `$")
    kind = re.search(r", got `(\w+)`$", text)
    steps = re.findall(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]", path.rstrip("`"))
    values = _values_at(document, [a or b for a, b in steps], kind and kind[1])
    where, value = next(values, ("", None))
    if missing := re.fullmatch(r"Object missing required field `(.+)`", text):
        return where, f"missing key {missing[1]!r}; it has {short(sorted(value or ()))}"
    return where, _misfit(text, value)


def _misfit(text: str, value: Any) -> str:
    """What msgspec says was expected, in the words of this package, and the value."""
    got = f", got {short(value)}"
    if isinstance(value, float) and not math.isfinite(value) and "float" in text.split(",")[0]:
        return f"expected a finite number{got}; leave out what is not known (a keypoint: 0, 0, 0)"
    if text == "Number out of range":
        return f"expected a number that float64 holds{got}"
    if re.match(r"Expected `float` [<>]= -?1000000000\.0", text):
        return f"expected a number of pixels, from -1e9 to 1e9{got}"
    named = re.match(r"Expected `([^`]+)`(?: of length)?(?: (>=|<=))?(?: (\d+))?", text)
    if named is None:
        return text[0].lower() + text[1:].replace("`", "") + got
    kinds = named[1].split(" | ")
    if len(kinds) > 1 and "null" in kinds:
        kinds.remove("null")
    expected = " or ".join(_KINDS.get(kind, kind) for kind in kinds)
    bound = {">=": "at least ", "<=": "at most "}.get(named[2], "")
    if "of length" in text:
        unit = "values" if kinds == ["array"] else "letters"
        return f"expected {bound}{named[3]} {unit}, got {len(value)}: {short(value)}"
    if isinstance(value, int) and abs(value) >= 2**63:
        return f"expected {expected} that int64 holds{got}"
    return f"expected {expected}" + (f" of {bound}{named[3]}" if bound else "") + got


def _values_at(
    document: Any, steps: list[str], kind: str | None, path: str = ""
) -> Iterator[tuple[str, Any]]:
    """What is at a path of msgspec's, with its whole path; ``...`` stands for any key."""
    if not steps:
        if kind is None or kind not in _TYPES or isinstance(document, _TYPES[kind]):
            yield path, document
        return
    step, behind = steps[0], steps[1:]
    if step == "..." and isinstance(document, dict):
        for key, item in document.items():
            yield from _values_at(item, behind, kind, f"{path}.{key}")
    elif isinstance(document, list) and step.isdigit() and int(step) < len(document):
        yield from _values_at(document[int(step)], behind, kind, f"{path}[{step}]")
    elif isinstance(document, dict) and step in document:
        yield from _values_at(document[step], behind, kind, f"{path}.{step}")
