"""Which frames a clip is made of, and what a broken picture says."""

from __future__ import annotations

import re

import cv2
import numpy as np
import pytest

from cmpose.data.frames import (
    FrameError,
    FrameFolder,
    PictureCache,
    picture_size,
    read_picture,
    support_frames,
)
from tests.data import synthetic

ALL = range(10)


@pytest.mark.parametrize(
    ("key", "num_frames", "expected"),
    [
        (0, 1, (0,)),
        (4, 1, (4,)),
        (0, 3, (0, 0, 1)),
        (4, 3, (3, 4, 5)),
        (9, 3, (8, 9, 9)),
        (0, 5, (0, 0, 0, 1, 2)),
        (1, 5, (0, 0, 1, 2, 3)),
        (4, 5, (2, 3, 4, 5, 6)),
        (8, 5, (6, 7, 8, 9, 9)),
        (9, 5, (7, 8, 9, 9, 9)),
    ],
)
def test_borders_repeat_the_first_and_last_frame(key, num_frames, expected):
    for listed in (set(ALL), {key}):
        support = support_frames(key, num_frames, set(ALL), listed, 10)
        assert support == (expected, (), ())


def test_posetrack17_starts_at_one():
    assert support_frames(1, 3, set(range(1, 11)), {1}, 10).numbers == (1, 1, 2)
    assert support_frames(10, 3, set(range(1, 11)), {1}, 10) == ((9, 10, 10), (), ())


def test_a_sequence_of_one_file():
    """The real sample: the annotation says 140 frames and lists one, which alone is on disk."""
    assert support_frames(0, 3, {0}, {0}, 140) == ((0, 0, 0), (), (1,))
    assert support_frames(0, 5, {0}, {0}, 140) == ((0,) * 5, (), (1, 2))
    assert support_frames(0, 3, {0}, {0}, None) == ((0, 0, 0), (), ())


def test_lost_frames():
    # Listed by the annotation, but not there.
    assert support_frames(4, 3, {3, 4}, {4, 5}).lost == (5,)
    # A hole among the files.
    assert support_frames(4, 5, {0, 1, 2, 4, 5, 6}, {4}) == ((2, 4, 4, 5, 6), (3,), ())
    # A hole up to a frame that is listed further on.
    assert support_frames(4, 3, {3, 4}, {4, 8}).lost == (5,)


def test_folder_understands_any_padding(tmp_path):
    for name in ("img_8.jpg", "img_9.jpg", "img_10.jpg", "img_10.png", "other_3.jpg", "note.txt"):
        (tmp_path / name).touch()
    folder = FrameFolder(tmp_path)
    expected = {8: "img_8.jpg", 9: "img_9.jpg", 10: "img_10.jpg"}
    assert folder.like("img_9.jpg") == expected
    assert folder.like("no_number.jpg") == {}
    assert FrameFolder(tmp_path / "nowhere").names == set()
    (tmp_path / "0012_crop.jpg").touch()
    assert FrameFolder(tmp_path).like("0007_crop.jpg") == {12: "0012_crop.jpg"}
    (tmp_path / "img_009.jpg").touch()
    with pytest.raises(FrameError, match=r"img_009\.jpg and img_9\.jpg both are frame 9"):
        FrameFolder(tmp_path).like("img_9.jpg")


def test_picture_size_and_content(tmp_path):
    for name in ("a.jpg", "a.png"):
        synthetic.write_picture(tmp_path / name, 3, (322, 124))
        assert picture_size(tmp_path / name) == (322, 124)
        assert read_picture(tmp_path / name).shape == (124, 322, 3)


def test_orientation_tags_do_not_turn_the_picture(tmp_path):
    synthetic.write_picture(tmp_path / "a.jpg", 3, (322, 124))
    data = (tmp_path / "a.jpg").read_bytes()
    exif = (
        b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06"
        b"\x00\x00\x00\x00\x00\x00"
    )
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    (tmp_path / "a.jpg").write_bytes(data[:2] + segment + data[2:])
    assert cv2.imread(str(tmp_path / "a.jpg")).shape == (322, 124, 3)  # the tag works
    assert read_picture(tmp_path / "a.jpg").shape == (124, 322, 3)
    assert picture_size(tmp_path / "a.jpg") == (322, 124)


def noise_jpeg(path):
    rng = np.random.default_rng(0)
    cv2.imwrite(str(path), rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
    return path.read_bytes()


@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.999])
def test_cut_off_jpeg(tmp_path, share):
    path = tmp_path / "a.jpg"
    data = noise_jpeg(path)
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(FrameError, match=re.escape(str(path))):
        read_picture(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff\xd8", b"\xff\xd8\xff\xe0\x00\x00\xff"])
def test_not_a_picture(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    for read in (read_picture, picture_size):
        with pytest.raises(FrameError, match=r"a\.jpg: not a readable picture") as info:
            read(path)
        assert info.value.reason == "frame unreadable"


def test_missing_picture(tmp_path):
    for read in (read_picture, picture_size):
        with pytest.raises(FrameError, match=r"a\.jpg: cannot be read: No such file"):
            read(tmp_path / "a.jpg")


def test_cache_keeps_the_newest_within_its_limit(tmp_path, monkeypatch):
    from cmpose.data import frames

    paths = [str(tmp_path / f"{n}.jpg") for n in range(3)]
    for n, path in enumerate(paths):
        synthetic.write_picture(tmp_path / path, n, (16, 16))
    reads = []
    monkeypatch.setattr(frames, "read_picture", lambda p: reads.append(p) or read_picture(p))
    cache = PictureCache(2 * 16 * 16 * 3)
    for n in (0, 1, 0, 2, 0, 1):
        cache.read(paths[n])
    assert [paths.index(path) for path in reads] == [0, 1, 2, 1]
