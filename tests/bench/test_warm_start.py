"""bench.learning.warm_start: what is trained is a ViTPose, and CM-Pose starts as it."""

from __future__ import annotations

import torch

from bench.learning import warm_start
from cmpose.models.cmpose import CMPose
from cmpose.models.weights.pretrained import load_pretrained
from tests.recipes import FINE, recipe


def test_cm_pose_starts_as_the_vitpose_that_was_trained(rendered, tmp_path):
    size = {"model.image_size": [64, 64], "model.stem": "patch", "train.epochs": 1}
    config = recipe(rendered, **size | warm_start.VITPOSE)
    file, state = warm_start.train_vitpose(config, tmp_path)
    assert state.step > 0
    whole = recipe(rendered, **size | FINE, **{"model.identity_start": True}).model
    clips = torch.randn(2, whole.num_frames, 3, 64, 64)
    with torch.no_grad():
        model = CMPose(whole).eval()
        fresh = model(clips).heatmaps
        load_pretrained(model, file)
        expected = state.model.eval()(clips[:, whole.num_frames // 2, None]).heatmaps
        torch.testing.assert_close(model(clips).heatmaps, expected, atol=1e-5, rtol=0)
        again = warm_start.train_vitpose(config, tmp_path)[1].model.eval()
        actual = again(clips[:, whole.num_frames // 2, None]).heatmaps
        torch.testing.assert_close(actual, expected, atol=1e-6, rtol=0)
    assert (fresh - expected).abs().max() > 1e-3


def test_the_table_has_every_start_by_steps():
    aps = {"people": {"warm": {0: 40.0, 8: 51.26}, "scratch": {0: 0.0, 8: 9.0}}}
    text = warm_start.result_table({"people": 40.04}, aps)
    assert text.startswith("| AP on people | before training | after 8 steps |\n")
    assert "| warm | 40.0 | 51.3 |\n| scratch | 0.0 | 9.0 |\n| ViTPose itself | 40.0 |" in text
