"""Damage of the kinds that files from outside arrive with, as hypothesis strategies."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

_RAW = "@raw@"
_TWICE = "@twice@"


def _raw(text: str) -> str:
    """A value that stands in the document as ``text``, which JSON's own writer would refuse."""
    return f"{_RAW}{text}{_RAW}"


HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 0.5, 3.0, 1e308, -1e308, "", "a", "3", "\x00", "a/b.jpg"),
    *(2**31, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**400, "x" * 5000, "000000.jpg"),
    *([], [[]], [None], {}, {"a": 1}, [1, 2, 3, 4], [0.0] * 51, [{}], ["a"], [[1, 2]]),
    *map(_raw, ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "-0", "1e-999")),
    *map(_raw, ('"\\ud800"', '"\\udc00x"', '"\\u0000"', "01", "'a'", "")),
    *map(_raw, ("[" * 5000 + "]" * 5000, "[" * 700 + "]" * 700)),
    "9" * 5000 + ".jpg",
    *("../a.jpg", "/a.jpg", "C:\\a\\b.jpg", "a\\b.jpg", ".DS_Store", "._a.jpg", "é/ü.jpg", "\n"),
)

_SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
_VALUES = st.sampled_from(HOSTILE) | st.recursive(
    _SCALARS, lambda each: st.lists(each) | st.dictionaries(st.text(), each), max_leaves=5
)


def dump(document: Any) -> bytes:
    """As JSON, with what is put in raw and what stands twice."""
    text = json.dumps(document)
    parts = text.split(_RAW)
    for i in range(1, len(parts), 2):
        parts[i - 1] = parts[i - 1].removesuffix('"')
        parts[i] = json.loads(f'"{parts[i]}"')
        parts[i + 1] = parts[i + 1].removeprefix('"')
    return "".join(parts).replace(_TWICE, "").encode("utf-8", "surrogatepass")


def dump_lines(documents: list[Any]) -> bytes:
    """A document a line."""
    return b"".join(dump(document) + b"\n" for document in documents)


def nodes_of(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) below a value."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from nodes_of(value[key])


def _change_value(draw: Any, document: Any) -> Any:
    nodes = list(nodes_of(document))
    kind = draw(st.integers(0, 19))
    if not nodes or kind == 19:
        return copy.deepcopy(draw(_VALUES))
    # Most nodes are numbers in long lists: those under a name are tried as often.
    if draw(st.booleans()):
        nodes = [node for node in nodes if isinstance(node[1], str)] or nodes
    container, key = nodes[draw(st.integers(0, len(nodes) - 1))]
    if kind < 12:
        container[key] = copy.deepcopy(draw(_VALUES))
    elif kind < 14:
        del container[key]
    elif kind < 16 and isinstance(container, dict):
        container[f"{key}{_TWICE}"] = copy.deepcopy(draw(st.just(container[key]) | _VALUES))
    elif kind < 17 and isinstance(container, dict):
        container[draw(st.sampled_from((f"{key}_", "k" * 5000)))] = container.pop(key)
    elif isinstance(container, list):
        container.insert(key, copy.deepcopy(container[draw(st.integers(0, len(container) - 1))]))
    else:
        other, name = nodes[draw(st.integers(0, len(nodes) - 1))]
        container[key] = copy.deepcopy(other[name])
    return document


@st.composite
def changed_text(draw: Any, data: bytes) -> bytes:
    """A text with a part lost, a byte changed or added, or in another encoding."""
    at = draw(st.integers(0, len(data)))
    byte = bytes([draw(st.integers(0, 255))])
    text = data.decode("utf-8", "replace")
    changes = (
        lambda: data[:at],
        lambda: data[at:],
        lambda: data[:at] + byte + data[at + 1 :],
        lambda: data[:at] + byte + data[at:],
        lambda: data[:at] + b"\xff" + data[at:],
        lambda: data[:at] + "é".encode("latin-1") + data[at:],
        lambda: data[:at] + b"\x00" * 16 + data[at:],
        lambda: b"\xef\xbb\xbf" + data,
        lambda: text.encode("utf-16"),
        lambda: text.encode("utf-16-le"),
        lambda: text.encode("utf-16-be"),
        lambda: text.encode("utf-32"),
        lambda: text.encode("utf-16")[: at | 1],
        lambda: b"",
        lambda: b" \n",
        lambda: data + byte,
        lambda: data + b"{}",
        lambda: b"[" * 3000 + data,
        lambda: data.replace(b":", b"=", 1),
        lambda: data.replace(b'"', b"'"),
        lambda: data.replace(b"\n", b"\r\n"),
    )
    return draw(st.sampled_from(changes))()


@st.composite
def damaged(draw: Any, document: Any, lines: bool = False) -> bytes:
    """A document, or some lines of several, with up to three changes.

    Args:
        draw: of hypothesis.
        document: plain data; a list of documents if ``lines``. It is not changed.
        lines: one document a line.
    """
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(0, 3))):
        if lines:
            i = draw(st.integers(0, len(document) - 1))
            document[i] = _change_value(draw, document[i])
        else:
            document = _change_value(draw, document)
    data = dump_lines(document) if lines else dump(document)
    return draw(changed_text(data)) if draw(st.integers(0, 3)) == 3 else data


@st.composite
def changed_bytes(draw: Any, data: bytes) -> bytes:
    """A binary file that was cut, or has one to three runs of bytes changed, lost or added."""
    for _ in range(draw(st.integers(1, 3))):
        size = len(data)
        # Headers are tried as often as all the rest.
        at = draw(st.integers(0, min(size, 256)) | st.integers(0, size))
        run = draw(st.sampled_from((1, 1, 2, 4, 8, 64, 1000)))
        new = draw(st.binary(min_size=run, max_size=run) if run < 9 else st.just(b"\xff" * run))
        before, after = data[:at], data[at + run :]
        changes = (
            before,
            before + new + after,
            before + new + data[at:],
            before + after,
            before + bytes(run) + after,
            before + data[max(0, at - run) :],
        )
        data = draw(st.sampled_from(changes))
    return data


def rewritten(document: Any) -> st.SearchStrategy[bytes]:
    """The same document in other words: keys in another order, other blanks, a BOM."""

    def of(choices: tuple[Any, int | None, bool, bool]) -> bytes:
        rng, indent, ascii_only, mark = choices

        def shuffled(value: Any) -> Any:
            if isinstance(value, list):
                return [*map(shuffled, value)]
            if not isinstance(value, dict):
                return value
            keys = list(value)
            rng.shuffle(keys)
            return {key: shuffled(value[key]) for key in keys}

        text = json.dumps(shuffled(document), indent=indent, ensure_ascii=ascii_only)
        return b"\xef\xbb\xbf" * mark + text.encode()

    return st.tuples(
        st.randoms(use_true_random=True),
        st.sampled_from((None, 0, 1, 7)),
        st.booleans(),
        st.booleans(),
    ).map(of)
