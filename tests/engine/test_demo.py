"""What must be shown: the demo beats the mean pose on held-out clips. Takes minutes."""

from __future__ import annotations

import json
import time

from tests.engine.recipes import run_cli


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
    again = run_cli("demo", "--output", str(out), timeout=300)
    assert again.returncode == 0, again.stderr[-3000:]
    repeated = json.loads((out / "metrics.json").read_text())
    assert repeated["ap"] == metrics["ap"], "a second run keeps what is there"
