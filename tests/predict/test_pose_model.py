"""``cmpose.load(...).predict(...)``: what goes in, what comes out, as a user would write it."""

from __future__ import annotations

import json
import re
import shutil

import cv2
import numpy as np
import pytest
import torch

import cmpose
from cmpose.data.pictures import read_picture
from cmpose.data.video import VideoError
from cmpose.models.weights.folder import CheckpointError
from cmpose.predict.journal import JournalError
from tests.shared_data import PROJECT


def corners(boxes):
    """Boxes by frame, [P, 6]: two corners, a score, a track id."""
    frames = {}
    for box in boxes:
        x, y, w, h = box["bbox"]
        frames.setdefault(box["frame"], []).append([x, y, x + w, y + h, 1.0, box["track_id"]])
    return frames


CORNERS = 2e-4
"""A box as corners is rounded otherwise than with its width, and poses have four decimals."""


@pytest.fixture(scope="module")
def model(weights):
    return cmpose.load(weights)


@pytest.fixture(scope="module")
def frames_of(model, clip):
    """The frames of the clip, predicted with its file of boxes."""
    video, boxes, *_ = clip
    return list(model.predict(video, boxes=boxes))


def same(a, b, rounding=0.0):
    for name in ("number", "keypoints", "scores", "boxes", "box_scores", "ids", "readable"):
        one, other = getattr(a, name), getattr(b, name)
        np.testing.assert_allclose(one, other, rtol=0, atol=rounding, err_msg=name)


def test_a_frame_has_its_people(frames_of, clip, model):
    _, boxes, count, people = clip
    assert [frame.number for frame in frames_of] == list(range(count))
    assert sum(len(frame.ids) for frame in frames_of) == people
    frame = max(frames_of, key=lambda f: len(f.ids))
    p = len(frame.ids)
    assert frame.picture.shape == (144, 256, 3)
    assert frame.keypoints.shape == (p, 15, 2)
    assert frame.scores.shape == (p, len(model.skeleton.keypoints))
    assert frame.boxes.shape == (p, 4)
    assert frame.box_scores.shape == (p,)
    detections = np.array(corners(json.loads(boxes.read_text()))[frame.number])
    order = np.argsort(detections[:, 5])
    here = np.argsort(frame.ids)
    np.testing.assert_array_equal(frame.ids[here], detections[order, 5])
    inside = np.clip(detections[order, :4] - [0, 0, 1, 1], 0, [255, 143, 255, 143])
    np.testing.assert_allclose(frame.boxes[here], inside, atol=1e-3)


def test_a_plot_is_rgb_and_drawn_on(frames_of):
    frame = max(frames_of, key=lambda f: len(f.ids))
    drawn = frame.plot()
    assert drawn.dtype == np.uint8
    assert drawn.shape == frame.picture.shape
    changed = (drawn != frame.picture).any(axis=2)
    assert 0 < changed.sum() < changed.size
    # Where nothing is drawn the colours are in the order that they had.
    np.testing.assert_array_equal(drawn[~changed], frame.picture[~changed])


def test_saved_is_what_the_command_writes(model, weights, clip, frames_of, tmp_path, zygote):
    video, boxes, *_ = clip
    model.predict(video, boxes=boxes).save(tmp_path / "python", progress=False)
    ended = zygote.run(
        *("predict", str(video), "--checkpoint", str(weights), "--out", str(tmp_path / "line")),
        *("--detections", str(boxes)),
    )
    assert ended.status == 0, ended.output
    written = [f"poses/{video.stem}.json", f"coco/{video.stem}.json", f"{video.stem}_poses.mp4"]
    for name in written:
        line = (tmp_path / "line" / name).read_bytes()
        assert (tmp_path / "python" / name).read_bytes() == line, name
    results = json.loads((tmp_path / "python" / written[1]).read_text())
    people = [
        (frame.number, int(track), box)
        for frame in frames_of
        for track, box in zip(frame.ids, frame.boxes, strict=True)
    ]
    assert [(r["image_id"], r["track_id"]) for r in results] == [p[:2] for p in people]
    for result, (_, _, box) in zip(results, people, strict=True):
        x, y, w, h = result["bbox"]
        np.testing.assert_allclose([x, y, x + w, y + h], box, atol=1e-3)


