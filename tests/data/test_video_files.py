"""What a container says is a hint: frames, times, streams and damage are told by decoding."""

from __future__ import annotations

import struct
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest

from cmpose.convert.frames import extract_frames
from cmpose.data.video import VideoError, open_video
from cmpose.predict.options import Options, settle
from tests.data.video_files import (
    Stream,
    cover_first,
    display_matrix,
    edit_list,
    numbers_of,
    write_video,
)
from tests.shared_data import shared_data

EVEN = range(0, 800, 40)
INTRA = {"g": "1"}


def read(path):
    """What scanning tells, which reading must tell too, and the frames."""
    with open_video(path) as video:
        video.scan()
        scanned = video.info
        pictures = [frame.picture for frame in video.frames()]
        assert video.info == scanned
        assert scanned.frames == len(pictures)
    return scanned, pictures


def test_an_edit_list_shows_less_than_the_header_counts(tmp_path):
    path = write_video(tmp_path / "trim.mp4", Stream(EVEN))
    edit_list(path, 320)
    info, pictures = read(path)
    assert numbers_of(pictures) == list(range(8))
    assert (info.fps, info.missing, info.cut_off) == (25, 0, "")
    [note] = info.notes
    assert "names 20 frames, 0.80 s; 8 can be decoded, 0.32 s. The file is not known to be" in note
    done = extract_frames(path, tmp_path / "frames")
    assert done.frames == 8
    assert f"note: {note}" in str(done)


def test_a_variable_rate_is_told_and_averaged(tmp_path):
    times = [*range(0, 400, 40), *range(400, 2400, 200)]
    info, pictures = read(write_video(tmp_path / "vfr.mkv", Stream(times)))
    assert len(pictures) == 20
    assert info.fps == pytest.approx(19 / 2.2)
    assert info.cut_off == ""
    [note] = info.notes
    assert "has a variable rate: its frames are 40 to 200 ms apart, 8.64 a second on" in note
    assert extract_frames(tmp_path / "vfr.mkv", tmp_path / "f").frames == 20


@pytest.mark.parametrize("seconds", [200, 10**7], ids=["minutes", "months"])
def test_a_rate_that_no_video_has_is_not_taken(tmp_path, seconds):
    """Nothing could write a video of it. An AVI's header gives seconds a frame as scale / rate."""
    path = write_video(
        tmp_path / "slow.avi", Stream(range(0, 120, 40), codec="mjpeg", format="yuvj420p")
    )
    data = bytearray(path.read_bytes())
    at = data.index(b"strh") + 28
    data[at : at + 8] = struct.pack("<II", seconds, 1)
    path.write_bytes(data)
    info, pictures = read(path)
    assert (info.fps, len(pictures)) == (25, 3)


def test_a_recording_without_length_and_rate_is_timed_by_its_stamps(tmp_path):
    class Pipe:
        """A file that cannot be gone back in, as a browser's recorder has."""

        def __init__(self):
            self.data = b""

        def write(self, data):
            self.data += data
            return len(data)

    times, pipe = [0, 38, 76, 99, 137, 175, 198, 236, 274, 297], Pipe()
    write_video(tmp_path / "a.webm", Stream(times, codec="libvpx", unit=Fraction(1, 1000)))

    with av.open(pipe, "w", format="webm", options={"live": "1"}) as container:
        source = av.open(str(tmp_path / "a.webm"))
        out = container.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = out
                container.mux(packet)
    path = tmp_path / "rec.webm"
    path.write_bytes(pipe.data)
    info, pictures = read(path)
    assert len(pictures) == 10
    assert info.fps == pytest.approx(9 / 0.297)
    assert "has a variable rate: its frames are 23 to 38 ms apart" in info.notes[0]


def test_joined_streams_are_counted_to_their_end(tmp_path):
    first = write_video(tmp_path / "a.ts", Stream(EVEN, codec="mpeg2video"), format="mpegts")
    data = first.read_bytes()
    joined = tmp_path / "joined.ts"
    joined.write_bytes(data + data)
    info, _ = read(joined)
    assert info.frames == 40
    assert info.fps == 25, "time stamps that start again add nothing"
    # The detections and frames to explain that a header's count would have refused.
    assert settle(Options(explain_frames=(39,)), info)[1].explain_frames == (39,)
    with pytest.raises(ValueError, match=r"--explain_frames \[40\]: .* has frames 0 to 39"):
        settle(Options(explain_frames=(40,)), info)


def test_joined_files_of_which_the_first_is_read_are_named(tmp_path):
    path = write_video(tmp_path / "a.mp4", Stream(EVEN[:3]))
    path.write_bytes(path.read_bytes() * 2)
    info, pictures = read(path)
    assert len(pictures) == 3
    assert "a.mp4 is 2 files one behind the other, of which only the first can be" in info.notes[0]


