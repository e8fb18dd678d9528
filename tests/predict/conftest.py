"""A model and a clip that prediction is tried on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import pytest
import torch

from cmpose.config import Config
from cmpose.data.pictures import read_picture
from cmpose.models.weights import checkpoint
from tests.models.builders import build


def saved_model(folder: Path, **fields: Any) -> Path:
    """A checkpoint of 15 keypoints in ``folder``, with random weights, that computes in float32."""
    model = build(num_keypoints=15, **fields)
    with torch.no_grad():  # the scores of an untrained head are all 0 when they are written
        for weight in model.head.parameters():
            weight *= 10
    config = Config(model=model.config)
    config.train.precision = "fp32"
    checkpoint.save(folder, "model", model.state_dict(), config)
    return folder


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A checkpoint with all parts and random weights: nothing here depends on what is learnt."""
    small = {"image_size": (64, 64), "tokens_per_keypoint": 1, "num_clusters": 1, "neighbors": 1}
    return saved_model(tmp_path_factory.mktemp("weights"), **small)


@pytest.fixture(scope="session")
def clip(rendered, tmp_path_factory):
    """The held-out rendered sequence as a video, and its true boxes as detections."""
    [annotation] = (rendered / "annotations" / "val").glob("*.json")
    truth = json.loads(annotation.read_text())
    folder = tmp_path_factory.mktemp("clip")
    video = folder / f"{annotation.stem}.mp4"
    writer = cv2.VideoWriter(str(video), cv2.VideoWriter.fourcc(*"mp4v"), 10, (256, 144))
    for image in truth["images"]:
        writer.write(read_picture(rendered / image["file_name"]))
    writer.release()
    index = {image["id"]: i for i, image in enumerate(truth["images"])}
    boxes = [
        {"frame": index[a["image_id"]], "bbox": a["bbox"], "track_id": a["track_id"]}
        for a in truth["annotations"]
    ]
    detections = folder / "boxes.json"
    detections.write_text(json.dumps(boxes))
    return video, detections, len(truth["images"]), len(boxes)
