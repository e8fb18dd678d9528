"""Seeded damage to JSON documents, of the kinds that files from outside arrive with."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

_RAW = "@raw@"
_TWICE = "@twice@"


def raw(text: str) -> str:
    """A value that stands in the document as ``text``, which JSON's own writer would refuse."""
    return f"{_RAW}{text}{_RAW}"


HOSTILE: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 0.5, 3.0, 1e308, -1e308, "", "a", "3", "\x00", "a/b.jpg"),
    *(2**31, 2**63 - 1, 2**63, 2**64, -(2**63) - 1, 10**400, "x" * 1000, "000000.jpg"),
    *([], [[]], [None], {}, {"a": 1}, [1, 2, 3, 4], [0.0] * 51, [{}], ["a"], [[1, 2]]),
    *map(raw, ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5000, "-0", "1e-999")),
    *map(
        raw,
        (
            '"\\ud800"',
            '"\\udc00x"',
            '"\\u0000"',
            "[" * 5000 + "]" * 5000,
            "[" * 700 + "]" * 700,
            "01",
            "'a'",
            "",
        ),
    ),
)


def dump(document: Any) -> bytes:
    """As JSON, with what ``raw`` and doubled keys stand for."""
    text = json.dumps(document)
    parts = text.split(_RAW)
    for i in range(1, len(parts), 2):
        parts[i - 1] = parts[i - 1].removesuffix('"')
        parts[i] = json.loads(f'"{parts[i]}"')
        parts[i + 1] = parts[i + 1].removeprefix('"')
    return "".join(parts).replace(_TWICE, "").encode("utf-8", "surrogatepass")


def _nodes(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) below a value."""
    if isinstance(value, (dict, list)):
        for key in list(value) if isinstance(value, dict) else range(len(value)):
            yield value, key
            yield from _nodes(value[key])


def _change_value(document: Any, rng: random.Random) -> Any:
    nodes = list(_nodes(document))
    if not nodes or rng.random() < 0.02:
        return rng.choice(HOSTILE)
    # Most nodes are numbers in long lists: those under a name are tried as often.
    if rng.random() < 0.6:
        nodes = [node for node in nodes if isinstance(node[1], str)] or nodes
    container, key = rng.choice(nodes)
    kind = rng.random()
    if kind < 0.7:
        container[key] = copy.deepcopy(rng.choice(HOSTILE))
    elif kind < 0.8:
        del container[key]
    elif kind < 0.9 and isinstance(container, dict):
        container[f"{key}{_TWICE}"] = copy.deepcopy(rng.choice([*HOSTILE, container[key]]))
    elif kind < 0.95 and isinstance(container, dict):
        container[f"{key}_"] = container.pop(key)
    elif isinstance(container, list):
        container.insert(key, copy.deepcopy(container[rng.randrange(len(container))]))
    else:
        other, name = rng.choice(nodes)
        container[key] = copy.deepcopy(other[name])
    return document


def change_bytes(data: bytes, rng: random.Random) -> bytes:
    """A text with a part lost, a byte changed or added, or in another encoding."""
    at = rng.randrange(len(data) + 1)
    text = data.decode("utf-8", "replace")
    return rng.choice(
        (
            lambda: data[:at],
            lambda: data[at:],
            lambda: data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :],
            lambda: data[:at] + bytes([rng.randrange(256)]) + data[at:],
            lambda: data[:at] + b"\xff" + data[at:],
            lambda: data[:at] + "é".encode("latin-1") + data[at:],
            lambda: data[:at] + b"\x00" * 16 + data[at:],
            lambda: b"\xef\xbb\xbf" + data,
            lambda: text.encode(rng.choice(("utf-16", "utf-16-le", "utf-16-be", "utf-32"))),
            lambda: text.encode("utf-16")[: at | 1],
            lambda: b"",
            lambda: b" \n",
            lambda: data + rng.choice((b"{}", b"]", b"\n\n", b"x", b"\x00")),
            lambda: b"[" * 3000 + data,
            lambda: data.replace(b":", b"=", 1),
            lambda: data.replace(b'"', b"'"),
        )
    )()


def damaged(document: Any, seed: str, lines: bool = False) -> bytes:
    """A document, or one line of several, with one to three changes.

    Args:
        document: plain data; a list of lines if ``lines``. It is not changed.
        seed: of the changes.
        lines: one document a line.
    """
    rng = random.Random(seed)
    document = copy.deepcopy(document)
    if rng.random() < 0.8:
        for _ in range(rng.choice((1, 1, 2, 3))):
            if lines:
                i = rng.randrange(len(document))
                document[i] = _change_value(document[i], rng)
            else:
                document = _change_value(document, rng)
    data = b"".join(dump(line) + b"\n" for line in document) if lines else dump(document)
    return data if rng.random() < 0.75 else change_bytes(data, rng)
