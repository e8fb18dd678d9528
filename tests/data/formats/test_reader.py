"""The one reader of JSON: what it takes, and the exact words in which it refuses."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec import Struct

from cmpose import config
from cmpose.data.formats.messages import short
from cmpose.data.formats.reader import (
    Count,
    Number,
    Whole,
    convert,
    read,
    read_items,
    read_lines,
    read_text,
)


class Refused(ValueError):
    pass


class Part(Struct):
    id: Whole | str
    size: Count = 0
    box: tuple[Number, Number] | None = None


class File(Struct):
    parts: list[Part]
    by_name: dict[str, Part] = {}
    name: str | None = None
    flag: bool | Whole | None = None


NOT_FINITE = "leave out what is not known (a keypoint: 0, 0, 0)"
REFUSED = {
    "a wrong type": ('{"parts": {"id": 1}}', "parts: expected a list, got {'id': 1}"),
    "no object": ("[1, 2]", "expected an object, got [1, 2]"),
    "a missing key": ('{"parts": [{"size": 1}]}', "parts[0]: missing key 'id'; it has ['size']"),
    "a list for an id": (
        '{"parts": [{"id": 1}, {"id": [7]}]}',
        "parts[1].id: expected an integer or a text, got [7]",
    ),
    "true for a number": (
        '{"parts": [{"id": 1, "box": [1, true]}]}',
        "parts[0].box[1]: expected a number, got True",
    ),
    "a text for a number": (
        '{"parts": [{"id": 1, "box": [1, "2"]}]}',
        "parts[0].box[1]: expected a number, got '2'",
    ),
    "a fraction for a count": (
        '{"parts": [{"id": 1, "size": 0.5}]}',
        "parts[0].size: expected an integer, got 0.5",
    ),
    "a negative count": (
        '{"parts": [{"id": 1, "size": -1}]}',
        "parts[0].size: expected an integer of at least 0, got -1",
    ),
    "beyond int64": (
        '{"parts": [{"id": 9223372036854775808}]}',
        "parts[0].id: expected an integer that int64 holds, got 9223372036854775808",
    ),
    "more digits than Python reads": (
        '{"parts": [{"id": 1, "size": ' + "9" * 5000 + "}]}",
        "parts[0].size: expected an integer, got inf",
    ),
    "beyond float64": (
        '{"parts": [{"id": 1, "box": [1e999, 0]}]}',
        f"parts[0].box[0]: expected a finite number, got inf; {NOT_FINITE}",
    ),
    "an int beyond float64": (
        '{"parts": [{"id": 1, "box": [1' + "0" * 400 + ", 0]}]}",
        f"parts[0].box[0]: expected a number that float64 holds, got {short(10**400)}",
    ),
    "NaN": (
        '{"parts": [{"id": 1, "box": [0, NaN]}]}',
        f"parts[0].box[1]: expected a finite number, got nan; {NOT_FINITE}",
    ),
    "a wrong length": (
        '{"parts": [{"id": 1, "box": [1, 2, 3]}]}',
        "parts[0].box: expected 2 values, got 3: [1, 2, 3]",
    ),
    "a value of a mapping": (
        '{"parts": [], "by_name": {"a": {"id": 1}, "b": {"id": []}}}',
        "by_name.b.id: expected an integer or a text, got []",
    ),
    "a key twice": (
        '{"parts": [{"id": 1}, {"id": 2, "id": 3}]}',
        "parts[1]: the key 'id' occurs twice; keep one of them",
    ),
    "half a surrogate pair": (
        '{"parts": [], "name": "a\\ud800"}',
        "name: holds half a surrogate pair, which is no character",
    ),
    "deep nesting": ("[" * 100_000, "nested too deeply; no such file has more than a few levels"),
    "an empty file": ("", "not valid JSON at line 1, column 1: Expecting value"),
    "a file that is cut off": (
        '{"parts": [\n{"id": 1',
        "not valid JSON at line 2, column 9: Expecting ',' delimiter",
    ),
    "more behind it": ('{"parts": []} {}', "not valid JSON at line 1, column 15: Extra data"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused(what, tmp_path):
    text, message = REFUSED[what]
    path = tmp_path / "f.json"
    path.write_text(text)
    with pytest.raises(Refused) as info:
        read(path, File, Refused)
    assert str(info.value) == f"{path}: {message}"
    with pytest.raises(Refused) as info:
        read(path, File, Refused, "do this")
    assert str(info.value) == f"{path}: {message}; do this"


def test_other_text_than_utf_8_is_named(tmp_path):
    path = tmp_path / "f.json"
    path.write_bytes('{"parts": [], "name": "é"}'.encode("latin-1"))
    message = r"f\.json: not valid utf-8 text at byte 23 \(0xe9\): save it as UTF-8"
    with pytest.raises(Refused, match=message):
        read(path, File, Refused)
    path.write_bytes('{"parts": [], "name": "é"}'.encode("utf-16")[:-1])
    with pytest.raises(Refused, match=r"f\.json: not valid utf-16-le text at byte \d+ .*: save it"):
        read(path, File, Refused)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_what_can_only_mean_one_text_is_read(encoding, tmp_path):
    path = tmp_path / "f.json"
    path.write_bytes(
        '{"parts": [{"id": "é"}], "more": NaN, "name": "\\ud83d\\ude00"}'.encode(encoding)
    )
    document = read(path, File, Refused)
    assert (document.parts[0].id, document.name) == ("é", "😀")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_read_everywhere(encoding, tmp_path):
    """By every way in which text comes in: whole, by item, by line, as CSV, as a recipe."""
    path = tmp_path / "f.json"
    path.write_bytes('[{"id": "é"}, {"id": 2}]'.encode(encoding))
    parts = [Part("é"), Part(2)]
    assert read(path, list[Part], Refused) == parts
    assert list(read_items(path, Part, Refused)) == parts
    path.write_bytes("é,1\nö,2".encode(encoding))
    assert read_text(path, Refused) == "é,1\nö,2"
    if encoding.startswith("utf-8"):  # cmpose writes logs itself, and recipes are said to be UTF-8
        path.write_bytes('{"id": "é"}\n{"id": 2}\n'.encode(encoding))
        assert [part for _, part in read_lines(path, Part, Refused)] == parts
        path.write_bytes("train: {lr: 0.5}".encode(encoding))
        assert config.load(path).train.lr == 0.5


def test_other_text_that_is_none_is_named(tmp_path):
    path = tmp_path / "f.csv"
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(Refused, match=r"f\.csv: not valid utf-8 text at byte 0 \(0xe9\): save it"):
        read_text(path, Refused)
    with pytest.raises(Refused, match="cannot be read"):
        read_text(tmp_path, Refused)


def test_numbers_that_are_whole_may_be_written_as_floats():
    document = convert({"parts": [{"id": 3.0, "size": 4.0, "box": [1, 2.5]}]}, File, "x", Refused)
    assert document.parts == [Part(3, 4, (1.0, 2.5))]
    assert isinstance(document.parts[0].id, int)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        read(tmp_path / "none", File, Refused)
    with pytest.raises(Refused, match=r"cannot be read \(Is a directory\); do this"):
        read(tmp_path, File, Refused, "do this")


def test_a_torn_last_line_is_dropped_and_a_damaged_one_named(tmp_path):
    path = tmp_path / "f.jsonl"
    path.write_text('{"id": 1}\n\n{"id": 2}\n{"id')
    assert [part.id for _, part in read_lines(path, Part, Refused)] == [1, 2]
    path.write_text('{"id": 1}\n{"id\n{"id": 2}\n')
    with pytest.raises(Refused, match=r"f\.jsonl: line 2: not valid JSON at line 1, column 2"):
        list(read_lines(path, Part, Refused))
    path.write_text('{"id": 1}\n{"id": []}\n')
    with pytest.raises(Refused, match=r"f\.jsonl: line 2: id: expected an integer or a text, got"):
        list(read_lines(path, Part, Refused))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"id": 1}, {"id": []}]', r"\[1\]\.id: expected an integer or a text, got \[\]"),
        ('[{"id": 1}, {"id": "\\ud800"}]', r"id: holds half a surrogate pair"),
        ('[{"id": 1, "id": 2}]', r"the key 'id' occurs twice"),
        ("[" * 100_000, "nested too deeply"),
        ('[{"id": 1}', r"not valid JSON: Expecting ',' delimiter, after 1 whole items"),
        ('{"id": 1}', r"expected a list, got {'id': 1}"),
    ],
)
def test_items_read_one_by_one_are_refused_by_name(text, message, tmp_path):
    path = tmp_path / "f.json"
    path.write_text(text)
    with pytest.raises(Refused, match=r"f\.json: " + message):
        list(read_items(path, Part, Refused))


def test_values_in_messages_are_short():
    deep: Any = 1
    for _ in range(5000):
        deep = [deep]
    for value in (deep, "x" * 9999, list(range(9999)), {str(i): i for i in range(99)}, 10**3000):
        assert len(short(value)) <= 80


def test_nesting_that_parses_but_is_too_deep_to_walk(tmp_path):
    """A fraction in place of a whole number makes the document be walked in Python."""
    path = tmp_path / "f.json"
    for depth in range(100, 1500, 100):
        deep = "[" * depth + "]" * depth
        path.write_text(f'{{"parts": [{{"id": 1.0}}], "more": {deep}, "name": "\\ud83d\\ude00"}}')
        try:
            assert read(path, File, Refused).parts[0].id == 1
        except Refused as error:
            message = str(error)
            assert message.startswith(f"{path}: nested too deeply")
