"""Every command that writes: killed at its renames, on a full disk, beside a second one."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import time
from pathlib import Path
from typing import NamedTuple

import cv2
import pytest

from cmpose import files
from tests.convert.test_convert import coco, pictures
from tests.data import synthetic
from tests.fuzz.conftest import FACTOR
from tests.recipes import FINE, recipe, write_recipe
from tests.small_disk import MEGABYTES, small_disk
from tests.zygote import KILLED

COMMANDS = {
    "init": "init --data a {out}",
    "train": "train --config {in}/recipe.yaml --output {out}",
    "cache": "cache --config {in}/recipe.yaml --data.cache {out} --split both"
    " --data.cache_format jpeg",
    "evaluate": "evaluate --checkpoint {in}/run --output {out}",
    "predict": "predict {in}/video.mp4 --checkpoint {in}/run --out {out} --explain"
    " --explain_frames [1] --detections {in}/boxes.json",
    "export": "export {in}/run --out {out}",
    "render": "render {out} --videos 2 --frames 2 --size [96,128] --workers 2",
    "convert": "convert {in}/labels.json {out} --images {in}/pictures",
    "frames": "frames {in}/video.mp4 {out}",
    "score": "score {in}/data/annotations/val {in}/run/predictions --json {out}.json",
    "report": "report {in}/run --out {out}.html --clips 1",
    "ablate": "ablate {out} --config {in}/recipe.yaml --parts [table5] --seeds 1",
}
"""Each writes what its last word, or ``--out``, ``--output``, ``--json``, names."""

FILES = {
    "export to .pt2": "export {in}/run --out {out}.pt2",
    "export to .onnx": "export {in}/run --out {out}.onnx",
}
"""Commands that take long for the one or two renames that they do: killed, no more."""

GOES_ON = {"train": " --resume"}
"""What is added to go on after a kill or a failure; the others are just called again."""

CHANGING = "|".join(  # by times of day, seconds taken, and containers of TensorBoard and torch
    (
        r"metrics\.json|log\.jsonl|events\.out.*|state\.pt|README\.md",  # of a run
        r"out\.html|frames\.json|.*finished\.json|settings\.json|summary\.json",
        r"runs/.*|pieces\.jsonl|output\.txt|report/.*",  # of a study
    )
)


@pytest.fixture(scope="module")
def inputs(zygote, rendered, tmp_path_factory) -> Path:
    """What commands read: a data set, a trained run, a video with boxes, labels, a recipe."""
    root = tmp_path_factory.mktemp("inputs")
    shutil.copytree(rendered, root / "data")
    fields = {"train.epochs": 1, "train.batch_size": 8, "train.checkpoint_every": 1} | FINE
    write_recipe(root / "recipe.yaml", recipe(root / "data", **fields))
    frames = [cv2.imread(str(f)) for f in sorted((root / "data/images/val").rglob("*.jpg"))]
    code, size = cv2.VideoWriter.fourcc(*"mp4v"), frames[0].shape[1::-1]
    writer = cv2.VideoWriter(str(root / "video.mp4"), code, 25, size)
    for frame in frames:
        writer.write(frame)
    writer.release()
    boxes = [{"frame": i, "bbox": [20, 20, 60, 90], "score": 1.0} for i in range(len(frames))]
    synthetic.write_json(root / "boxes.json", boxes)
    names = [f"walk/{n:04d}.jpg" for n in range(3)]
    pictures(root / "pictures", names)
    synthetic.write_json(root / "labels.json", coco(names))
    done = zygote.run("train", "--config", root / "recipe.yaml", "--output", root / "run")
    assert done.status == 0, done.output
    return root


def arguments(name: str, inputs: Path, out: Path) -> list[str]:
    return (COMMANDS | FILES)[name].format(**{"in": inputs, "out": out}).split()


def contents(folder: Path) -> dict[str, bytes]:
    """Files below a folder by name; those that differ from run to run count by name only."""
    everything = (path for path in folder.rglob("*") if path.is_file())
    return {
        name: b"" if re.search(rf"(^|/)({CHANGING})$", name) else path.read_bytes()
        for path in everything
        if (name := re.sub(r"events\.out.*", "events.out", str(path.relative_to(folder))))
    }


class Undisturbed(NamedTuple):
    """The files that a command writes, renames that it takes, bytes of the files, its time."""

    files: dict[str, bytes]
    renames: int
    size: int
    seconds: float


@pytest.fixture(scope="module")
def undisturbed(zygote, inputs, tmp_path_factory):
    """What a command does when nothing happens to it."""
    done: dict[str, Undisturbed] = {}

    def of(name: str) -> Undisturbed:
        if name not in done:
            folder = tmp_path_factory.mktemp("undisturbed")
            started = time.monotonic()
            ended = zygote.run(*arguments(name, inputs, folder / "out"))
            seconds = time.monotonic() - started
            assert ended.status == 0, ended.output
            size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
            done[name] = Undisturbed(contents(folder), ended.renames, size, seconds)
        return done[name]

    return of


def assert_whole(folder: Path, expected: dict[str, bytes]) -> None:
    """Whatever has its final name is as an undisturbed command writes it."""
    for name, content in contents(folder).items():
        path = folder / name
        hidden = any(part.startswith(".") for part in Path(name).parts)
        # A conversion's report lists what is being written first, and what was written last.
        grows = name.endswith((".jsonl", ".bin", "_report.json")) or ".part." in name
        if content and not hidden and not grows:
            assert content == expected.get(name, content), f"{name} is not whole"
        if path.suffix == ".json" and not hidden:
            json.loads(path.read_text())


def assert_done(folder: Path, expected: dict[str, bytes]) -> None:
    """Everything is there, and nothing that was left by the way."""
    actual = contents(folder)
    assert sorted(actual) == sorted(expected)
    assert [name for name in actual if actual[name] != expected[name]] == []


@pytest.mark.parametrize("name", COMMANDS)
def test_a_kill_at_every_rename_is_recovered_from(name, zygote, inputs, undisturbed, tmp_path):
    expected, renames, *_ = undisturbed(name)
    assert renames > 0, "nothing was renamed: the command does not write by files.py"
    # A study's runs are trainings, which are killed at every rename above.
    numbers = (0, renames - 1) if name == "ablate" else range(renames)
    for number in numbers:
        folder = tmp_path / str(number)
        folder.mkdir()
        command = arguments(name, inputs, folder / "out")
        killed = zygote.run(*command, kill_at=number)
        assert killed.status == KILLED, f"rename {number}: {killed.output}"
        assert_whole(folder, expected)
        again = zygote.run(*command, *GOES_ON.get(name, "").split())
        assert again.status == 0, f"after a kill at rename {number}: {again.output}"
        assert_done(folder, expected)
        shutil.rmtree(folder)


KILLS = 20 if FACTOR > 1 else 1
OFTEN = ("cache", "convert", "frames", "render", "score")
"""Commands that are quick enough to be killed at a random moment in every run of the tests."""


had_ended = re.compile("already has annotations: give|is there already: move").search
"""What commands that replace nothing say where a killed one had done all but free its lock."""


@pytest.mark.parametrize("name", (COMMANDS | FILES) if FACTOR > 1 else OFTEN)
def test_a_kill_at_a_random_moment_is_recovered_from(name, zygote, inputs, undisturbed, tmp_path):
    """``make fuzz`` kills every command 20 times. It may be killed several times in a row."""
    expected, *_, seconds = undisturbed(name)
    chance, killed, folder = random.Random(None if FACTOR > 1 else name), 0, tmp_path / "outputs"
    folder.mkdir()
    command, goes_on = arguments(name, inputs, folder / "out"), GOES_ON.get(name, "").split()
    for tries in range(5 * KILLS):
        moment = chance.uniform(0, seconds)
        ended = zygote.run(*command, *(goes_on if tries else []), kill_after=moment)
        cut = ended.status == KILLED
        assert cut or ended.status == 0 or had_ended(ended.output), ended.output
        killed += cut
        assert_whole(folder, expected)
        if not cut or chance.random() < 0.5 or killed == KILLS:
            again = zygote.run(*command, *goes_on) if cut else ended
            if had_ended(again.output):
                for lock in folder.rglob(f".*{files._LOCK}"):
                    lock.unlink()
            else:
                assert again.status == 0, f"after a kill at {moment:.3f} s: {again.output}"
            assert_done(folder, expected)
            shutil.rmtree(folder)
            folder.mkdir()
        if killed == KILLS:
            return
    raise AssertionError(f"only {killed} of {tries + 1} were killed before they ended")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_named_and_gone_on_from(name, zygote, inputs, undisturbed, tmp_path):
    expected, _, size, _ = undisturbed(name)
    with small_disk(tmp_path) as disk:
        room = min(size // 2, MEGABYTES << 19) & ~4095
        (disk / "filler").write_bytes(bytes((MEGABYTES << 20) - room))
        failed = zygote.run(*arguments(name, inputs, disk / "out"))
        assert failed.status == 1, failed.output
        assert "cannot be written: the disk is full; free some space" in failed.output
        assert "Traceback" not in failed.output
        (disk / "filler").unlink()
        assert_whole(disk, expected)
        shutil.copytree(disk, tmp_path / "larger")  # the whole does not fit onto every small disk
    command = arguments(name, inputs, tmp_path / "larger/out")
    again = zygote.run(*command, *GOES_ON.get(name, "").split())
    assert again.status == 0, again.output
    assert_done(tmp_path / "larger", expected)


@pytest.mark.parametrize("name", COMMANDS)
def test_of_two_started_together_one_is_refused(name, zygote, inputs, undisturbed, tmp_path):
    expected, *_ = undisturbed(name)
    (tmp_path / "outputs").mkdir()
    command = arguments(name, inputs, tmp_path / "outputs/out")
    first, second = zygote.run_two(*command, hold=tmp_path / "hold")
    assert second.status == 1, second.output
    assert f"another cmpose {command[0]} is writing there" in second.output
    assert first.status == 0, first.output
    assert_done(tmp_path / "outputs", expected)


def test_demo_holds_its_folder(zygote, tmp_path):
    with files.claim(tmp_path, "demo", "--output"):
        refused = zygote.run("demo", "--output", tmp_path)
    assert refused.status == 1
    assert "another cmpose demo is writing there" in refused.output
    assert os.listdir(tmp_path) == []