@pytest.mark.parametrize("name", ["cut.mkv", "cut.mp4", "cut.avi"])
def test_a_file_that_is_cut_off_is_told_from_a_wrong_header(tmp_path, name):
    options = {"options": {"movflags": "faststart"}} if name == "cut.mp4" else {}
    path = write_video(tmp_path / name, Stream(EVEN, size=(320, 240), options=INTRA), **options)
    data = path.read_bytes()
    path.write_bytes(data[: int(0.6 * len(data))])
    info, pictures = read(path)
    assert 5 < len(pictures) < 18
    assert numbers_of(pictures[:-1]) == list(range(len(pictures) - 1))
    assert info.missing == 20 - len(pictures)
    size = len(data) if name != "cut.avi" else r"\d+"
    message = (
        rf"{name} is cut off: {int(0.6 * len(data))} bytes are there, its header promises {size}"
    )
    with pytest.raises(
        VideoError, match=message + rf"; {len(pictures)} frames .* of about 20; these"
    ):
        extract_frames(path, tmp_path / "frames")
    assert len(list((tmp_path / "frames").glob("*.jpg"))) == len(pictures)


def test_a_damaged_middle_costs_its_frames_and_is_told(tmp_path):
    path = write_video(tmp_path / "hole.mkv", Stream(EVEN, codec="mjpeg", format="yuvj420p"))
    data = bytearray(path.read_bytes())
    starts = [i for i in range(len(data)) if data[i : i + 3] == b"\xff\xd8\xff"]
    assert len(starts) == 20
    for number in (5, 11):
        size = data.index(b"\xff\xd9", starts[number]) + 2 - starts[number]
        data[starts[number] : starts[number] + size] = bytes(size)
    path.write_bytes(data)
    info, pictures = read(path)
    assert numbers_of(pictures) == [n for n in range(20) if n not in (5, 11)]
    assert info.missing == 2
    assert info.fps == 25, "of the frames that were not lost"
    [note] = info.notes
    assert "hole.mkv is damaged, first at frame 5 (2 gaps, 0 frames decoded in p" in note
    assert "lost frames have no number, those behind are counted on" in note


def test_of_several_streams_the_one_that_players_show_is_read(tmp_path):
    path = write_video(
        tmp_path / "two.mkv", Stream(EVEN[:5], default=False), Stream(EVEN[:7], size=(320, 240))
    )
    info, pictures = read(path)
    assert (info.width, info.height, info.frames) == (320, 240, 7)
    assert "two.mkv has 2 video streams; the one that players show is read, number 1" in str(
        extract_frames(path, tmp_path / "frames")
    )
    assert numbers_of(pictures) == list(range(7))


def test_a_cover_picture_as_first_stream_is_not_the_video(tmp_path):
    path = write_video(tmp_path / "cover.mp4", Stream(EVEN[:5]))
    cover_first(path, cv2.imencode(".jpg", np.zeros((300, 300, 3), np.uint8))[1].tobytes())
    opencv = cv2.VideoCapture(str(path)).read()[1]
    assert opencv.shape == (300, 300, 3), "what made this a fault"
    info, pictures = read(path)
    assert (info.width, info.height, info.notes) == (64, 48, ())
    assert numbers_of(pictures) == list(range(5))


def test_titles_in_another_encoding_are_no_matter(tmp_path):
    path = write_video(tmp_path / "latin.mkv", Stream(EVEN[:3]))
    path.write_bytes(path.read_bytes().replace(b"Lavf", b"Lav\xe9"))
    assert numbers_of(read(path)[1]) == [0, 1, 2]


def test_a_length_beyond_all_files_is_a_hint(tmp_path):
    path = write_video(tmp_path / "long.mkv", Stream(EVEN[:3]))
    data = path.read_bytes()
    at = data.index(b"\x18\x53\x80\x67") + 4
    path.write_bytes(data[:at] + b"\x01\x7f" + b"\xff" * 6 + data[at + 8 :])
    info, pictures = read(path)
    assert len(pictures) == 3
    assert info.cut_off == ""


def test_more_pixels_than_may_be_decoded_are_refused_or_lost(tmp_path, monkeypatch):
    path = write_video(tmp_path / "big.mkv", Stream(EVEN[:3], codec="mjpeg", format="yuvj420p"))
    monkeypatch.setenv("CMPOSE_MAX_PIXELS", "3000")
    with pytest.raises(
        VideoError, match=r"big\.mkv: 64×48 pixels by its header, more than the 3,00"
    ):
        open_video(path).__enter__()
    # A frame that claims more than the header did takes no memory.
    monkeypatch.setenv("CMPOSE_MAX_PIXELS", "4000")
    data = bytearray(path.read_bytes())
    at = data.index(b"\xff\xc0", data.index(b"\xff\xc0") + 1) + 5
    data[at : at + 4] = bytes([0, 128, 0, 128])
    path.write_bytes(data)
    info, pictures = read(path)
    assert numbers_of(pictures) == [0, 2]
    assert "big.mkv is damaged, first at frame 1 (1 gaps" in info.notes[-1]


