"""A journal that is damaged: what a kill leaves is dropped, other damage is named."""

from __future__ import annotations

import json

import pytest

from cmpose.predict.journal import FINISHED, FRAMES, SETTINGS, JournalError, open_journal

ARGUMENTS = {"--min_score": 0.2}
PERSON = {"track_id": 0, "score": 0.5, "box": [1, 2, 3, 4]}
LINES = [
    json.dumps({"frame": i, "people": [PERSON | {"keypoints": [[1, 2]] * 3, "scores": [0.5] * 3}]})
    for i in range(4)
]


def frames(folder, lines: list[str], end: str = "\n") -> list[int]:
    (folder / FRAMES).write_text("\n".join(lines) + end)
    with open_journal(folder, ARGUMENTS) as journal:
        return [frame.number for frame in journal.frames()]


def test_what_a_kill_leaves_is_dropped(tmp_path):
    assert frames(tmp_path, LINES) == [0, 1, 2, 3]
    assert frames(tmp_path, [*LINES[:2], LINES[2][:40]], end="") == [0, 1]
    assert (tmp_path / FRAMES).read_text() == "".join(f"{line}\n" for line in LINES[:2])
    assert frames(tmp_path, [*LINES[:2], "\0\0\0", LINES[3][9:]]) == [0, 1]


def test_a_line_damaged_in_the_middle_is_named(tmp_path):
    message = r"frames\.jsonl: line 2: damaged, and behind it are whole lines; delete it and those"
    for damaged in (LINES[1][:-1], "", "\0" * 40, LINES[3]):
        with pytest.raises(JournalError, match=message):
            frames(tmp_path, [LINES[0], damaged, *LINES[2:]])
        assert LINES[3] in (tmp_path / FRAMES).read_text(), "nothing is thrown away"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"score": 0.5', '"score": NaN', r"people\[0\]\.score: expected a finite number, got nan"),
        ('"score": 0.5', '"score": []', r"people\[0\]\.score: expected a number, got \[\]"),
        ("[[1, 2], [1, 2]", "[[1, 2], [1]", r"people\[0\]\.keypoints\[1\]: expected 2 values, got"),
        ("[[1, 2], ", "[", r"people\[0\]: 2 keypoints and 3 scores, expected 3"),
        ('"people": [', '"people": [[', r"not valid JSON at line 1"),
    ],
)
def test_a_line_that_says_something_else_is_named(old, new, message, tmp_path):
    assert old in LINES[2]
    message = rf"frames\.jsonl: line 3: {message}.*; run with --overwrite to start anew"
    with pytest.raises(JournalError, match=message):
        frames(tmp_path, [*LINES[:2], LINES[2].replace(old, new, 1), LINES[3]])


@pytest.mark.parametrize("name", [SETTINGS, FINISHED])
def test_damaged_settings_and_ends_are_named(name, tmp_path):
    (tmp_path / name).write_text('{"a": 1')
    with pytest.raises(JournalError, match=rf"{name}: not valid JSON at .*; run with --overwrite"):
        frames(tmp_path, LINES)
