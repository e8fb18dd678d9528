"""What must be shown: the demo beats the mean pose on held-out clips. Takes minutes."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from cmpose import demo as module
from tests.fuzz.conftest import FACTOR
from tests.recipes import FINE, recipe, run_cli, write_recipe
from tests.shared_data import PROJECT


def assert_complete(out: Path, printed: str, least: float, times: float) -> dict[str, Any]:
    """Everything is there, and the AP exceeds the mean pose's by so many points, so many times."""
    metrics = json.loads((out / "metrics.json").read_text())
    ap, mean = (metrics[k]["columns"]["Mean"] for k in ("ap", "mean_pose_ap"))
    assert ap >= times * mean
    assert ap >= mean + least
    assert metrics["box_source"] == "ground truth"
    assert metrics["clips_per_second"] > 0
    assert f"held-out AP {ap:.1f} %, always answering the mean pose {mean:.1f} %" in printed
    assert "holds no checkpoint" not in printed  # as if a first run could have one
    # Each joint's causal token lies at the joint far more often than by chance (1 in 5).
    assert metrics["causal_hit_rate"] > 0.4
    assert len(list((out / "predict" / "explain").glob("*.png"))) >= 3
    for folder in ("predict", "predict_tiny"):
        (video,) = (out / folder).glob("*_poses.mp4")
        assert str(video) in printed
    for page in (out / "train" / "report.html", out / "predict" / "report.html"):
        assert str(page) in printed
        assert page.stat().st_size < 10_000_000
        assert 'id="explorer"' in page.read_text(encoding="utf-8")
    return metrics


def test_a_third_of_the_demo_beats_the_mean_pose_on_held_out_clips(tmp_path, monkeypatch, capsys):
    """The demo's recipe on fewer clips, in as many fewer steps: 38.3 against 21.7."""
    monkeypatch.setattr(module, "TRAIN_VIDEOS", 28)
    monkeypatch.setattr(module, "VAL_VIDEOS", 8)
    started = time.monotonic()
    module.demo(tmp_path / "demo")
    metrics = assert_complete(tmp_path / "demo", capsys.readouterr().out, least=10, times=1.5)
    assert metrics["seconds"] <= time.monotonic() - started


@pytest.mark.skipif(FACTOR == 1, reason="make fuzz runs it")
def test_the_demo_reaches_what_the_readme_says(tmp_path):
    """Up to rounding, which the number of threads and the processor change."""
    out = tmp_path / "demo"
    done = run_cli("demo", "--output", str(out), timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = assert_complete(out, done.stdout, least=15, times=2)
    figures = re.search(
        r"held-out PoseTrack AP of ([\d.]+) .*?mean\s+pose reaches ([\d.]+)",
        (PROJECT / "README.md").read_text(),
        re.DOTALL,
    )
    for key, value in zip(("ap", "mean_pose_ap"), figures.groups(), strict=True):
        assert metrics[key]["columns"]["Mean"] == pytest.approx(float(value), abs=1.0)


def test_a_second_run_keeps_what_is_there(tmp_path, monkeypatch):
    """With less to render and to learn."""
    for name, value in (("TRAIN_VIDEOS", 2), ("VAL_VIDEOS", 1), ("FRAMES", 4)):
        monkeypatch.setattr(module, name, value)
    file = write_recipe(tmp_path / "recipe.yaml", recipe(tmp_path, **FINE))
    first = module.demo(tmp_path / "demo", file)
    pictures = list((tmp_path / "demo" / "data").rglob("*.jpg"))
    assert len(pictures) == 12
    weights = tmp_path / "demo" / "train" / "model" / "model.safetensors"
    before = [path.stat().st_mtime_ns for path in pictures], weights.read_bytes()
    second = module.demo(tmp_path / "demo", file)
    assert ([path.stat().st_mtime_ns for path in pictures], weights.read_bytes()) == before
    for key in ("ap", "mean_pose_ap", "training_seconds"):
        assert second[key] == first[key]
