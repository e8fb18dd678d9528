"""A journal that is damaged is cut at the first line that is not as it was written."""

from __future__ import annotations

import json

import pytest

from cmpose.predict.journal import (
    FINISHED,
    FORMAT,
    FRAMES,
    SETTINGS,
    Journal,
    JournalError,
    open_journal,
    with_checksum,
)

ARGUMENTS = {"--min_score": 0.2}
PERSON = {"track_id": 0, "score": 0.5, "box": [1, 2, 3, 4], "keypoints": [[1, 2]], "scores": [0.5]}
LINES = [with_checksum({"frame": i, "people": [PERSON]}) for i in range(4)]
WHOLE = b"".join(LINES)


def frames(folder, content: bytes) -> tuple[list[int], str]:
    """The numbers of a journal's frames, and what was said of those that were dropped."""
    (folder / FRAMES).write_bytes(content)
    with open_journal(folder, ARGUMENTS) as journal:
        return [frame.number for frame in journal.frames()], journal.dropped


def test_what_a_kill_leaves_is_dropped_without_a_word(tmp_path):
    assert frames(tmp_path, WHOLE) == ([0, 1, 2, 3], "")
    assert frames(tmp_path, WHOLE[:-60]) == ([0, 1, 2], "")
    assert (tmp_path / FRAMES).read_bytes() == b"".join(LINES[:3])
    assert frames(tmp_path, LINES[0] + b"\0" * 40) == ([0], "")


def test_any_changed_byte_cuts_the_journal_at_its_line(tmp_path):
    """A digit, a quote, a line's end, the checksum: what is behind is dropped, and that is said."""
    content = WHOLE + with_checksum({"end": 4})
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1
        (tmp_path / FRAMES).write_bytes(changed)
        good = content[:at].count(b"\n")
        journal = Journal(tmp_path)
        journal.close()
        assert (journal.done, journal.ended) == (good, False), at
        if at < len(content) - 1:
            assert f"frames.jsonl: line {good + 1} is not as it was written" in journal.dropped
        assert (tmp_path / FRAMES).read_bytes() == b"".join(LINES[:good])


def test_lines_that_are_lost_or_twice_cut_it_too(tmp_path):
    for lines in ([LINES[0], *LINES[2:]], [LINES[0], *LINES], [LINES[0], b"\n", *LINES[1:]]):
        done, dropped = frames(tmp_path, b"".join(lines))
        assert done == [0]
        assert f"line 2 is not as it was written: lines 2 to {len(lines)} are dropped" in dropped


def test_frames_that_were_predicted_together_are_dropped_together(tmp_path):
    group = [with_checksum({"frame": i, "more": 2 - i, "people": []}) for i in range(2)]
    group += [with_checksum({"frame": 2, "people": []})]
    assert frames(tmp_path, b"".join(group) + LINES[3]) == ([0, 1, 2, 3], "")
    assert frames(tmp_path, b"".join(group[:2])) == ([], "")
    done, dropped = frames(tmp_path, b"".join([*group[:2], LINES[3]]))
    assert done == []
    assert "line 3 is not as it was written: lines 1 to 3 are dropped" in dropped


def test_a_journal_without_checksums_is_named_unless_it_is_finished(tmp_path):
    (tmp_path / SETTINGS).write_text(json.dumps(ARGUMENTS))
    (tmp_path / FRAMES).write_text('{"frame": 0, "people": []}\n')
    with (
        pytest.raises(JournalError, match=r"settings\.json holds a run that an earlier version"),
        open_journal(tmp_path, ARGUMENTS),
    ):
        pass
    assert (tmp_path / FRAMES).exists(), "nothing is thrown away"
    (tmp_path / FINISHED).write_text('{"frames": 1}')
    with open_journal(tmp_path, ARGUMENTS) as journal:
        assert journal.finished == {"frames": 1}
    (tmp_path / SETTINGS).write_text(json.dumps(ARGUMENTS | {"journal": FORMAT}))
    with open_journal(tmp_path, ARGUMENTS, overwrite=True) as journal:
        assert (journal.done, journal.finished) == (0, None)


@pytest.mark.parametrize("name", [SETTINGS, FINISHED])
def test_damaged_settings_and_ends_are_named(name, tmp_path):
    (tmp_path / name).write_text('{"a": 1')
    with pytest.raises(JournalError, match=rf"{name}: not valid JSON at .*; run with --overwrite"):
        frames(tmp_path, WHOLE)
