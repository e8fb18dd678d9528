"""Commands whose input is damaged: they do it, or end with one message that names the file.

They change nothing outside their output.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import cv2
import pytest
from hypothesis import note
from hypothesis import strategies as st

from cmpose import cli
from tests.convert.test_convert import coco, pictures
from tests.data import synthetic
from tests.fuzz.damage import changed_bytes, changed_text, damaged
from tests.recipes import FINE, recipe, write_recipe


class Case(NamedTuple):
    """A command and the one of its inputs that is damaged.

    Attributes:
        command: with ``{in}`` and ``{out}`` for the folders.
        file: in ``{in}``.
        tries: in ``make test``.
    """

    command: str
    file: str
    tries: int = 3


CONVERT = "convert {in}/labels.json {out} --images {in}/pictures"
PREDICT = "predict {in}/pictures/walk --checkpoint {in}/run/model --out {out}"
PREDICT += " --detections {in}/boxes.json"
SCORE = "score {in}/data/annotations/val {in}/run/predictions --json {out}/score.json"
EVALUATE = "evaluate --checkpoint {in}/run --output {out}"
CASES = {
    "convert, labels": Case(CONVERT, "labels.json", 10),
    "convert, a picture": Case(CONVERT, "pictures/walk/0001.jpg", 5),
    "convert, boxes": Case(CONVERT + " --boxes {in}/convert_boxes.json", "convert_boxes.json", 5),
    "convert, skipping": Case(CONVERT + " --on_error skip", "labels.json", 5),
    "convert, a table": Case(
        "convert {in}/labels.csv {out} --images {in}/pictures --skeleton {in}/skeleton.json",
        "labels.csv",
        5,
    ),
    "convert, a skeleton": Case(CONVERT + " --skeleton {in}/skeleton.json", "skeleton.json", 5),
    "score, ground truth": Case(SCORE, "data/annotations/val/{val}.json", 5),
    "score, predictions": Case(SCORE, "run/predictions/{val}.json", 5),
    "predict, boxes": Case(PREDICT, "boxes.json"),
    "predict, a picture": Case(PREDICT, "pictures/walk/0001.jpg"),
    "predict, a picture, skipping": Case(PREDICT + " --on_error skip", "pictures/walk/0001.jpg"),
    "predict, a video": Case(PREDICT.replace("pictures/walk", "video.avi"), "video.avi"),
    "predict, recipe": Case(PREDICT, "run/model/config.json"),
    "predict, weights": Case(PREDICT, "run/model/model.safetensors"),
    "frames": Case("frames {in}/video.avi {out}", "video.avi"),
    "evaluate, recipe": Case(EVALUATE, "run/model/config.json", 2),
    "evaluate, annotations": Case(EVALUATE, "data/annotations/val/{val}.json", 2),
    "evaluate, a picture": Case(EVALUATE, "data/images/val/{val}/000001.jpg", 2),
    "report, metrics": Case("report {in}/run --out {out}/a.html --clips 1", "run/metrics.json", 2),
    "report, log": Case("report {in}/run --out {out}/a.html --clips 1", "run/log.jsonl", 2),
    "export": Case("export {in}/run --out {out}/model", "run/model/config.json", 2),
    "cache": Case(
        "cache --config {in}/recipe.yaml --data.cache {out} --split val",
        "data/annotations/val/{val}.json",
        2,
    ),
    "train, a recipe": Case("train --config {in}/recipe.yaml --dry-run", "recipe.yaml", 2),
}


def run(command: str) -> tuple[int, str]:
    """Exit status of a command in this process, and its error message.

    An exception that the command line would show as a traceback comes through.
    """
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            cli.main(command.split())
        except SystemExit as end:
            return (
                (1, end.code) if isinstance(end.code, str) else (end.code or 0, output.getvalue())
            )
    return 0, ""


@pytest.fixture(scope="module")
def inputs(rendered, tmp_path_factory) -> Path:
    """What the commands read, all of it good."""
    root = tmp_path_factory.mktemp("inputs")
    shutil.copytree(rendered, root / "data")
    names = [f"walk/{n:04d}.jpg" for n in range(3)]
    pictures(root / "pictures", names)
    synthetic.write_json(root / "labels.json", coco(names))
    boxes = [{"frame": i, "bbox": [20, 20, 30, 25], "score": 1.0} for i in range(3)]
    synthetic.write_json(root / "boxes.json", boxes)
    boxes = [{"image_name": name, "bbox": [5, 6, 30, 40], "score": 0.9} for name in names]
    synthetic.write_json(root / "convert_boxes.json", boxes)
    names_of_keypoints = ["head", "left_paw", "right_paw"]
    synthetic.write_json(root / "skeleton.json", {"keypoints": names_of_keypoints})
    with open(root / "labels.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "track", "keypoint", "x", "y", "visible"])
        table.writerows(
            [n, 0, k, 20 + i, 20, 2] for n in names for i, k in enumerate(names_of_keypoints)
        )
    writer = cv2.VideoWriter(str(root / "video.avi"), cv2.VideoWriter.fourcc(*"MJPG"), 25, (64, 48))
    for name in names:
        writer.write(cv2.imread(str(root / "pictures" / name)))
    writer.release()
    fields = {"train.epochs": 1, "train.checkpoint_every": 1} | FINE
    write_recipe(root / "recipe.yaml", recipe(root / "data", **fields))
    status, output = run(f"train --config {root}/recipe.yaml --output {root}/run")
    assert status == 0, output
    return root


def state(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file in a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in files}


def damage(path: Path) -> st.SearchStrategy[bytes]:
    """Inputs like the file, by its kind."""
    data = path.read_bytes()
    if path.suffix == ".json":
        return damaged(json.loads(data))
    if path.suffix == ".jsonl":
        return damaged([*map(json.loads, data.splitlines())], lines=True)
    return (changed_text if path.suffix in (".csv", ".yaml") else changed_bytes)(data)


def check(command: str, path: Path, data: bytes, folder: Path) -> None:
    """The command does it, or ends with one message that names the file; no other file changes."""
    note(repr(data[:5000]))
    path.write_bytes(data)
    before = state(folder)
    status, message = run(command.format(**{"in": folder / "in", "out": folder / "out"}))
    shutil.rmtree(folder / "out", ignore_errors=True)
    assert state(folder) == before, "a file outside the output was changed"
    assert status in (0, 1, 2), message
    if status == 2:  # wrong usage, which a recipe can be as well
        assert path.suffix == ".yaml", message
        message = message[message.rindex("cmpose train: ") :]
    if status:  # --skeleton names skeleton.json, too
        named = path.name in message or f"--{path.stem}" in message
        # A video that lost frames contradicts its boxes, and either may be the damaged one.
        lost = path.name == "video.avi" and "boxes.json: " in message and "the video" in message
        assert named or lost, message
        assert len(message) < 2000, message


@pytest.mark.parametrize("name", CASES)
def test_damaged_input_of_a_command(name, inputs, hunt, tmp_path, monkeypatch):
    command, file, tries = CASES[name]
    val = next((inputs / "data/annotations/val").iterdir()).stem
    shutil.copytree(inputs, tmp_path / "in", symlinks=True)
    recipe = tmp_path / "in/recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(inputs), str(tmp_path / "in")))
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "in" / file.format(val=val)
    hunt(lambda data: check(command, path, data, tmp_path), damage(path), tries, shrink=False)
