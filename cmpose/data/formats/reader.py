"""The one way in which JSON and other text from outside is read: typed, or refused by name.

A format is a ``msgspec.Struct`` (see the modules beside this one), and :func:`read` gives the
struct of a file. What does not fit is named: the file, the path in the document, what was expected
there and what was found. msgspec parses the text, and checks and types the whole document in one
pass. Where it takes no text, or where a key may occur twice, Python's slower ``json`` is asked: it
shows the line of a fault, ``NaN`` and doubled keys.
"""

from __future__ import annotations

import codecs
import contextlib
import gc
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from cmpose.data.formats.messages import explain, message, short

T = TypeVar("T")
# What raises an error, from its message.
Refuse = Callable[[str], Exception]

Number = Annotated[float, Meta(ge=-sys.float_info.max, le=sys.float_info.max)]
"""A finite number that float64 holds."""
MOST_PIXELS = 1e9
"""No picture reaches so far, and sums and products of such numbers are finite."""
Pixels = Annotated[float, Meta(ge=-MOST_PIXELS, le=MOST_PIXELS)]
"""A coordinate or a length in pixels."""
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


def read_text(path: Path, refuse: Refuse, remedy: str = "") -> str:
    """A file of other text than JSON: UTF-8, or what its byte order mark says.

    Args:
        path: the file.
        refuse: as in :func:`read`.
        remedy: likewise.

    Raises:
        FileNotFoundError: there is no such file.
        Exception: what ``refuse`` makes: it cannot be read, or is no such text.
    """
    data = _bytes_of(path, refuse, remedy)
    with _named_faults(str(path), refuse, remedy):
        return data.decode(json.detect_encoding(data) if data.startswith(_MARKS) else "utf-8")


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
    with _named_faults(source, refuse, remedy), no_collection():
        with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            document = msgspec.json.decode(data)
            if data.count(b'":') == _count_keys(document):
                return document
        text = data.decode(json.detect_encoding(data))
        document = _loads(text)
        _check_surrogates(text, document)
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
    with no_collection():
        try:
            return msgspec.convert(document, type)
        except (msgspec.ValidationError, RecursionError) as error:
            fault = error
        if re.match(r"Expected `[^`]*\bint\b[^`]*`, got `float`|.*got `numpy\.", str(fault)):
            try:
                document = _plainer(document)
                return msgspec.convert(document, type)
            except (msgspec.ValidationError, RecursionError) as error:
                fault = error
    path, problem = explain(fault, document)
    raise refuse(message(source, at + path, problem, remedy)) from fault


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
    return refuse(message(str(path), "", f"cannot be read ({error.strerror or error})", remedy))


_MARKS = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
"""Byte order marks; UTF-32's little one begins as UTF-16's."""

# -- parsing -------------------------------------------------------------------------------------

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class _Fault(ValueError):
    """What is wrong with a document, and where in it."""

    def __init__(self, problem: str, path: str = "") -> None:
        super().__init__(problem)
        self.path = path


@contextmanager
def no_collection() -> Iterator[None]:
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
        problem = "not valid JSON" + where + f": {error.msg}{behind}"
        raise refuse(message(source, "", problem, remedy)) from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start : error.start + 1].hex()
        problem = (
            f"not valid {error.encoding} text at byte {error.start} (0x{byte}): save it as UTF-8"
        )
        raise refuse(message(source, "", problem, remedy)) from error
    except RecursionError as error:
        problem = "nested too deeply; no such file has more than a few levels"
        raise refuse(message(source, "", problem, remedy)) from error
    except _Fault as error:
        raise refuse(message(source, error.path, str(error), remedy)) from error


def _count_keys(document: Any) -> int:
    """How many keys the objects of a document have: fewer than were written, if one is doubled."""
    count, waiting = 0, [document]
    while waiting:
        value = waiting.pop()
        if type(value) is dict:
            count += len(value)
            waiting += [item for item in value.values() if type(item) in (dict, list)]
        elif type(value) is list and value and type(value[0]) in (dict, list):
            waiting += value
    return count


class _Doubled(dict[str, Any]):
    """An object in which a key occurs twice."""


class _Objects:
    """Makes the objects of a document, and notes whether one has a key twice."""

    def __init__(self) -> None:
        self.doubled: list[str] = []

    def __call__(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) == len(pairs):
            return values
        keys = [key for key, _ in pairs]
        self.doubled.append(next(key for key in keys if keys.count(key) > 1))
        return _Doubled(values)

    def check(self, document: Any) -> None:
        """Of a key that occurs twice either value may be meant."""
        if self.doubled:
            path = _path_to(document, lambda value: isinstance(value, _Doubled)) or ""
            raise _Fault(f"the key {short(self.doubled[0])} occurs twice; keep one of them", path)


def _loads(text: str) -> Any:
    objects = _Objects()
    try:
        document = json.loads(text, object_pairs_hook=objects)
    except json.JSONDecodeError:
        raise
    except ValueError:
        document = json.loads(text, object_pairs_hook=objects, parse_int=_int_or_float)
    objects.check(document)
    return document


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


def _path_to(value: Any, is_wrong: Callable[[Any], bool], path: str = "") -> str | None:
    """The path of the first part of a document that is wrong."""
    if is_wrong(value):
        return path
    inside: Iterable[tuple[Any, str]] = ()
    if isinstance(value, list):
        inside = ((item, f"{path}[{i}]") for i, item in enumerate(value))
    elif isinstance(value, dict):
        inside = ((item, f"{path}.{key}") for key, item in value.items())
    paths = (_path_to(item, is_wrong, at) for item, at in inside)
    return next((at for at in paths if at is not None), None)


def _holds_surrogate(value: Any) -> bool:
    """Whether a string, or a key of an object, holds half a surrogate pair."""
    text = "".join(value) if isinstance(value, dict) else value
    return isinstance(text, str) and any("\ud800" <= letter <= "\udfff" for letter in text)


def _check_surrogates(text: str, document: Any) -> None:
    if _SURROGATE.search(text) and (path := _path_to(document, _holds_surrogate)) is not None:
        raise _Fault("holds half a surrogate pair, which is no character", path)


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
        _check_surrogates(self.text[self.at : end], value)
        self.at = end
        return value

    def fault(self, problem: str) -> json.JSONDecodeError:
        return json.JSONDecodeError(problem, self.text, self.at)


def _items(path: Path, refuse: Refuse, remedy: str) -> Iterator[Any]:
    objects = _Objects()
    decoder = json.JSONDecoder(object_pairs_hook=objects, parse_int=_int_or_float)
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
                    problem = f"expected a list, got {short(pieces.value(decoder))}"
                    raise refuse(message(str(path), "", problem, remedy))
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
                objects.check(item)
                count += 1
            yield item
