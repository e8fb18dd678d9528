"""Videos from files, pictures, cameras and streams; and how they are written."""

from __future__ import annotations

import base64
import os
import shutil
from collections import namedtuple

import cv2
import numpy as np
import pytest

from cmpose.data import video_writer as writer_module
from cmpose.data.video import VideoError, natural_order, open_video
from cmpose.data.video_writer import VideoWriter, part_of, video_writer
from cmpose.files import OutputError
from tests import browser
from tests.data.test_pictures import blocks, encode

SIZE = (64, 48)


def picture(number, size=SIZE):
    """A grey that tells the number."""
    return np.full((size[1], size[0], 3), 10 * number, np.uint8)


@pytest.fixture
def file(tmp_path):
    with video_writer(tmp_path / "clip.mp4", SIZE, 12.5) as writer:
        for number in range(10):
            writer.write(picture(number))
    return tmp_path / "clip.mp4"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "seq"
    folder.mkdir()
    for number in range(12):
        cv2.imwrite(str(folder / f"f{number}.png"), picture(number))
    for name in ("notes.txt", "._f3.png", ".DS_Store", "Thumbs.db", ".f99.png"):
        (folder / name).write_text("no picture")
    return folder


def greys(frames):
    return [round(frame.picture.mean() / 10) if frame.picture.size else None for frame in frames]


def test_a_file(file):
    with open_video(file) as video:
        info = video.info
        assert (info.name, info.width, info.height) == ("clip", *SIZE)
        assert (info.fps, info.frames, info.live) == (12.5, 10, False)
        frames = list(video.frames())
    assert [frame.number for frame in frames] == list(range(10))
    assert greys(frames) == list(range(10))
    assert video.frame_name(7) == "clip/000007.jpg"
    with open_video(file, fps=30) as video:
        assert video.info.fps == 30


@pytest.mark.parametrize("skip", [1, 4, 10, 13])
def test_frames_that_are_passed_over_are_the_same_ones(file, folder, skip):
    for source, length in ((file, 10), (folder, 12)):
        with open_video(source) as video:
            shown = greys(video.frames(skip))
        passed = min(skip, length)
        assert shown == [None] * passed + list(range(passed, length))


def test_pictures_in_natural_order(folder, tmp_path):
    for source in (folder, f"{folder}/*.png", f"{folder}/f%d.png"):
        with open_video(source) as video:
            assert greys(video.frames()) == list(range(12)), source
            assert video.info.name == "seq"
    with open_video(folder) as video:
        assert video.frame_name(10) == "seq/f10.png"
        assert (video.info.frames, video.info.fps) == (12, 25)
    with open_video(folder / "f3.png") as video:
        assert greys(video.frames()) == [3], "a single picture is one frame"
    names = ["a/x2", "a/x10", "a/x11b", "a/x11²2", "b/1"]
    assert sorted(reversed(names), key=natural_order) == names


@pytest.mark.parametrize(
    ("names", "numbers", "shown"),
    [
        (["0.png", "1.png", "2.png"], (), None),
        (["0.png", "1.png", "3.png"], (0, 1, 3), None),
        (["img_2.png", "img_10.png"], (2, 10), None),
        (
            ["frame0002_cam1.png", "frame0004_cam1.png"],
            (2, 4),
            ["seq/000002.jpg", "seq/000004.jpg"],
        ),
        (["9f7f00c1-2.png", "0a7f00c1-3.png"], (2, 3), None),
        (["a.png", "b.png"], (), ["seq/000000.jpg", "seq/000001.jpg"]),
        (["a1.png", "b7.png"], (), None),
        (["7.png"], (7,), None),
    ],
)
def test_frame_numbers_come_from_names(tmp_path, names, numbers, shown):
    """Whatever is left out of a folder, the others keep their numbers."""
    folder = tmp_path / "seq"
    folder.mkdir()
    for position, name in enumerate(names):
        cv2.imwrite(str(folder / name), picture(position))
    (folder / "._2.png").write_bytes(b"no picture")
    for source in (folder, f"{folder}/*.png"):
        with open_video(source) as video:
            assert video.info.numbers == numbers
            frames = list(video.frames())
            assert [frame.number for frame in frames] == list(range(len(names)))
            if len(names) == 2:
                assert greys(frames) == [0, 1]
            names_of_frames = [video.frame_name(position) for position in range(len(names))]
            files = [f"seq/{name}" for name in names]
            assert names_of_frames == (shown or files)
            sources = [video.frame_source(position) for position in range(len(names))]
            assert sorted(sources) == (sorted(files) if shown else [""] * len(names))
    with open_video(folder / names[-1]) as video:
        assert video.info.numbers == (), "a picture alone is frame 0"


