"""Every line of the README that can be run is run, in a folder that has what it names."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import cv2
import pytest
import torch

from cmpose import __version__
from cmpose.cli import main
from cmpose.data.pictures import read_picture
from cmpose.models.weights import checkpoint
from tests.convert.test_convert import coco, pictures
from tests.recipes import FINE, recipe, write_recipe
from tests.shared_data import PROJECT

README = (PROJECT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
HELD_ELSEWHERE = {
    "make demo": ("tests/test_demo.py", "demo("),
    "make test": ("Makefile", "$(BIN)/python -m pytest"),  # this test runs
    "pip install .": ("tests/test_packaging.py", '"wheel"'),
    "cmpose export runs/b18 --out b18.onnx": (
        "tests/test_outputs.py",
        "export {in}/run --out {out}.onnx",
    ),
}
"""Lines that take long, where they are run, and by what words there."""
SMALLER = {
    "/data/PoseTrack18": "data",
    "/fast/b18": "cache",
    "--videos 64 --frames 30": "--videos 2 --frames 2 --size [96,128] --workers 1",
    "--explain": "--explain --detections boxes.json",
}
"""What is at hand, in place of what a user has."""


def lines(text: str) -> list[str]:
    """The commands of a block, without their comments."""
    joined = text.replace("\\\n", " ")
    return [line for row in joined.splitlines() if (line := row.partition("  #")[0].strip())]


COMMANDS = [line for language, text in BLOCKS if not language for line in lines(text)]


@pytest.fixture(scope="module")
def workspace(rendered, tmp_path_factory) -> Path:
    """A folder with a data set, a recipe, a run, weights, a video with boxes, and labels."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(rendered, folder / "data")
    (folder / "configs").mkdir()
    fields = FINE | {"train.epochs": 1, "train.batch_size": 8}
    config = recipe(folder / "data", **fields)
    write_recipe(folder / "configs" / "posetrack18_vit_base.yaml", config)
    demo = folder / "runs" / "demo" / "train"
    main(
        ["train", "--config", str(folder / "configs" / "posetrack18_vit_base.yaml")]
        + ["--output", str(demo)]
    )
    torch.save(checkpoint.load_weights(demo / "model"), folder / "vitpose-b.pth")
    truth = json.loads(next((folder / "data/annotations/val").glob("*.json")).read_text())
    index = {image["id"]: i for i, image in enumerate(truth["images"])}
    writer = cv2.VideoWriter(
        str(folder / "video.mp4"), cv2.VideoWriter.fourcc(*"mp4v"), 10, (256, 144)
    )
    for image in truth["images"]:
        writer.write(read_picture(folder / "data" / image["file_name"]))
    writer.release()
    shutil.copy(folder / "video.mp4", folder / "walk.mp4")
    people = truth["annotations"]
    boxes = [{"frame": index[p["image_id"]], "bbox": p["bbox"]} for p in people]
    (folder / "boxes.json").write_text(json.dumps(boxes))
    detections = [{"image_id": p["image_id"], "bbox": p["bbox"], "score": 0.9} for p in people]
    detections = [box | {"category_id": 1} for box in detections]
    (folder / "data" / "val_boxes.json").write_text(json.dumps(detections))
    names = [f"walk/{n:04d}.jpg" for n in range(3)]
    pictures(folder / "frames", names)
    (folder / "labels.json").write_text(json.dumps(coco(names)))
    return folder


def test_every_command_runs(workspace, monkeypatch, capsys):
    monkeypatch.chdir(workspace)
    assert len(COMMANDS) > 10
    for line in COMMANDS:
        if line in HELD_ELSEWHERE:
            file, words = HELD_ELSEWHERE[line]
            assert words in (PROJECT / file).read_text(), line
            continue
        for full, small in SMALLER.items():
            line = line.replace(full, small)
        program, *arguments = shlex.split(line)
        assert program == "cmpose", f"no test runs: {line}"
        main(arguments)
    printed = capsys.readouterr().out
    assert "boxes: val_boxes.json" in printed
    assert __version__ in printed
    for written in ("runs/b18/report.html", "poses/video_poses.mp4", "my_data/annotations"):
        assert Path(written).exists(), written


@pytest.mark.parametrize("text", [text for language, text in BLOCKS if language == "python"])
def test_every_python_block_runs(text, workspace, monkeypatch, tmp_path):
    monkeypatch.chdir(workspace)
    names: dict[str, object] = {}
    exec(compile(text, "README.md", "exec"), names)
    if "merged" in names:
        assert tuple(names["merged"].shape) == (8, 32, 768)  # type: ignore[attr-defined]
    if "frame" in names:
        assert names["picture"].shape == (144, 256, 3)  # type: ignore[attr-defined]
        assert (workspace / "out" / "metrics.json").is_file()


def test_there_are_no_other_blocks():
    assert {language for language, _ in BLOCKS} == {"", "python"}
