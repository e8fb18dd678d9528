"""Which number in a picture's name is the frame's."""

from __future__ import annotations

import pytest

from cmpose.data.numbering import number_pictures

HEX = "8a7f00c1d2e3f4a5b6c7d8e9f0a1b2c3"


def hashes(count):
    return [f"{i:x}{HEX}"[:32] for i in range(10, 10 + count)]


@pytest.mark.parametrize(
    ("names", "numbers"),
    [
        (["000000.jpg", "000001.jpg"], [[0, 1]]),
        (["f_9.jpg", "f_10.jpg"], [[9, 10]]),
        ([f"frame{i:04d}_cam1.jpg" for i in range(3)], [[0, 1, 2]]),
        ([f"frame{i:04d}_cam01.jpg" for i in range(3)], [[0, 1, 2]]),
        ([f"{i}_1280x720.jpg" for i in (9, 10)], [[9, 10]]),
        (["cam1_0001.jpg", "cam1_0002.jpg", "cam2_0001.jpg"], [[1, 2], [1]]),
        (["cam01_5.jpg", "cam01_6.jpg", "cam01_7.jpg", "cam02_5.jpg"], [[5, 6, 7], [5]]),
        (["walk1_000000.jpg", "walk2_000000.jpg"], [[0], [0]]),
        (["a1.jpg", "a2.png"], [[1], [2]]),
        (["12.jp2", "13.jp2"], [[12, 13]]),
        ([f"{i:04d}_jpg.rf.{h}.jpg" for i, h in enumerate(hashes(3))], [[0, 1, 2]]),
        (["0001_jpg.rf.8a7f.jpg", "0002_jpg.rf.12.jpg"], [[1, 2]]),
        (["IMG_1_JPG.rf.8a7f.jpg", "IMG_2_JPG.rf.12.jpg"], [[1, 2]]),
        (["0a12bc34__f1.jpg", "9a12bc34__f2.jpg"], [[1, 2]]),
        ([f"{h[:8]}-walk_{i}.jpg" for i, h in enumerate(hashes(12))], [[*range(12)]]),
        (["0a12bc34-f1.jpg", "12345678-f2.jpg"], [[1, 2]]),
        (["f1-deadbeef01.png", "f2-1234567890.png"], [[1, 2]]),
        (["20230101-1.jpg", "20230102-1.jpg", "20230103-1.jpg"], [[20230101, 20230102, 20230103]]),
        (["._1.jpg", ".2.jpg", "3.jpg", "Thumbs4.db"], [[3]]),
        (["portrait.jpg", f"{10**19}.jpg"], []),
    ],
)
def test_the_number_is_what_names_differ_in(names, numbers):
    videos: dict = {}
    for name in number_pictures(names).values():
        assert not name.doubt
        videos.setdefault(name.video, []).append(name.number)
    assert sorted(map(sorted, videos.values())) == sorted(numbers)


def test_two_numbers_that_could_both_be_the_frames_are_in_doubt():
    names = [f"frame{i:04d}_cam{c}.jpg" for i in range(9) for c in (1, 2)]
    numbered = number_pictures(names)
    assert len(numbered) == 18
    for name in numbered.values():
        assert "could be the frame number" in name.doubt
        assert "a folder of its own" in name.doubt
