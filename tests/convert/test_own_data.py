"""From a video and labels of one's own to a trained model: four keypoints all the way through."""

from __future__ import annotations

import csv
import json

import cv2
import numpy as np
import pytest
import torch

from cmpose.cli import main
from cmpose.convert.frames import extract_frames
from cmpose.data.skeleton import Skeleton
from cmpose.evaluation.evaluate import evaluate_checkpoint
from cmpose.evaluation.inference import predict_heatmaps
from cmpose.models.weights import checkpoint
from cmpose.models.weights.folder import SKELETON
from cmpose.predict.predict import predict_video
from cmpose.train.train import train
from tests.models.builders import clips as random_clips
from tests.recipes import FINE, recipe, write_recipe

NAMES = ["head", "tail", "left_paw", "right_paw"]
FRAMES = 6


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A moving cross: video, labels, boxes, skeleton; through ``frames`` and ``convert``."""
    folder = tmp_path_factory.mktemp("own")
    video = folder / "cat.mp4"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"mp4v"), 10, (160, 120))
    rows, boxes = [], []
    for n in range(FRAMES):
        picture = np.full((120, 160, 3), 90, np.uint8)
        x, y = 60 + 6 * n, 60
        points = {
            "head": (x, 30),
            "tail": (x, 90),
            "left_paw": (x + 25, y),
            "right_paw": (x - 25, y),
        }
        for name, at in points.items():
            cv2.circle(picture, at, 6, (255, 255, 255), -1)
            rows.append(["cat", n, 3, name, *at])
        boxes.append({"frame": n, "bbox": [x - 30, 25, 60, 70], "score": 0.8, "track_id": 3})
        writer.write(picture)
    writer.release()
    with open(folder / "labels.csv", "w", newline="") as file:
        csv.writer(file).writerows([["sequence", "frame", "track", "keypoint", "x", "y"], *rows])
    (folder / "boxes.json").write_text(json.dumps(boxes))
    skeleton = {"keypoints": NAMES, "skeleton": [["head", "tail"], ["left_paw", "right_paw"]]}
    (folder / "skeleton.json").write_text(json.dumps(skeleton))
    main(["frames", str(video), str(folder / "frames" / "cat")])
    for split in ("train", "val"):
        main(
            ["convert", str(folder / "labels.csv"), str(folder / "data"), "--split", split]
            + ["--images", str(folder / "frames"), "--boxes", str(folder / "boxes.json")]
            + ["--skeleton", str(folder / "skeleton.json")]
        )
    return folder


@pytest.fixture(scope="module")
def trained(own, tmp_path_factory):
    run = tmp_path_factory.mktemp("run") / "run"
    fields = {"model.num_keypoints": 0, "train.epochs": 2, "train.batch_size": 6}
    fields |= {"train.pictures_every": 1}
    metrics = train(recipe(own / "data", **(FINE | fields)), run, progress=False)
    assert metrics["steps"] == 2
    return run, metrics


def test_the_checkpoint_knows_its_keypoints(trained):
    run, metrics = trained
    model, config = checkpoint.load_model(run)
    expected = Skeleton(tuple(NAMES), ((0, 1), (2, 3)), ((2, 3),))
    assert model.skeleton == expected
    assert config.model.num_keypoints == 4, "0 was settled when training started"
    assert metrics["ap"]["joints"] == NAMES
    assert "not PoseTrack's AP" in metrics["ap"]["metric"]
    assert list(metrics["ap"]["columns"]) == ["Mean"]
    [file] = (run / "predictions").glob("*.json")
    written = json.loads(file.read_text())
    assert written["categories"][0]["flip_pairs"] == [["left_paw", "right_paw"]]
    assert {len(a["keypoints"]) for a in written["annotations"]} == {12}


def test_evaluate_with_converted_boxes_and_predict(own, trained, tmp_path, capsys):
    run, _ = trained
    _, config = checkpoint.load_model(run)
    config.data.boxes = "annotations/val_boxes.json"
    config.data.flip_test = True
    metrics = evaluate_checkpoint(run, config.data, config.train, tmp_path / "evaluation")
    assert metrics["box_source"] == "val_boxes.json"
    assert metrics["clips"] == FRAMES
    assert "keypoint AP, PCK 0.1" in capsys.readouterr().out
    main(["score", str(own / "data/annotations/val"), str(tmp_path / "evaluation/predictions")])
    assert "left_paw" in capsys.readouterr().out
    predict_video(
        own / "cat.mp4",
        run,
        tmp_path / "poses",
        detections=own / "boxes.json",
        explain_frames=[2],
        explain=True,
        progress=False,
    )
    poses = json.loads((tmp_path / "poses/poses/cat.json").read_text())
    assert poses["categories"][0]["keypoints"] == NAMES
    assert len(poses["annotations"]) == FRAMES
    picture = cv2.imread(str(tmp_path / "poses/explain/cat_000002_3.png"))
    assert picture.shape == (1000, 1600, 3)


def test_flip_test_swaps_the_models_own_pairs(trained):
    model, config = checkpoint.load_model(trained[0])
    config.data.flip_test = config.data.udp = True
    images = random_clips(1, config.model)
    with torch.no_grad():
        once = predict_heatmaps(model, images, config.data).heatmaps
        mirrored = predict_heatmaps(model, images.flip(-1), config.data).heatmaps
    torch.testing.assert_close(mirrored.flip(3)[:, [0, 1, 3, 2]], once, rtol=1e-4, atol=1e-6)


def test_another_number_of_keypoints_is_named(own, rendered, trained, tmp_path):
    small = {**FINE, "model.num_keypoints": 3}
    with pytest.raises(
        ValueError,
        match=r"num_keypoints=3, but the annotations have 4 keypoints \(head, tail, left_paw, "
        r"right_paw\): set model\.num_keypoints=4, or 0",
    ):
        train(recipe(own / "data", **small), tmp_path / "run", progress=False)
    _, config = checkpoint.load_model(trained[0])
    config.data.root = str(rendered)
    with pytest.raises(ValueError, match=r"the model predicts 4 keypoints \(head.* have 15 keyp"):
        evaluate_checkpoint(trained[0], config.data, config.train, tmp_path / "evaluation")
    mixed = write_recipe(tmp_path / "r.yaml", recipe(own / "data"))
    with pytest.raises(SystemExit, match=r"model\.num_keypoints=15, but the annotations have 4"):
        main(["train", "--config", str(mixed), "--output", str(tmp_path / "x")])


def test_resuming_with_other_flips_is_refused(own, trained, tmp_path):
    run, _ = trained
    folder = checkpoint.training_checkpoints(run / "checkpoints")[-1]
    file = folder / SKELETON
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"flip_pairs": []}))
    try:
        with pytest.raises(ValueError, match=r"it was trained on 4 keypoints .* or other flip_pa"):
            train(checkpoint.load_config(folder), run, resume=True, progress=False)
        file.write_text("{")
        with pytest.raises(
            checkpoint.CheckpointError,
            match=r"skeleton\.json: not valid JSON .* it is damaged, use another checkpoint",
        ):
            checkpoint.load_skeleton(folder, 4)
        file.write_text(before)
        with pytest.raises(checkpoint.CheckpointError, match=r"has 4 keypoints, but config\.json"):
            checkpoint.load_skeleton(folder, 15)
    finally:
        file.write_text(before)


def test_frames_go_on_where_they_stopped(own, tmp_path):
    video = own / "cat.mp4"
    done = extract_frames(video, tmp_path / "f", every=2)
    assert (done.frames, done.written) == (3, 3)
    names = sorted(p.name for p in (tmp_path / "f").iterdir())
    assert names == ["000000.jpg", "000002.jpg", "000004.jpg", "frames.json"]
    (tmp_path / "f" / "000002.jpg").unlink()
    index = json.loads((tmp_path / "f/frames.json").read_text())
    assert (index["frames"], index["finished"]) == (FRAMES, True)
    again = extract_frames(video, tmp_path / "f", every=2)
    assert (again.frames, again.written) == (3, 1)
    with pytest.raises(FileExistsError, match="another video or setting: every was 2, is 1"):
        extract_frames(video, tmp_path / "f")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="holds files that are not this command's"):
        extract_frames(video, tmp_path / "other")
    with pytest.raises(ValueError, match="every: expected at least 1, got 0"):
        extract_frames(video, tmp_path / "g", every=0)
    with pytest.raises(ValueError, match="quality: expected 1 to 100, got 101"):
        extract_frames(video, tmp_path / "g", quality=101)


def test_the_report_names_these_keypoints(trained):
    run, _ = trained
    main(["report", str(run)])
    page = (run / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in NAMES)
    assert "not PoseTrack" in page
    assert "Official PoseTrack AP" not in page
