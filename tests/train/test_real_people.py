"""What must be shown: real people are learnt. Takes minutes."""

from __future__ import annotations

import json

import pytest

from tests.shared_data import shared_data


@pytest.mark.shared_data
def test_real_people_are_learnt_by_heart(zygote, tmp_path):
    run = tmp_path / "run"
    root = ["--data.root", str(shared_data("posetrack18"))]
    recipe = ["--config", "configs/posetrack18_sample.yaml", *root]
    # In two thirds of the recipe's steps already.
    shorter = ["--train.epochs", "40", "--output", str(run)]
    done = zygote.run("train", *recipe, *shorter)
    assert done.status == 0, done.output[-3000:]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["clips"] == 14
    assert metrics["box_source"] == "ground truth"
    assert metrics["ap"]["columns"]["Mean"] >= 90

    detected = tmp_path / "detected"
    boxes = ["--data.boxes", "annotations/val_detections.json", "--output", str(detected)]
    done = zygote.run("evaluate", "--checkpoint", str(run), *recipe, *boxes)
    assert done.status == 0, done.output[-3000:]
    assert "boxes: val_detections.json" in done.output
    metrics = json.loads((detected / "metrics.json").read_text())
    assert metrics["box_source"] == "val_detections.json"
    assert metrics["clips"] == 186

    video = shared_data("video", "two_people.mp4")
    out = tmp_path / "predicted"
    done = zygote.run("predict", video, "--checkpoint", run, "--out", out, "--explain")
    assert done.status == 0, done.output[-3000:]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["frames"] == 72
    assert metrics["people"] >= 60
    assert (out / "poses" / "two_people.json").is_file()
    assert (out / "two_people_poses.mp4").is_file()
    assert len(metrics["explained"]) >= 3