@pytest.mark.parametrize(
    ("stray", "message"),
    [
        (
            "000001 (1).png",
            r"seq: 3 of 4 pictures are numbered like 000001\.png, but not 000001 \(1",
        ),
        ("cover.png", r"but not cover\.png: move these, or give a pattern that leaves them out"),
        ("000003.bmp", r"has the frame number 3, as 000003\.(bmp|png) has; move one of them"),
        ("3.png", r"has the frame number 3, as (3|000003)\.png has; move one of them"),
    ],
)
def test_a_stray_picture_does_not_turn_numbers_into_positions(tmp_path, stray, message):
    """Boxes by frame number landed on other pictures, without a word."""
    folder = tmp_path / "seq"
    folder.mkdir()
    names = ["000001.png", "000003.png", "000004.png"]
    for position, name in enumerate([*names, stray]):
        cv2.imwrite(str(folder / name), picture(position))
    for source in (folder, f"{folder}/*"):
        with pytest.raises(VideoError, match=message), open_video(source):
            pass
    with open_video(f"{folder}/%06d.png") as video:
        assert video.info.numbers == (1, 3, 4)
    (folder / stray).rename(folder / "000002.bmp")
    with open_video(folder) as video:
        assert video.info.numbers == (1, 2, 3, 4), "of the ending no number depends"
        assert greys(video.frames()) == [0, 3, 1, 2]


def test_a_pattern_reads_past_holes(folder):
    (folder / "f5.png").unlink()
    with open_video(folder / "f%d.png") as video:
        assert greys(video.frames()) == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
        assert video.info.numbers == (0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11)
    with open_video(folder / "f%02d.png") as video:
        assert greys(video.frames()) == [10, 11], "f1.png is not padded"


def test_pictures_are_upright_and_within_the_limit(tmp_path, monkeypatch):
    (tmp_path / "0.jpg").write_bytes(encode(blocks(), "JPEG", 6))
    (tmp_path / "1.jpg").write_bytes(encode(blocks(), "JPEG", 3))
    (tmp_path / "2.jpg").write_bytes(encode(blocks(32, 48), "JPEG"))
    with open_video(tmp_path) as video:
        assert (video.info.width, video.info.height) == (32, 48)
        assert "2 of 3 pictures have an orientation tag, e.g." in video.info.notes[0]
        with pytest.raises(VideoError, match=r"1\.jpg: is 48×32 pixels, the first frame was 32×48"):
            list(video.frames())
    (tmp_path / "2.jpg").rename(tmp_path / "2.mp4")  # a picture under a video's name is none
    with open_video(tmp_path / "2.mp4") as video:
        assert [frame.number for frame in video.frames()] == [0]
    monkeypatch.setenv("CMPOSE_MAX_PIXELS", "99")
    with pytest.raises(VideoError, match=r"2\.mp4: 32×48 pixels by its header, more than the 99"):
        open_video(tmp_path / "2.mp4").__enter__()
    with pytest.raises(VideoError, match=r"0\.jpg: 48×32 pixels by its header, more than the 99"):
        open_video(tmp_path).__enter__()


def test_a_signature_tells_videos_apart(file, folder, tmp_path):
    def signature(source):
        with open_video(source) as video:
            return video.signature()

    before = signature(file), signature(folder)
    assert (signature(file), signature(folder)) == before
    os.utime(file)
    assert signature(file) == before[0], "copying a video does not make it another"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert signature(file) != before[0]
    replaced = folder / "f3.png"
    content, time = bytearray(replaced.read_bytes()), replaced.stat().st_mtime_ns
    content[-20] ^= 1
    replaced.write_bytes(content)
    os.utime(replaced, ns=(time, time))
    assert signature(folder) != before[1], "of the same size and time, but another"


def test_a_camera_by_number_and_a_stream_by_address(monkeypatch):
    opened = []

    class Camera:
        def __init__(self, address):
            opened.append(address)
            self.left = 0 if address == 3 else 4

        def read(self):
            self.left -= 1
            return (True, picture(1)) if self.left >= 0 else (False, None)

        def get(self, _):
            return -1.0

        def release(self):
            opened.append("closed")

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    with open_video("0") as video:
        assert (video.info.name, video.info.live, video.info.frames) == ("camera0", True, 0)
        assert video.info.fps == 25
        assert len(list(video.frames())) == 4
    with open_video("rtsp://host:554/live/Hall 2.sdp?x=1") as video:
        assert (video.info.name, video.info.live) == ("Hall_2", True)
    assert opened == [0, "closed", "rtsp://host:554/live/Hall 2.sdp?x=1", "closed"]
    with pytest.raises(VideoError, match="camera 3: OpenCV gets no frame from it; is it plugged"):
        open_video("3").__enter__()


