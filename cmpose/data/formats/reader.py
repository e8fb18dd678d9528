"""The one way in which JSON from outside is read: parsed, checked and typed, or refused by name.

A format is a ``msgspec.Struct`` (see the modules beside this one), and :func:`read` gives the
struct of a file. What does not fit is named: the file, the path in the document, what was expected
there and what was found. The text is parsed by Python's ``json``, because it shows what msgspec's
own parser hides: a key that occurs twice, ``NaN``, the line of a fault. msgspec then checks and
types the whole document in one pass.
"""

from __future__ import annotations

import gc
import itertools
import json
import math
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

T = TypeVar("T")
# What raises an error, from its message.
Refuse = Callable[[str], Exception]

Number = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
"""A finite number that float64 holds."""
Whole = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
"""A whole number that int64 holds; 3.0 is read as 3."""
Count = Annotated[int, Meta(ge=0, le=2**63 - 1)]
"""A whole number from 0 on."""


def read(path: Path, type: type[T], refuse: Refuse, remedy: str = "") -> T:
    """A JSON file as ``type``.

    Args:
        path: the file, UTF-8 (or UTF-16 or 32), with or without a byte order mark.
        type: a struct, or another type that msgspec knows.
        refuse: the error to raise; it is given the message.
        remedy: what to do, for the message's end.

    Raises:
        FileNotFoundError: there is no such file.
        Exception: what ``refuse`` makes; its message names file, path, value and what was expected.
    """
    return convert(parse_file(path, refuse, remedy), type, str(path), refuse, remedy=remedy)


def parse_file(path: Path, refuse: Refuse, remedy: str = "") -> Any:
    """A JSON file as plain objects, for :func:`convert`; arguments and errors as :func:`read`."""
    return parse(_bytes_of(path, refuse, remedy), str(path), refuse, remedy)


def parse(data: bytes, source: str, refuse: Refuse, remedy: str = "") -> Any:
    """A JSON document as plain objects.

    Args:
        data: the text's bytes.
        source: what to call it in messages, normally the file.
        refuse: as in :func:`read`.
        remedy: likewise.

    Raises:
        Exception: what ``refuse`` makes: no text, no JSON, nested too deeply, a key twice in an
            object, or half a surrogate pair in a string.
    """
    with _named_faults(source, refuse, remedy), _no_collection():
        text = data.decode(json.detect_encoding(data))
        document = _loads(text)
        if _SURROGATE.search(text) and (at := _path_to_surrogate(document)) is not None:
            raise _Fault("holds half a surrogate pair, which is no character", at)
        return document


def convert(
    document: Any, type: type[T], source: str, refuse: Refuse, at: str = "", remedy: str = ""
) -> T:
    """Plain objects as ``type``; an object that is of the type already is returned as it is.

    Args:
        document: what :func:`parse` returned, or a part of it.
        type: as in :func:`read`.
        source: what to call the document in messages.
        refuse: as in :func:`read`.
        at: the part's path in the document, for messages.
        remedy: as in :func:`read`.

    Raises:
        Exception: what ``refuse`` makes, naming the path, the value and what was expected.
    """
    with _no_collection():
        try:
            return msgspec.convert(document, type)
        except (msgspec.ValidationError, RecursionError) as error:
            fault = error
        if re.match(r"Expected `[^`]*\bint\b[^`]*`, got `float`|.*got `numpy\.", str(fault)):
            document = _plainer(document)
            try:
                return msgspec.convert(document, type)
            except (msgspec.ValidationError, RecursionError) as error:
                fault = error
    path, what = _explain(fault, document)
    raise refuse(_message(source, at + path, what, remedy)) from fault


def read_lines(
    path: Path, type: type[T], refuse: Refuse, remedy: str = ""
) -> Iterator[tuple[str, T]]:
    """The lines of a ``.jsonl`` file, a document each, with what messages call them.

    A last line that is torn, as a killed process leaves it, is dropped.

    Args:
        path: the file.
        type: of a line.
        refuse: as in :func:`read`.
        remedy: likewise.

    Raises:
        FileNotFoundError: there is no such file.
        Exception: what ``refuse`` makes; its message names the file and the line.
    """
    lines = _bytes_of(path, refuse, remedy).split(b"\n")
    for number, line in enumerate(lines, start=1):
        if line.strip():
            source = f"{path}: line {number}"
            try:
                document = parse(line, source, refuse, remedy)
            except Exception:
                if number == len(lines):
                    return
                raise
            yield source, convert(document, type, source, refuse, remedy=remedy)


