"""What goes in comes out: pictures, several sources, a window."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys

import cv2
import numpy as np
import pytest

import cmpose
from cmpose import cli
from cmpose.data.pictures import read_picture
from cmpose.data.video import VideoError
from cmpose.predict.sources import boxes_of, find_sources, name_sources, predict_each
from cmpose.predict.window import WindowError

BOX = np.array([[5.0, 5.0, 90.0, 140.0]])


@pytest.fixture(scope="module")
def picture(rendered):
    return min((rendered / "images").rglob("*.jpg"))


@pytest.fixture
def model(weights):
    return cmpose.load(weights)


@pytest.mark.parametrize("ending", [".jpg", ".png", ".jpeg", ".ppm"])
def test_a_picture_comes_out_as_a_picture(model, picture, tmp_path, ending):
    source = tmp_path / f"me{ending}"
    if ending == ".jpg":
        shutil.copy(picture, source)
    else:
        cv2.imwrite(str(source), read_picture(picture))
    prediction = model.predict(source, boxes=BOX)
    metrics = prediction.save(tmp_path / "out", progress=False)
    drawn = tmp_path / "out" / f"me_poses{'.png' if ending == '.ppm' else ending}"
    assert not list((tmp_path / "out").glob("*.mp4"))
    [frame] = prediction
    exact = 0 if drawn.suffix == ".png" else 3
    difference = np.abs(read_picture(drawn)[..., ::-1].astype(int) - frame.plot())
    assert difference.mean() <= exact
    assert metrics["people"] == 1
    drawn.unlink()
    with pytest.raises(ValueError, match=rf"{drawn.name}: is missing"):
        prediction.save(tmp_path / "out", progress=False)


def test_a_picture_in_memory_comes_out_as_a_png(model, picture, tmp_path):
    prediction = model.predict(read_picture(picture)[..., ::-1], boxes=BOX)
    prediction.save(tmp_path, progress=False)
    np.testing.assert_array_equal(
        read_picture(tmp_path / "frames_poses.png")[..., ::-1], next(iter(prediction)).plot()
    )


def test_each_of_several_sources_has_a_folder(
    clip, weights, picture, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        shutil.copy(clip[0], tmp_path / folder / "walk.mp4")
    shutil.copy(picture, tmp_path / "me.jpg")
    (tmp_path / "a" / "notes.txt").write_text("no video")
    (tmp_path / "broken.mp4").write_text("no video either")
    (tmp_path / "boxes").mkdir()
    for name in ("a_walk_mp4", "b_walk_mp4"):
        shutil.copy(clip[1], tmp_path / "boxes" / f"{name}.json")
    for name in ("me", "broken"):
        box = {"frame": 0, "bbox": [5, 5, 90, 140]}
        (tmp_path / "boxes" / f"{name}.json").write_text(json.dumps([box]))
    command = ["predict", "*/*", "me.jpg", "broken.mp4", "--checkpoint", str(weights)]
    command += ["--detections", "boxes", "--max-frames", "2"]
    with pytest.raises(SystemExit, match=r"1 of 4 sources have no poses, .* broken\.mp4"):
        cli.main([*command, "--out", "out"])
    printed = capsys.readouterr()
    assert "[2 of 4] b/walk.mp4" in printed.out
    assert "broken.mp4: FFmpeg finds no frame in it" in printed.err
    files = [
        *("a_walk_mp4/walk_poses.mp4", "b_walk_mp4/poses/walk.json", "me/me_poses.jpg"),
        "me/coco/me.json",
    ]
    assert all((tmp_path / "out" / file).is_file() for file in files)
    cli.main(["predict", "me.jpg", "--checkpoint", str(weights), "--detections", "boxes/me.json"])
    assert (tmp_path / "runs/predict/me/me_poses.jpg").is_file()


def test_patterns_and_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("f10.mp4", "f9.MP4", "1.jpg", "1.png", "s1/1.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert find_sources(["f*"]) == ["f9.MP4", "f10.mp4"]
    unchanged = ["0", "rtsp://camera/*", "[1-9].jpg", "s1", "none.mp4", "no*.mp4"]
    assert find_sources(unchanged) == unchanged
    with pytest.raises(VideoError, match=r"^\*: are 2 pictures and 2 videos; give a pattern of"):
        find_sources(["*"])
    with pytest.raises(ValueError, match=r"f10.mp4: is given 2 times; once is enough"):
        find_sources(["f*", "f10.mp4"])
    assert name_sources(["f9.MP4", "0", "s1"]) == ["f9", "0", "s1"]
    assert name_sources(["1.jpg", "1.png", "f9.MP4"]) == ["1_jpg", "1_png", "f9"]
    assert name_sources(["1.jpg", "s1/1.jpg"]) == ["1_jpg", "s1_1_jpg"]
    with pytest.raises(ValueError, match=r"a b.mp4 and a-b.mp4|a b.mp4 and a_b.mp4: would both be"):
        name_sources(["a b.mp4", "a_b.mp4"])


def test_one_file_of_boxes_is_not_of_several_videos(tmp_path):
    with pytest.raises(ValueError, match=r"--detections b.json: is of one video, .* has walk.json"):
        boxes_of("b.json", "walk", several=True)
    assert boxes_of("b.json", "walk", several=False) == "b.json"
    assert boxes_of("", "walk", several=True) is None
    assert boxes_of(str(tmp_path), "walk", several=False) == str(tmp_path / "walk.json")


def test_pictures_of_a_shell_s_pattern_are_told_from_a_video(capsys):
    predict_each(["a.jpg", "b.jpg"], lambda source: None)
    assert (
        "2 pictures, each for itself; if they are a video's frames, give" in capsys.readouterr().out
    )


def test_a_message_has_hyphens_in_its_options(weights, clip):
    command = ["predict", str(clip[0]), "--checkpoint", str(weights), "--batch_size", "0"]
    with pytest.raises(SystemExit, match="cmpose predict: --batch-size 0: must be at least 1"):
        cli.main(command)


def test_without_a_display_a_window_says_so(model, clip, weights, monkeypatch):
    monkeypatch.delenv("DISPLAY", raising=False)
    message = (
        r"--show: there is no display here \(.*\); leave --show out: the drawn video is written"
    )
    if importlib.util.find_spec("tkinter") is None:  # as Debian's Python comes
        message = r"--show: this Python has no tkinter \(.*\), which draws the window: install it"
    with pytest.raises(WindowError, match=message):
        model.predict(clip[0], boxes=clip[1]).show()
    with pytest.raises(SystemExit, match=f"cmpose predict: {message}"):
        cli.main(["predict", str(clip[0]), "--checkpoint", str(weights), "--show"])


class Desktop:
    """Stands in for tkinter where there is no display: keeps what is shown, and can be closed."""

    def __init__(self, close_after: int) -> None:
        self.shown, self.keys, self.close_after = [], {}, close_after

    TclError = type("TclError", (Exception,), {})

    def Tk(self):
        return self

    def Label(self, root, **options):
        return self

    def PhotoImage(self, data, format):
        header, pixels = data.split(b"\n", 1)
        width, height = map(int, header.split()[1:3])
        assert format == "PPM"
        return np.frombuffer(pixels, np.uint8).reshape(height, width, 3)

    def configure(self, image):
        self.shown.append(image)

    def bind(self, key, function):
        self.keys[key] = function

    def update(self):
        if len(self.shown) >= self.close_after:
            self.keys["q"]()

    def winfo_screenwidth(self):
        return 1920

    def winfo_screenheight(self):
        return 192

    def title(self, text):
        self.named = text

    def protocol(self, *_): ...

    def pack(self): ...

    def destroy(self): ...


def test_a_window_shows_frames_until_it_is_closed(model, clip, picture, tmp_path, monkeypatch):
    video, boxes, count, _ = clip
    prediction = model.predict(video, boxes=boxes)
    frames = [frame.plot() for frame in prediction]
    desktop = Desktop(close_after=3)
    monkeypatch.setitem(sys.modules, "tkinter", desktop)
    prediction.show()
    assert desktop.named == f"{video}: poses"
    assert [image.shape for image in desktop.shown] == [(72, 128, 3)] * 3, "the screen is low"
    desktop = Desktop(close_after=count)
    monkeypatch.setattr(desktop, "winfo_screenheight", lambda: 1080)
    monkeypatch.setitem(sys.modules, "tkinter", desktop)
    prediction.show()
    np.testing.assert_array_equal(desktop.shown, frames)
    monkeypatch.setitem(sys.modules, "tkinter", Desktop(close_after=1))
    one = model.predict(video, boxes=boxes, batch_size=1)
    with pytest.raises(RuntimeError, match=r"stopped after \d+ of .*, the same command goes on"):
        one.save(tmp_path / "out", progress=False, show=True)
    metrics = one.save(tmp_path / "out", progress=False)
    assert 0 < metrics["resumed_at_frame"] < metrics["frames"] == count
    alone = model.predict(picture, boxes=BOX)
    assert alone.save(tmp_path / "one", progress=False, show=True)["people"] == 1
    alone.show()
