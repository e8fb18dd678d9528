"""A hunt finds faults that are planted, and counts what it tries."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.fuzz import conftest
from tests.fuzz.damage import changed_bytes, damaged, rewritten

DOCUMENT = {"people": [{"box": [1, 2, 3, 4], "name": "a"}], "size": 3}


def missing_key(data: bytes) -> None:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(document, dict):
        document["size"]


def test_a_traceback_is_found(hunt):
    with pytest.raises(KeyError, match="size"):
        hunt(missing_key, damaged(DOCUMENT), 300)


def test_a_check_that_hangs_is_found(hunt, monkeypatch):
    monkeypatch.setattr(conftest, "SECONDS", 1)

    def hang(data: bytes) -> None:
        while True:
            pass

    with pytest.raises(conftest.TooLong, match="took more than 1 s: b'"):
        hunt(hang, damaged(DOCUMENT), 1)


def test_too_much_memory_is_found(hunt, monkeypatch):
    monkeypatch.setattr(conftest, "MEMORY", 100 << 20)
    with pytest.raises(AssertionError, match=r"took 0.3 GB"):
        hunt(lambda data: np.ones(40_000_000).sum(), damaged(DOCUMENT), 1, shrink=False)


def test_a_byte_that_changes_nothing_else_is_tried(hunt):
    """Of a file's copies some differ in one byte alone, which only a checksum shows."""
    data, lengths = bytes(range(200)), set()
    hunt(lambda new: lengths.add(len(new)), changed_bytes(data), 100)
    assert len(data) in lengths
    assert len(lengths) > 5


def test_a_document_in_other_words_says_the_same(hunt):
    texts = set()

    def check(data: bytes) -> None:
        texts.add(data)
        assert json.loads(data.decode("utf-8-sig")) == DOCUMENT

    hunt(check, rewritten(DOCUMENT), 30)
    assert len(texts) > 5
