"""What must be shown: the demo beats the mean pose on held-out clips. Takes minutes."""

from __future__ import annotations

import json
import time

from cmpose import demo as module
from tests.recipes import FINE, recipe, run_cli, write_recipe


def test_demo_beats_the_mean_pose_on_held_out_clips(tmp_path):
    out = tmp_path / "demo"
    started = time.monotonic()
    done = run_cli("demo", "--output", str(out), timeout=900)
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
