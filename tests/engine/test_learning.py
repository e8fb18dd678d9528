"""What must be shown: the demo beats the mean pose, and real people are learnt. Minutes each."""

from __future__ import annotations

import json
import time

import pytest

from tests.engine.recipes import run_cli
from tests.shared_data import shared_data


def test_demo_beats_the_mean_pose_on_held_out_clips(tmp_path):
    out = tmp_path / "demo"
    started = time.monotonic()
    done = run_cli("demo", "--output", str(out), threads=2, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((out / "metrics.json").read_text())
    ap, mean = (metrics[k]["columns"]["Mean"] for k in ("ap", "mean_pose_ap"))
    assert ap >= 2 * mean
    assert ap >= mean + 15
    assert metrics["box_source"] == "ground truth"
    assert metrics["seconds"] <= time.monotonic() - started
    assert metrics["clips_per_second"] > 0
    assert f"held-out AP {ap:.1f}, always answering the mean pose {mean:.1f}" in done.stdout
    # Each joint's causal token lies at the joint far more often than by chance (1 in 5).
    assert metrics["causal_hit_rate"] > 0.4
    assert len(list((out / "predict" / "explain").glob("*.png"))) >= 3
    assert list((out / "predict").glob("*.mp4"))
    for page in (out / "train" / "report.html", out / "predict" / "report.html"):
        assert str(page) in done.stdout
        assert page.stat().st_size < 10_000_000
        assert 'id="explorer"' in page.read_text(encoding="utf-8")
    again = run_cli("demo", "--output", str(out), threads=2, timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    repeated = json.loads((out / "metrics.json").read_text())
    assert repeated["ap"] == metrics["ap"], "a second run keeps what is there"


@pytest.mark.shared_data
def test_real_people_are_learnt_by_heart(tmp_path):
    run = tmp_path / "run"
    root = ["--data.root", str(shared_data("posetrack18"))]
    recipe = ["--config", "configs/posetrack18_sample.yaml", *root]
    done = run_cli("train", *recipe, "--output", str(run), threads=2, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["clips"] == 14
    assert metrics["box_source"] == "ground truth"
    assert metrics["ap"]["columns"]["Mean"] >= 90

    detected = tmp_path / "detected"
    boxes = ["--data.boxes", "annotations/val_detections.json", "--output", str(detected)]
    done = run_cli("evaluate", "--checkpoint", str(run), *recipe, *boxes, threads=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "boxes: val_detections.json" in done.stdout
    metrics = json.loads((detected / "metrics.json").read_text())
    assert metrics["box_source"] == "val_detections.json"
    assert metrics["clips"] == 186

    video = shared_data("video", "two_people.mp4")
    out = tmp_path / "predicted"
    done = run_cli(
        "predict", str(video), "--checkpoint", str(run), "--out", str(out), "--explain", threads=2
    )
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["frames"] == 72
    assert metrics["people"] >= 60
    assert (out / "poses" / "two_people.json").is_file()
    assert (out / "two_people_poses.mp4").is_file()
    assert len(metrics["explained"]) >= 3