def test_sound_alone_and_an_unknown_codec_are_named(tmp_path):
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(VideoError, match=r"sound\.mkv: holds no video that FFmpeg decodes; sou"):
        open_video(tmp_path / "sound.mkv").__enter__()
    path = write_video(tmp_path / "odd.mkv", Stream(EVEN[:3], codec="mjpeg", format="yuvj420p"))
    path.write_bytes(path.read_bytes().replace(b"V_MJPEG", b"V_OTHER"))
    with pytest.raises(VideoError, match=r"odd\.mkv: holds no video that FFmpeg decodes"):
        open_video(path).__enter__()


def test_interlaced_video_is_shown_and_told(tmp_path):
    """OpenCV 4.13 and 4.14 give black pictures, or what lay in memory."""
    stream = Stream(EVEN[:5], codec="libx264", options={"x264-params": "tff=1"})
    info, pictures = read(write_video(tmp_path / "tv.mkv", stream))
    assert numbers_of(pictures) == list(range(5))
    assert "tv.mkv is interlaced: what moves has combs" in info.notes[0]


@pytest.mark.parametrize("name", ["dv.mp4", "dv.mkv", "dv.avi"])
def test_pixels_that_are_not_square_are_told(tmp_path, name):
    path = write_video(tmp_path / name, Stream(EVEN[:3], shape=Fraction(4, 3)))
    info, pictures = read(path)
    assert [picture.shape for picture in pictures] == [(48, 64, 3)] * 3
    shown = "players show 85×48, boxes and poses are of the stored 64×48 pixels"
    assert f"{name} has pixels that are 1.33 times as wide as high: {shown}" in info.notes[0]


def test_an_animated_png_and_a_gif_are_videos(tmp_path):
    stream = Stream(EVEN[:4], codec="apng", format="rgb24")
    path = write_video(tmp_path / "a.png", stream, format="apng")
    info, pictures = read(path)
    assert (info.frames, info.name) == (4, "a")
    assert numbers_of(pictures) == [0, 1, 2, 3]
    path = write_video(tmp_path / "a.gif", Stream(EVEN[:4], codec="gif", format="gray"))
    assert [round(picture.mean()) for picture in read(path)[1]] == [20, 31, 42, 53]


def test_hevc_of_ten_bits_is_read_in_eight(tmp_path):
    options = {"x265-params": "log-level=none:pools=none"}
    stream = Stream(EVEN[:5], codec="libx265", format="yuv420p10le", options=options)
    info, pictures = read(write_video(tmp_path / "phone.mp4", stream))
    assert numbers_of(pictures) == list(range(5))
    assert pictures[0].dtype == np.uint8
    assert info.notes == ()


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((1, 0, 0, 1), lambda p: p),
        ((0, 1, -1, 0), lambda p: np.rot90(p, -1)),
        ((-1, 0, 0, -1), lambda p: p[::-1, ::-1]),
        ((0, -1, 1, 0), lambda p: np.rot90(p)),
        ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
        ((1, 0, 0, -1), lambda p: p[::-1]),
        ((0, 1, 1, 0), lambda p: p.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda p: np.rot90(p.transpose(1, 0, 2), 2)),
    ],
)
def test_turned_and_mirrored_videos_are_shown_upright(tmp_path, matrix, turn):
    corners = np.zeros((48, 64, 3), np.uint8)
    corners[:24, :32], corners[:24, 32:], corners[24:, :32] = 200, 130, 60
    writer = cv2.VideoWriter(str(tmp_path / "t.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (64, 48))
    writer.write(corners)
    writer.release()
    _, [straight] = read(tmp_path / "t.mp4")
    display_matrix(tmp_path / "t.mp4", *matrix)
    info, [shown] = read(tmp_path / "t.mp4")
    np.testing.assert_array_equal(shown, turn(straight))
    assert (info.height, info.width) == shown.shape[:2]


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("name", "frames", "fps", "note"),
    [
        ("trim.mp4", 120, 29.97, "names 300 frames, 10.01 s; 120 can be decoded, 4.00 s"),
        ("vfr.mkv", 94, 9.48, "its frames are 33 to 234 ms apart"),
        ("cat.mkv", 260, 27.8, "its frames are 16 to 100 ms apart"),
        ("rec.webm", 40, 30.3, "its frames are 23 to 38 ms apart"),
    ],
)
def test_the_videos_that_people_reported(name, frames, fps, note):
    with open_video(shared_data("reports", "container_counts", name)) as video:
        video.scan()
        assert video.info.frames == frames
        assert video.info.fps == pytest.approx(fps, abs=0.01)
        assert note in video.info.notes[0]
        assert not video.info.cut_off