def test_boxes_in_memory_are_those_of_the_file(model, clip, frames_of):
    video, boxes, count, _ = clip
    by_number = corners(json.loads(boxes.read_text()))
    for frame, expected in zip(model.predict(video, boxes=by_number), frames_of, strict=True):
        same(frame, expected, CORNERS)
    listed = [torch.tensor(by_number.get(i, []), dtype=torch.float64) for i in range(count)]
    for frame, expected in zip(model.predict(video, boxes=listed), frames_of, strict=True):
        same(frame, expected, CORNERS)


def test_frames_in_memory_are_those_of_the_video(model, clip, frames_of):
    boxes = clip[1]
    pictures = np.stack([frame.picture for frame in frames_of])
    for source in (pictures, list(pictures), torch.from_numpy(pictures)):
        for frame, expected in zip(model.predict(source, boxes=boxes), frames_of, strict=True):
            same(frame, expected)


def test_pictures_by_path_and_alone(model, rendered):
    files = sorted((rendered / "images").rglob("*.jpg"))[:3]
    box = np.array([[20.0, 20.0, 120.0, 140.0]])
    frames = list(model.predict(files, boxes=[box] * 3))
    assert len(frames) == 3
    for file, frame in zip(files, frames, strict=True):
        np.testing.assert_array_equal(frame.picture, read_picture(file)[..., ::-1])
        np.testing.assert_array_equal(frame.boxes, box - [0, 0, 1, 1])
    one = read_picture(files[0])[..., ::-1]
    for source in (files[0], str(files[0]), one):
        [frame] = model.predict(source, boxes=box)
        np.testing.assert_array_equal(frame.picture, one)
        assert frame.keypoints.shape == (1, 15, 2)


def test_ones_own_detector_finds_the_people(model, clip, frames_of):
    video, boxes, count, _ = clip
    by_number = corners(json.loads(boxes.read_text()))
    pictures = []

    def detector(picture):
        pictures.append(picture)
        return np.array(by_number.get(len(pictures) - 1, []))[:, :5]

    steady = {"detect_every": 1, "bridge": 0, "smooth": 0}
    frames = list(model.predict(video, detector=detector, **steady))
    assert len(pictures) == count
    for frame, expected, picture in zip(frames, frames_of, pictures, strict=True):
        np.testing.assert_array_equal(picture, frame.picture)
        np.testing.assert_array_equal(np.sort(frame.boxes, axis=0), np.sort(expected.boxes, axis=0))


def test_an_iteration_starts_anew_and_holds_few_frames(model, clip):
    video, boxes, *_ = clip
    prediction = model.predict(video, boxes=boxes, batch_size=1)
    first = next(iter(prediction))
    same(first, next(iter(prediction)))


def test_a_detector_is_not_mixed_with_another_run(model, clip, tmp_path):
    video, *_ = clip
    whole = {"detect_every": 1, "bridge": 0, "smooth": 0, "max_frames": 2}
    metrics = model.predict(video, detector=lambda p: [[5, 5, 90, 140]], **whole).save(
        tmp_path / "out", outputs=["poses"], progress=False
    )
    assert metrics["box_source"].endswith("<lambda>")
    assert metrics["people"] == 2
    with pytest.raises(JournalError, match=r"detector was .*<lambda>', is None"):
        model.predict(video, **whole).save(tmp_path / "out", outputs=["poses"], progress=False)


def test_a_video_that_is_cut_off_warns(model, tmp_path, frames_of):
    cut = tmp_path / "cut.avi"
    writer = cv2.VideoWriter(str(cut), cv2.VideoWriter.fourcc(*"MJPG"), 10, (256, 144))
    for frame in frames_of:
        writer.write(frame.picture[..., ::-1].copy())
    writer.release()
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    with pytest.warns(UserWarning, match=r"cut\.avi.* bytes"):
        list(model.predict(cut, detector=lambda p: [[5, 5, 90, 140]]))