def read_items(path: Path, type: type[T], refuse: Refuse, remedy: str = "") -> Iterator[T]:
    """The items of a file's JSON list, without holding the file in memory.

    Args:
        path: the file.
        type: of an item.
        refuse: as in :func:`read`.
        remedy: likewise.

    Raises:
        Exception: as :func:`read`, and for a document that is no list.
    """
    for number, item in enumerate(_items(path, refuse, remedy)):
        yield convert(item, type, str(path), refuse, f"[{number}]", remedy)


def refuse_os_error(path: Path, error: OSError, refuse: Refuse, remedy: str = "") -> Exception:
    """The error for a file that is there and cannot be read."""
    return refuse(_message(str(path), "", f"cannot be read ({error.strerror or error})", remedy))


_repr = reprlib.Repr()
_repr.maxlevel, _repr.maxlist, _repr.maxtuple, _repr.maxdict = 2, 6, 6, 6
_repr.maxstring = _repr.maxother = _repr.maxlong = 60


def short(value: Any) -> str:
    """``repr`` cut to a length that fits in a message, at any depth of nesting."""
    text = _repr.repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def comma_list(names: Iterable[str]) -> str:
    """Names with commas between them, cut to a length that fits in a message."""
    text = ", ".join(names)
    return text if len(text) <= 400 else text[:397] + "..."


# -- parsing -------------------------------------------------------------------------------------

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class _Fault(ValueError):
    """What is wrong with a document, and where in it."""

    def __init__(self, what: str, path: str = "") -> None:
        super().__init__(what)
        self.path = path


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's garbage collector would go through a growing document again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def _named_faults(source: str, refuse: Refuse, remedy: str, behind: str = "") -> Iterator[None]:
    """Turns what a parser raises into the caller's error; ``behind`` says how far it came."""
    try:
        yield
    except json.JSONDecodeError as error:
        where = f" at line {error.lineno}, column {error.colno}" if not behind else ""
        what = "not valid JSON" + where + f": {error.msg}{behind}"
        raise refuse(_message(source, "", what, remedy)) from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start : error.start + 1].hex()
        what = f"not valid {error.encoding} text at byte {error.start} (0x{byte}): save it as UTF-8"
        raise refuse(_message(source, "", what, remedy)) from error
    except RecursionError as error:
        what = "nested too deeply; no such file has more than a few levels"
        raise refuse(_message(source, "", what, remedy)) from error
    except _Fault as error:
        raise refuse(_message(source, error.path, str(error), remedy)) from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its keys and values; of a key that occurs twice either value may be meant."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise _Fault(
            f"an object has the key {short(twice)} twice; it has {_listed(found)}; keep one of them"
        )
    return found


