"""A model's answer to a batch of clips."""

from __future__ import annotations

import pytest
import torch

from cmpose.config import DataConfig
from cmpose.evaluation.inference import predict_heatmaps
from cmpose.models.weights.folder import CheckpointError
from tests.models.builders import build


@pytest.mark.parametrize("fine", ["off", "full"])
@pytest.mark.parametrize("flip_test", [False, True])
def test_weights_that_are_too_large_are_named(fine, flip_test):
    """They are finite; what an op or the last layer makes of them is not."""
    model = build(fine=fine).eval()
    model.source = "run/model/model.safetensors"
    height, width = model.config.image_size
    clips = torch.zeros(1, model.config.num_frames, 3, height, width)
    data = DataConfig(flip_test=flip_test)
    assert predict_heatmaps(model, clips, data).heatmaps.isfinite().all()
    with torch.no_grad():
        for weight in model.parameters():
            weight.fill_(3e38)
    with pytest.raises(CheckpointError, match=r"run/model/model\.safetensors: its weights are num"):
        predict_heatmaps(model, clips, data)