BLACK = np.zeros((160, 99, 3), np.uint8)
BOX = [5.0, 5.0, 90.0, 140.0]


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([[[1, 2, 3]]], r"boxes\[0\]: has the shape \[1, 3\]; a row is x1, y1, x2, y2"),
        ([[], "none"], r"boxes\[1\]: 'none' are no boxes"),
        ({3: [[1, 2, np.nan, 4]]}, r"boxes\[3\], row 0: .* is not finite"),
        ([[BOX, [50, 50, 20, 20]]], r"boxes\[0\], row 1: .* has no area; .*not x, y, width"),
        ([[[*BOX, 1, 0.5]]], r"boxes\[0\]: track ids \[0.5\]: must be whole"),
        ([[[*BOX, 1, 2], [*BOX, 1, 2]]], r"boxes\[0\]: track ids .* twice"),
        ({-1: [BOX]}, "boxes: -1: a frame's number is 0 or more"),
        ({"a.jpg": [BOX]}, r"boxes: 'a.jpg': a frame's number"),
        ([], "boxes: none in any frame"),
        ([[BOX]] * 99, r"boxes: .* of frames that the video does not have"),
        ([[[0.1, 0.1, 0.5, 0.9]]], "boxes: boxes are shares of the picture"),
        ([[[*BOX, 0.1]]], "boxes: nobody is left of its 1 boxes: 1 × score below"),
        ([[[*BOX, 1, 2], [*BOX, 1, -1]]], r"boxes: 1 of 2 have a track id"),
    ],
)
def test_bad_boxes_are_named(model, boxes, message):
    pictures = np.zeros((2, 144, 256, 3), np.uint8)
    with pytest.raises(ValueError, match=message):
        list(model.predict(pictures, boxes=boxes))


def test_a_detectors_bad_boxes_are_named(model):
    pictures = np.zeros((2, 144, 256, 3), np.uint8)
    with pytest.raises(ValueError, match=r"detector .*<lambda>, frame 0: has the shape \[1, 2\]"):
        list(model.predict(pictures, detector=lambda picture: [[1, 2]]))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (np.zeros((2, 8, 8, 3)), r"frame 0 is float64 \[8, 8, 3\]; frames are uint8"),
        (np.zeros((8, 8), np.uint8), r"frames are uint8"),
        (np.zeros((0, 8, 8, 3), np.uint8), "an array of no frames"),
        (
            [np.zeros((160, 98, 3), np.uint8), np.zeros((160, 99, 3), np.uint8)],
            "frame 1: is 99×160",
        ),
        ([], "video: .* is none: give a path"),
        (3.5, "video: 3.5 is none: give a path"),
        (["missing.jpg"], "missing.jpg: no such picture"),
        ("missing.mp4", "missing.mp4: no such video"),
    ],
)
def test_what_is_no_video_is_named(model, source, message):
    with pytest.raises(VideoError, match=message):
        list(model.predict(source, boxes=[[BOX]]))


def test_options_are_checked_at_the_call(model, clip):
    video, boxes, *_ = clip
    with pytest.raises(ValueError, match="batch_size 0"):
        model.predict(video, boxes=boxes, batch_size=0)
    with pytest.raises(ValueError, match=r"detector .*: boxes are given too"):
        model.predict(video, boxes=boxes, detector=lambda picture: [])
    with pytest.raises(CheckpointError, match="no checkpoint at nowhere"):
        cmpose.load("nowhere")
    with pytest.raises(AttributeError, match="no attribute 'loud'"):
        cmpose.loud  # noqa: B018


@pytest.mark.parametrize("document", ["README.md", "docs/predict.md"])
def test_what_the_documents_show_runs(document, weights, clip, tmp_path, monkeypatch, capsys):
    text = (PROJECT / document).read_text()
    [code] = re.findall(r"```python\n(import cmpose\n.*?)```", text, re.DOTALL)
    (tmp_path / "runs/demo").mkdir(parents=True)
    (tmp_path / "runs/demo/train").symlink_to(weights)
    shutil.copy(clip[0], tmp_path / "walk.mp4")
    shutil.copy(clip[1], tmp_path / "boxes.json")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, document, "exec"), {})
    assert (tmp_path / "out/poses/walk.json").is_file()
    assert (tmp_path / "out/walk_poses.mp4").is_file()
    if "print(" in code:
        assert len(re.findall(r"^\d+ \[", capsys.readouterr().out, re.MULTILINE)) == clip[2]