def test_what_is_no_video_is_named(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    for source, message in (
        ("none.mp4", "none.mp4: no such video"),
        ("empty", "empty: no pictures there"),
        ("seq/*.jpg", r"\*.jpg: no pictures there"),
        ("seq/z%03d.png", r"z%03d\.png: no pictures there"),
        ("seq/f%02x.png", r"f%02x\.png: no pictures there"),
    ):
        with pytest.raises(VideoError, match=message):
            open_video(tmp_path / source).__enter__()
    with pytest.raises(ValueError, match=r"--fps 0: must be between 0.01 and 1000"):
        open_video(folder, fps=0).__enter__()


def test_unreadable_pictures_stop_or_are_stood_in_for(folder):
    (folder / "f4.png").write_bytes(b"no picture")
    cv2.imwrite(str(folder / "f5.png"), picture(5, (32, 48)))
    with (
        open_video(folder) as video,
        pytest.raises(
            VideoError,
            match=r"f4\.png: not a readable picture .*\(--on_error skip goes on without it",
        ),
    ):
        list(video.frames())
    for skip in (0, 4, 5):
        with open_video(folder, on_error="skip") as video:
            frames = list(video.frames(skip))[skip:]
        assert greys(frames) == [0, 1, 2, 3, 3, 3, 6, 7, 8, 9, 10, 11][skip:]
        assert [s.number for s in frames if not s.readable] == [4, 5][max(0, skip - 4) :]
    (folder / "f0.png").write_bytes(b"")
    with pytest.raises(VideoError, match=r"f0\.png: .*the first picture tells the video's size"):
        open_video(folder, on_error="skip").__enter__()


def test_a_video_gets_its_name_once_it_is_whole(tmp_path):
    path = tmp_path / "out.mp4"

    def fails_after_two():
        with video_writer(path, SIZE, 10) as writer:
            writer.write(picture(1))
            writer.write(picture(2))
            raise KeyError

    with pytest.raises(KeyError):
        fails_after_two()
    assert not path.exists()
    with open_video(part_of(path)) as video:
        assert greys(video.frames()) == [1, 2], "what was written can be played"
    with video_writer(path, SIZE, 10) as writer:
        writer.write(picture(3))
    assert path.exists()
    assert not part_of(path).exists()


def test_a_browser_plays_it_from_its_beginning(tmp_path):
    """H.264 with its index before its frames; sizes that 4:2:0 cannot have are made even."""
    path, size = tmp_path / "out.mp4", (161, 91)
    with video_writer(path, size, 12.5) as writer:
        for number in range(5):
            writer.write(picture(5 * number, size))
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")
    with open_video(path) as video:
        assert (video.info.width, video.info.height, video.info.fps) == (162, 92, 12.5)
    source = base64.b64encode(data).decode()
    page = tmp_path / "page.html"
    page.write_text(f'<video muted src="data:video/mp4;base64,{source}"></video>')
    with browser.open_browser() as opened, browser.open_page(opened, page) as (tab, watch):
        state = tab.evaluate(
            """async () => {
                const video = document.querySelector("video");
                video.currentTime = 3.5 / 12.5;
                await new Promise((done, fail) => {
                    video.onseeked = done;
                    video.onerror = () => fail(video.error.message);
                    if (video.error) video.onerror();
                });
                const canvas = document.createElement("canvas").getContext("2d");
                canvas.drawImage(video, 0, 0);
                const grey = [...canvas.getImageData(40, 40, 1, 1).data];
                return [video.videoWidth, video.videoHeight, video.duration, grey];
            }"""
        )
    assert watch.messages == []
    assert state[:2] == [162, 92]
    assert state[2] == pytest.approx(5 / 12.5)
    np.testing.assert_allclose(state[3], [150, 150, 150, 255], atol=4)


def test_without_an_encoder_of_h264_it_is_said(tmp_path, monkeypatch):
    assert writer_module.note_of_encoder() == ""
    monkeypatch.setattr(writer_module, "_ENCODERS", writer_module._ENCODERS[-1:])
    assert "MPEG-4 Part 2, which VLC plays and browsers do not" in writer_module.note_of_encoder()
    with video_writer(tmp_path / "out.mp4", SIZE, 10) as writer:
        writer.write(picture(7))
    with open_video(tmp_path / "out.mp4") as video:
        assert greys(video.frames()) == [7]


def test_a_disk_that_is_nearly_full(tmp_path, monkeypatch):
    free = writer_module.ROOM
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free))
    writer = VideoWriter(tmp_path / "out.mp4", SIZE, 10)
    for number in range(16):
        writer.write(picture(number))
    free -= 1
    full = r"out\.mp4: cannot be written: the disk is full; free some space"
    with pytest.raises(OutputError, match=full):
        writer.write(picture(0))
    writer.stop()
    with pytest.raises(OutputError, match=full):
        VideoWriter(tmp_path / "out.mp4", SIZE, 10)


def test_frames_that_did_not_reach_the_disk_are_noticed(tmp_path):
    writer = VideoWriter(tmp_path / "out.mp4", SIZE, 10)
    writer.write(picture(1))
    writer.frames += 2
    with pytest.raises(OutputError, match=r"out\.mp4: .* 1 of 3 frames reached the disk; look at"):
        writer.close()
    assert not (tmp_path / "out.mp4").exists()