def _loads(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except ValueError as error:
        if isinstance(error, (json.JSONDecodeError, _Fault)):
            raise
        return json.loads(text, object_pairs_hook=_unique, parse_int=_int_or_float)


def _int_or_float(digits: str) -> int | float:
    """Python makes no int of more than 4300 digits; as a float they are infinite."""
    return int(digits) if len(digits) < 400 else float(digits)


def _bytes_of(path: Path, refuse: Refuse, remedy: str) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise refuse_os_error(path, error, refuse, remedy) from error


def _path_to_surrogate(value: Any, path: str = "") -> str | None:
    """The path of a string, or of an object with a key, that holds half a surrogate pair."""
    if isinstance(value, str):
        return path if any("\ud800" <= letter <= "\udfff" for letter in value) else None
    inside: Iterable[tuple[Any, str]] = ()
    if isinstance(value, list):
        inside = ((item, f"{path}[{i}]") for i, item in enumerate(value))
    elif isinstance(value, dict):
        if _path_to_surrogate("".join(value)) is not None:
            return path
        inside = ((item, f"{path}.{key}") for key, item in value.items())
    return next(
        (at for at in itertools.starmap(_path_to_surrogate, inside) if at is not None), None
    )


def _plainer(value: Any) -> Any:
    """Plain objects with 3 in place of 3.0, as some tools write every number; without numpy's."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 2**63 else value
    if isinstance(value, list):
        return [_plainer(item) for item in value]
    if isinstance(value, dict):
        return {key: _plainer(item) for key, item in value.items()}
    return value


# -- messages ------------------------------------------------------------------------------------

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


def _message(source: str, path: str, what: str, remedy: str) -> str:
    path = path.removeprefix(".")
    return f"{source}: {path}{': ' if path else ''}{what}{'; ' if remedy else ''}{remedy}"


def _listed(document: Any) -> str:
    return short(sorted(map(str, document)))


def _explain(fault: Exception, document: Any) -> tuple[str, str]:
    """The path to what msgspec did not take; what was expected there and what was found."""
    if isinstance(fault, RecursionError):
        return "", "nested too deeply; no such file has more than a few levels"
    message, _, path = str(fault).partition(" - at `$")
    got = re.search(r", got `(\w+)`$", message)
    steps = re.findall(r"\.([^.\[]+)|\[(\d+|\.\.\.)\]", path.rstrip("`"))
    where, value = next(
        _values_at(document, [a or b for a, b in steps], got and got[1]), ("", None)
    )
    if missing := re.fullmatch(r"Object missing required field `(.+)`", message):
        return where, f"missing key {missing[1]!r}; it has {_listed(value)}"
    return where, _misfit(message, value)


def _misfit(message: str, value: Any) -> str:
    """What msgspec's message says was expected, in the words of this package, and the value."""
    got = f", got {short(value)}"
    if isinstance(value, float) and not math.isfinite(value) and "`float" in message:
        return f"expected a finite number{got}; leave out what is not known (a keypoint: 0, 0, 0)"
    if message == "Number out of range":
        return f"expected a number that float64 holds{got}"
    named = re.match(r"Expected `([^`]+)`(?: of length)?(?: (>=|<=))?(?: (\d+))?", message)
    if named is None:
        return message[0].lower() + message[1:].replace("`", "") + got
    kinds = named[1].split(" | ")
    if len(kinds) > 1 and "null" in kinds:
        kinds.remove("null")
    expected = " or ".join(_KINDS.get(kind, kind) for kind in kinds)
    bound = {">=": "at least ", "<=": "at most "}.get(named[2], "")
    if "of length" in message:
        unit = "values" if kinds == ["array"] else "letters"
        return f"expected {bound}{named[3]} {unit}, got {len(value)}: {short(value)}"
    if isinstance(value, int) and abs(value) >= 2**63:
        return f"expected {expected} that int64 holds{got}"
    return f"expected {expected}" + (f" of {bound}{named[3]}" if bound else "") + got


def _values_at(
    document: Any, steps: list[str], kind: str | None, path: str = ""
) -> Iterator[tuple[str, Any]]:
    """What is at a path of msgspec's, with its whole path; ``...`` is any key of a ``kind``."""
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


# -- piece by piece ------------------------------------------------------------------------------

_SPACE = re.compile(r"[ \t\r\n]*")
_PIECE = 1 << 20
_LONGEST = 4 << 20  # an item that is longer is none


class _Pieces:
    """A text that is read as it is needed.

    Attributes:
        text: what has been read and not been dropped.
        at: how far of it has been used.
    """

    def __init__(self, file: IO[str]) -> None:
        self.file, self.text, self.at = file, "", 0

    def more(self) -> bool:
        """Reads a piece; whether there was one."""
        piece = self.file.read(_PIECE)
        if piece:
            self.text, self.at = self.text[self.at :] + piece, 0
        return bool(piece)

    def sign(self) -> str:
        """The next character that is no space, or nothing at the end."""
        while True:
            spaces = _SPACE.match(self.text, self.at)
            assert spaces is not None
            self.at = spaces.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    def value(self, decoder: json.JSONDecoder) -> Any:
        """The next value of the text."""
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
                if end < len(self.text) or not self.more():
                    break
            except json.JSONDecodeError:
                if len(self.text) - self.at > _LONGEST or not self.more():
                    raise
        written, self.at = self.text[self.at : end], end
        if _SURROGATE.search(written) and (path := _path_to_surrogate(value)) is not None:
            raise _Fault("holds half a surrogate pair, which is no character", path)
        return value

    def fault(self, what: str) -> json.JSONDecodeError:
        return json.JSONDecodeError(what, self.text, self.at)


def _items(path: Path, refuse: Refuse, remedy: str) -> Iterator[Any]:
    decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_int=_int_or_float)
    try:
        with open(path, "rb") as file:
            encoding = json.detect_encoding(file.read(4))
        text = open(path, encoding=encoding)  # noqa: SIM115
    except OSError as error:
        raise refuse_os_error(path, error, refuse, remedy) from error
    with text:
        pieces, count = _Pieces(text), 0
        while True:
            with _named_faults(str(path), refuse, remedy, behind=f", after {count} whole items"):
                sign = pieces.sign()
                if not count and sign != "[":
                    what = f"expected a list, got {short(pieces.value(decoder))}"
                    raise refuse(_message(str(path), "", what, remedy))
                if count and sign not in (",", "]"):
                    raise pieces.fault("Expecting ',' delimiter")
                pieces.at += 1
                if sign == "]" or (not count and pieces.sign() == "]"):
                    pieces.at += sign != "]"
                    if pieces.sign():
                        raise pieces.fault("Extra data")
                    return
                pieces.sign()
                item = pieces.value(decoder)
                count += 1
            yield item
