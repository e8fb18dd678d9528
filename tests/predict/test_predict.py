"""Prediction on videos: windows, what is written, and bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from cmpose import cli
from cmpose.config import Config
from cmpose.data import video_writer
from cmpose.data.formats.posetrack import load_annotations
from cmpose.data.video import VideoError
from cmpose.evaluation.posetrack_ap import score_folders
from cmpose.models.weights import checkpoint
from cmpose.predict.frame import PredictedFrame, PredictedPerson
from cmpose.predict.predict import predict_video
from cmpose.predict.predictor import windows
from cmpose.predict.results import Totals
from tests.models.builders import build
from tests.shared_data import shared_data


def _files(folder):
    return [path for path in (folder / "out" / "journal").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("num_frames", "length", "expected"),
    [
        (1, 2, [[0], [1]]),
        (3, 1, [[0, 0, 0]]),
        (3, 3, [[0, 0, 1], [0, 1, 2], [1, 2, 2]]),
        (5, 2, [[0, 0, 0, 1, 1], [0, 0, 1, 1, 1]]),
        (5, 4, [[0, 0, 0, 1, 2], [0, 0, 1, 2, 3], [0, 1, 2, 3, 3], [1, 2, 3, 3, 3]]),
    ],
)
def test_windows_repeat_the_ends(num_frames, length, expected):
    assert list(windows(range(length), num_frames)) == expected


def test_everything_is_written(weights, clip, tmp_path):
    video, detections, frames, people = clip
    metrics = predict_video(
        video, weights, tmp_path / "out", detections=detections, explain=True, progress=False
    )
    assert metrics["frames"] == frames
    assert metrics["people"] == people
    assert metrics["box_source"] == "boxes.json"
    written = json.loads((tmp_path / "out" / "poses" / f"{video.stem}.json").read_text())
    assert len(written["images"]) == frames
    assert len(written["annotations"]) == people
    assert {len(a["keypoints"]) for a in written["annotations"]} == {51}
    capture = cv2.VideoCapture(str(tmp_path / "out" / f"{video.stem}_poses.mp4"))
    drawn, original = capture.read()[1], cv2.VideoCapture(str(video)).read()[1]
    assert drawn.shape == original.shape
    assert np.abs(drawn.astype(int) - original).max() > 60, "nothing was drawn"
    pictures = sorted((tmp_path / "out" / "explain").glob("*.png"))
    assert [str(p.relative_to(tmp_path / "out")) for p in pictures] == sorted(metrics["explained"])
    assert len(pictures) >= 2
    picture = cv2.imread(str(pictures[0]))
    assert picture.shape == (1000, 1600, 3)
    assert picture.std() > 20
    assert not list((tmp_path / "out").rglob(".*"))
    results = json.loads((tmp_path / "out" / "coco" / f"{video.stem}.json").read_text())
    for result, pose in zip(results, written["annotations"], strict=True):
        assert (result["image_id"], result["category_id"]) == (pose["image_id"], 1)
        assert (result["track_id"], result["bbox"]) == (pose["track_id"], pose["bbox"])
        actual = np.array(result["keypoints"]).reshape(17, 3)
        np.testing.assert_array_equal(actual[:, :2], np.reshape(pose["keypoints"], (17, 3))[:, :2])
        np.testing.assert_array_equal(actual[:, 2], pose["scores"])
        assert result["score"] == pytest.approx(np.sum(pose["scores"]) / 15)
    left = sorted(str(p.relative_to(tmp_path / "out" / "journal")) for p in _files(tmp_path))
    assert left == [f"{video.stem}/{name}" for name in ("finished.json", "settings.json")]


def test_score_reads_the_poses_back(weights, clip, rendered, tmp_path):
    """Order of frames is all that a video keeps of a sequence; ids and names are its own."""
    video, detections, *_ = clip
    predict_video(video, weights, tmp_path / "out", detections=detections, progress=False)
    result = score_folders(
        rendered / "annotations" / "val", tmp_path / "out" / "poses", match="order"
    )
    assert (
        result.num_predictions
        == json.loads((tmp_path / "out" / "metrics.json").read_text())["people"]
    )
    assert 0 <= result.mean <= 100


def test_poses_do_not_depend_on_who_else_is_there(weights, clip, tmp_path):
    video, detections, *_ = clip
    entries = json.loads(detections.read_text())
    first = entries[0]["track_id"]
    alone = tmp_path / "alone.json"
    alone.write_text(json.dumps([e for e in entries if e["track_id"] == first]))
    keypoints = []
    for name, boxes in (("all", detections), ("alone", alone)):
        predict_video(video, weights, tmp_path / name, detections=boxes, progress=False)
        poses = json.loads((tmp_path / name / "poses" / f"{video.stem}.json").read_text())
        keypoints.append([a["keypoints"] for a in poses["annotations"] if a["track_id"] == first])
    np.testing.assert_allclose(*keypoints, atol=1e-3)


def test_nobody_in_the_video(weights, tmp_path):
    video = tmp_path / "grey.mp4"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"mp4v"), 10, (256, 144))
    for _ in range(3):
        writer.write(np.full((144, 256, 3), 90, np.uint8))
    writer.release()
    metrics = predict_video(video, weights, tmp_path / "out", explain=True)
    assert metrics["people"] == 0
    assert metrics["box_source"] == "OpenCV HOG people detector"
    poses = json.loads((tmp_path / "out" / "poses" / "grey.json").read_text())
    assert len(poses["images"]) == 3
    assert poses["annotations"] == []
    command = ["predict", str(video), "--checkpoint", str(weights), "--out", str(tmp_path / "out")]
    for _ in range(2):  # also of a prediction that is done already
        with pytest.raises(SystemExit) as ended:
            cli.main([*command, "--explain"])
        assert "grey.mp4: nobody was found: give --detections FILE, or --detector" in str(
            ended.value
        )


def test_nobody_is_left_of_the_boxes_that_were_given(weights, clip, tmp_path):
    """Exit status 1 and the reasons, where the note said to give the file that was given."""
    video, detections, frames, _ = clip
    entries = json.loads(detections.read_text())
    last = [entry for entry in entries if entry["frame"] == frames - 1]
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps([*last, {**last[0], "category_id": 7}]))
    command = ["predict", video, "--checkpoint", weights, "--out", tmp_path / "out"]
    with pytest.raises(SystemExit) as ended:
        cli.main([*map(str, command), "--detections", str(boxes), "--max_frames=2"])
    assert (
        "boxes.json: nobody is in the 2 frames that were predicted; left out: "
        f"{len(last)} × frame behind the last one predicted, 1 × not a person (category_id)"
    ) in str(ended.value)
    assert (tmp_path / "out" / "poses" / f"{video.stem}.json").exists()


def test_tracks_are_the_number_of_ids(weights, clip, tmp_path, capsys):
    video, detections, *_ = clip
    entries = json.loads(detections.read_text())[:1]
    boxes = tmp_path / "boxes.json"
    boxes.write_text(json.dumps([{**e, "track_id": 1234567} for e in entries]))
    metrics = predict_video(video, weights, tmp_path / "out", detections=boxes)
    assert (metrics["people"], metrics["tracks"]) == (1, 1)
    assert "1 poses of 1 tracks" in capsys.readouterr().out
    totals = Totals(0.1)
    for number, ids in enumerate([[0, 9], [1, 9], [], [5, 2], [0]]):
        someone = PredictedPerson(0, 1.0, np.zeros(4), np.zeros((15, 2)), np.zeros(15), False)
        totals.add(PredictedFrame(number, None, [someone._replace(track_id=i) for i in ids], True))
    assert totals.counts["tracks"] == 5


def test_a_video_that_cannot_be_read(weights, tmp_path):
    with pytest.raises(VideoError, match=r"none\.mp4: no such video"):
        predict_video(tmp_path / "none.mp4", weights, tmp_path / "out")
    for name, content in (("empty.mp4", b""), ("text.mp4", b"not a video at all")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(VideoError, match=rf"{name}: FFmpeg finds no frame in it"):
            predict_video(tmp_path / name, weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_video_that_cannot_be_written(weights, clip, tmp_path, monkeypatch):
    monkeypatch.setattr(video_writer, "_ENCODERS", (("none", {}),))
    with pytest.raises(
        VideoError, match=r"256×144 pixels there \(this PyAV has no encoder\); leave"
    ):
        predict_video(clip[0], weights, tmp_path / "out", detections=clip[1], progress=False)


def test_the_video_itself_is_never_written_over(weights, clip, tmp_path):
    video = tmp_path / clip[0].name
    video.write_bytes(clip[0].read_bytes())
    predict_video(video, weights, tmp_path, detections=clip[1], progress=False)
    assert video.read_bytes() == clip[0].read_bytes()


def test_leaving_out_a_frame_shifts_no_other(weights, clip, rendered, tmp_path):
    """Detections, poses and explained frames go by the numbers in the pictures' names."""
    _, detections, _, _ = clip
    [annotation] = (rendered / "annotations" / "val").glob("*.json")
    images = json.loads(annotation.read_text())["images"]
    folder = tmp_path / "seq"
    folder.mkdir()
    numbers = [0, 2, 3]
    for number in numbers:
        shutil.copy(rendered / images[number]["file_name"], folder / f"frame{number:04d}_cam1.jpg")
    (folder / "._frame0001_cam1.jpg").write_bytes(b"no picture")
    boxes = [box for box in json.loads(detections.read_text()) if box["frame"] in (*numbers, 1)]
    file = tmp_path / "boxes.json"
    file.write_text(json.dumps(boxes))
    options = {"outputs": ["poses", "coco"], "progress": False, "explain_frames": [3]}
    with pytest.raises(
        ValueError,
        match=r"are of frames that the video does not have, e\.g\. 1; its frames are 0 to 3, n",
    ):
        predict_video(folder, weights, tmp_path / "out", detections=file, **options)
    boxes = [box for box in boxes if box["frame"] != 1]
    file.write_text(json.dumps(boxes))
    metrics = predict_video(folder, weights, tmp_path / "out", detections=file, **options)
    assert metrics["frames"] == 3
    assert {Path(p).name[:10] for p in metrics["explained"]} == {"seq_000003"}
    [sequence] = load_annotations(tmp_path / "out/poses")
    assert [(f.image_id, f.index) for f in sequence.frames] == [(n, n) for n in numbers]
    assert sequence.frames[1].extra["source"] == "seq/frame0002_cam1.jpg"
    for frame in sequence.frames:
        shown = sorted(person.track_id for person in frame.people)
        assert shown == sorted(b["track_id"] for b in boxes if b["frame"] == frame.index)
        for person in frame.people:
            [expected] = [
                b["bbox"]
                for b in boxes
                if (b["frame"], b["track_id"]) == (frame.index, person.track_id)
            ]
            np.testing.assert_allclose(person.box[:2], expected[:2], atol=1e-3)
    results = json.loads((tmp_path / "out/coco/seq.json").read_text())
    assert {entry["image_id"] for entry in results} == {box["frame"] for box in boxes}
    with pytest.raises(ValueError, match=r"--explain_frames \[1\]: .* has frames 0 to 3, numbered"):
        predict_video(folder, weights, tmp_path / "x", **options | {"explain_frames": [1]})


