"""Which frames a clip is made of, and what a broken picture says."""

from __future__ import annotations

import re

import cv2
import numpy as np
import pytest

from cmpose.data.frames import (
    FrameFolder,
    PictureCache,
    nearly_there,
    read_frame,
    support_frames,
)
from cmpose.data.pictures import FrameError, picture_size, read_picture
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


def with_tag(path, orientation):
    """Writes an orientation tag into a JPEG."""
    data = path.read_bytes()
    exif = (
        b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00"
        + bytes([orientation])
        + b"\x00\x00\x00\x00\x00\x00"
    )
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    path.write_bytes(data[:2] + segment + data[2:])


def test_a_turned_frame_is_taken_only_where_the_size_proves_what_its_labels_are_of(tmp_path):
    path = tmp_path / "a.jpg"
    synthetic.write_picture(path, 3, (322, 124))
    with_tag(path, 6)
    assert read_frame(str(path), (124, 322), "x").shape == (322, 124, 3), "labelled upright"
    unproven = r"a\.jpg: has the orientation tag \d, and nothing proves .* convert --exif"
    with pytest.raises(FrameError, match=unproven) as info:
        read_frame(str(path), (322, 124), "x")  # labelled as stored
    assert info.value.reason == "orientation tag"
    for orientation, size in ((3, (322, 124)), (6, (100, 100))):
        synthetic.write_picture(path, 3, size)
        with_tag(path, orientation)
        with pytest.raises(FrameError, match=unproven):
            read_frame(str(path), size, "x")


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


def test_cache_keeps_the_newest_within_its_limit():
    reads = []

    def decode(path):
        reads.append(path)
        return np.zeros((16, 16, 3), np.uint8)

    cache = PictureCache(2 * 16 * 16 * 3)
    for path in "010201":
        cache.read(path, decode)
    assert "".join(reads) == "0121"


@pytest.mark.parametrize(
    ("present", "missing"),
    [("Walk/1.jpg", "walk/1.jpg"), ("walk/1.JPG", "walk/1.jpg"), ("o\u0308/1.jpg", "\u00f6/1.jpg")],
)
def test_a_name_that_is_nearly_there_is_told(tmp_path, present, missing):
    """Other machines write names in another case, or their accents otherwise."""
    (tmp_path / present).parent.mkdir()
    (tmp_path / present).touch()
    assert nearly_there(tmp_path, missing).startswith(
        f"{present!r} differs from it in upper case or"
    )
    assert nearly_there(tmp_path, present) == ""
    assert nearly_there(tmp_path, f"{missing}/2.jpg") == ""
    assert nearly_there(tmp_path, "run/1.jpg") == ""