def test_frames_to_explain_must_exist(weights, clip, tmp_path):
    with pytest.raises(ValueError, match=r"--explain_frames \[99\]: .* has frames 0 to 3"):
        predict_video(clip[0], weights, tmp_path / "out", explain=True, explain_frames=[1, 99])


def test_explain_needs_fine_token_enhancement(clip, tmp_path):
    model = build(fine="off", num_keypoints=15)
    checkpoint.save(tmp_path, "model", model.state_dict(), Config(model=model.config))
    with pytest.raises(ValueError, match=r"--explain needs .*model\.fine=off"):
        predict_video(clip[0], tmp_path / "model", tmp_path / "out", explain=True)


@pytest.mark.shared_data
def test_people_in_a_real_video_by_hog(weights, tmp_path):
    video = shared_data("video", "street.mp4")
    metrics = predict_video(
        video, weights, tmp_path / "out", explain_frames=[2], explain=True, progress=False
    )
    assert metrics["frames"] == 5
    assert metrics["people"] >= 5
    assert metrics["explained"]
    poses = json.loads((tmp_path / "out" / "poses" / "street.json").read_text())
    boxes = np.array([a["bbox"] for a in poses["annotations"]])
    assert (boxes[:, 3] > boxes[:, 2]).all(), "people stand upright here"
