"""The command line as a user types it."""

from __future__ import annotations

import ast
import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
from importlib import metadata

import pytest
import torch

from cmpose import doctor, files, native
from cmpose.cli import main
from cmpose.ops.backends import OPS
from tests.recipes import recipe, run_cli, write_recipe
from tests.shared_data import PROJECT, shared_data


def test_a_deleted_current_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit, match=r"the folder that this shell is in was deleted; change t"):
        main(["train", "--output", "run"])


def test_render_train_evaluate_score(tmp_path, capsys):
    data, run = tmp_path / "data", tmp_path / "run"
    for split, videos in (("train", "2"), ("val", "1")):
        main(
            ["render", str(data), "--videos", videos, "--frames", "3", "--seed", "5"]
            + ["--split", split, "--workers", "1"]
        )
    file = str(write_recipe(tmp_path / "r.yaml", recipe(data)))
    main(["train", "--config", file, "--output", str(run), "--train.epochs", "1"])
    assert json.loads((run / "config.json").read_text())["train"]["epochs"] == 1
    assert "%|" not in capsys.readouterr().err  # bars are for a terminal, not for a log

    main(["evaluate", "--checkpoint", str(run), "--output", str(tmp_path / "again")])
    assert "boxes: ground truth" in capsys.readouterr().out
    first = json.loads((run / "metrics.json").read_text())
    again = json.loads((tmp_path / "again" / "metrics.json").read_text())
    assert again["ap"] == first["ap"]

    truth, predicted = str(data / "annotations" / "val"), str(tmp_path / "again" / "predictions")
    main(["score", truth, predicted, "--json", str(tmp_path / "score.json")])
    assert json.loads((tmp_path / "score.json").read_text()) == first["ap"]


def test_every_bar_is_quiet_in_a_redirected_log():
    """tqdm looks at its output where it is asked to by None."""
    calls = [
        {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}["disable"]
        for file in (PROJECT / "cmpose").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tqdm"
    ]
    assert len(calls) >= 8
    assert all(call.startswith("None if ") for call in calls)


def test_wrong_usage_exits_with_2(tmp_path, capsys):
    for arguments in (
        ["dance"],
        ["train", "--output", "x", "--model.backbone", "vast"],
        ["train", "--output", "x", "--model.backbon", "tiny"],
        ["train", "--config", str(tmp_path / "none.yaml"), "--output", "x"],
        ["predict"],
    ):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2, arguments
    assert "backbon" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        "evaluate --checkpoint x --model.depth 3",
        "evaluate --checkpoint x --train.lr 3",
        "evaluate --checkpoint x --data.train_annotations x",
        "evaluate --checkpoint x --data.augment.flip 0",
        "cache --train.epochs 3",
        "cache --model.depth 3",
        "cache --data.flip_test true",
        "ablate x --train.seed 3",
        "predict x --checkpoint x --out y --model.depth 3",
        "export x --out y --data.udp true",
        "report x --train.lr 3",
    ],
)
def test_options_that_cannot_act_are_unknown(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments.split())
    assert stopped.value.code == 2
    assert ": no such option" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --output x --processes 2", "--processes 2: is for --dry-run; several cards train"),
        ("train --output x --card rtx-4090", "--card rtx-4090: is for --dry-run; training takes"),
        ("cache --verify --overwrite", "--verify and --overwrite: give one of them"),
        ("export x --out y --batch 3", "--batch 3: is for FILE.pt2 and FILE.onnx, not for the fol"),
        ("export x --out y.pt2 --opset 18", "--opset 18: is for FILE.onnx, not for y.pt2"),
    ],
)
def test_options_that_cannot_act_together_are_refused(arguments, message):
    with pytest.raises(SystemExit, match=re.escape(message)):
        main(arguments.split())


def test_the_help_of_evaluate_offers_what_acts_alone(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--help"])
    text = capsys.readouterr().out
    assert "--data.boxes" in text
    assert "--model" not in text
    assert "--train.lr" not in text


def test_a_recipe_of_evaluate_may_hold_all_fields_and_options_change_it(tmp_path, monkeypatch):
    passed = {}
    monkeypatch.setattr(
        "cmpose.evaluation.evaluate.evaluate_checkpoint",
        lambda path, data, train, output: passed.update(data=data, train=train),
    )
    config = recipe(tmp_path, **{"data.box_enlarge": 1.5, "train.batch_size": 3, "model.depth": 1})
    file = str(write_recipe(tmp_path / "r.yaml", config))
    main(["evaluate", "--data.box_enlarge", "1.75", "--checkpoint", "x", "--config", file])
    assert passed["data"].box_enlarge == 1.75
    assert passed["train"] == config.train
    with pytest.raises(SystemExit, match=r"cmpose evaluate: none\.yaml: no such recipe"):
        main(["evaluate", "--checkpoint", "x", "--config", "none.yaml"])


@pytest.mark.parametrize(
    ("arguments", "since_3_14"),
    [
        ("frames {} out", ": no such video"),
        ("score {} {}", " does not exist"),
        ("render {}", ": cannot be written: a name in it is longer than the file system takes; .*"),
        ("report {}", ": no such folder; give the folder of a training run .*"),
    ],
)
def test_a_name_that_is_too_long_is_named(tmp_path, monkeypatch, arguments, since_3_14):
    """From Python 3.14 on ``Path.exists`` says no where it raised before."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(arguments.format(*["x" * 300] * 2).split())
    message = ": a name in it is longer than the file system takes; give a .*"
    message = message if sys.version_info < (3, 14) else since_3_14
    assert re.fullmatch(rf"cmpose \w+: (ground truth: )?x{{300}}\S*{message}", str(end.value.code))


def test_a_recipe_that_cannot_be_is_named(tmp_path, capsys):
    path = tmp_path / "r.yaml"
    for content, message in (
        (
            b"train: {}\nmodel: {depth: x}",
            ", line 2: bad configuration: model.depth x: expected a w",
        ),
        (b"\xff", " is not YAML"),
        ("model: {}".encode("utf-16"), " is not YAML"),
    ):
        path.write_bytes(content)
        for option in (["--config", str(path)], [f"--config={path}"]):
            with pytest.raises(SystemExit) as stopped:
                main(["train", *option, "--dry-run"])
            assert stopped.value.code == 2
            assert f"cmpose train: {path}{message}" in capsys.readouterr().err


class Failing(io.StringIO):
    """An output that takes so many letters, and then fails when it is flushed or is full."""

    def __init__(self, number, room=1 << 30):
        super().__init__()
        self.number, self.room = number, room

    def write(self, text):
        if len(text) > self.room:
            self.flush()
        self.room -= len(text)
        return super().write(text)

    def flush(self):
        raise OSError(self.number, os.strerror(self.number))

    def fileno(self):
        raise io.UnsupportedOperation


@pytest.mark.parametrize("room", [1 << 30, 40])
@pytest.mark.parametrize("arguments", [["doctor"], ["score", "--help"], ["--version"]])
def test_an_output_that_cannot_be_written_is_named(monkeypatch, arguments, room):
    monkeypatch.setattr(sys, "stdout", Failing(errno.ENOSPC, room))
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert re.fullmatch(
        "cmpose( doctor)?: standard output: cannot be written: the disk is full; free some space, "
        "or send it elsewhere",
        str(ended.value),
    )
    monkeypatch.setattr(sys, "stdout", Failing(errno.EPIPE, room))
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 128 + signal.SIGPIPE


def test_a_failure_of_the_output_is_not_taken_for_one_of_a_file(tmp_path):
    printed = files.Printed(Failing(errno.ENOSPC))
    with (
        pytest.raises(files.OutputError, match=r"^standard output: cannot be written"),
        files.whole_file(tmp_path / "a"),
    ):
        print("text", file=printed, flush=True)


def test_outputs_that_are_full_or_closed():
    """The process: one line at most is said, also when Python ends."""
    for output, status, message in (
        (">/dev/full", 1, "cmpose: standard output: cannot be written: the disk is full; "),
        (">&-", 0, "cmpose 0."),  # argparse turns to the other output
    ):
        command = f"{sys.executable} -m cmpose --version {output}"
        done = subprocess.run(command, shell=True, capture_output=True, text=True)
        assert done.returncode == status
        assert done.stderr.startswith(message)
        assert done.stderr.count("\n") == 1


def test_an_explained_failure_has_no_traceback(tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"cmpose score: ground truth: .* does not exist"):
        main(["score", str(tmp_path / "none"), str(tmp_path)])
    with pytest.raises(SystemExit, match="cmpose evaluate: no checkpoint at"):
        main(["evaluate", "--checkpoint", str(tmp_path)])
    monkeypatch.setenv("CMPOSE_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        main(["score", str(tmp_path / "none"), str(tmp_path)])


def test_doctor_tells_every_op(monkeypatch):
    """What runs, and each reason why something else does not, once."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("CMPOSE_DPC_KNN_BACKEND", "reference")
    done = run_cli("doctor")
    assert done.returncode == 0, done.stderr
    for op in OPS:
        assert f"\n{op} " in done.stdout
    assert done.stdout.count("it has no cuda kernel in this version") == 1
    assert "CMPOSE_DPC_KNN_BACKEND=reference is set" in done.stdout
    if not torch.cuda.is_available():
        assert "on the CPU; Triton kernels need CUDA tensors" in done.stdout
        runs = re.findall(r"^\w+ +(?:reference +no \[\d\]|cpu +yes) +no \[\d\]", done.stdout, re.M)
        assert len(runs) == len(OPS)


@pytest.mark.parametrize(
    ("facts", "line"),
    [
        ({"archs": "8.9", "ptx": ""}, "for 8.9, built with nvcc 13.0"),
        ({"archs": "8.9;9.0", "ptx": "9.0"}, "for 8.9;9.0 + PTX 9.0, built with nvcc 13.0"),
        ({"on_cpu": True}, "compiled for the CPU, for tests (CMPOSE_CUDA_ON_CPU)"),
    ],
)
def test_doctor_describes_the_core(monkeypatch, facts, line):
    monkeypatch.setattr(native, "unavailable", lambda: None)
    monkeypatch.setattr(native, "info", lambda: {"nvcc": "13.0", "on_cpu": False} | facts)
    assert doctor._core() == line
    monkeypatch.setattr(native, "unavailable", lambda: "cmpose._C is not built: …")
    assert doctor._core() == "cmpose._C is not built: …"


def test_doctor_as_json(capsys):
    main(["doctor", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"] == metadata.version("torch")  # as pip lists it
    assert facts["torch_cuda"] == torch.version.cuda
    assert set(facts["ops"]) == set(OPS)
    assert set(facts["ops"]["dpc_knn"]["backends"]) == {"reference", "cpu", "triton", "cuda"}
    assert facts["next"]
    assert set(facts["known_bad"]) <= set(facts["next"])


CARD = {"name": "RTX", "capability": "8.9", "memory_gb": 24.0, "core_unavailable": None}
MACHINE = {
    "packages": {"torch": "2.13.0", "triton": "3.7.1", "numpy": "2.4.0"},
    "driver": "13.0",
    "torch_cuda": "13.0",
    "nvcc": "/usr/local/cuda/bin/nvcc",
    "cards": [CARD],
}


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({}, None),
        (
            {"cards": [], "driver": None},
            "There is no NVIDIA driver, so that the ops run",
        ),
        ({"cards": [], "torch_cuda": None}, "torch 2.13.0 was built without CUDA, and there is a"),
        (
            {"cards": [], "driver": "12.4"},
            "NVIDIA's driver serves CUDA 12.4, torch was built for 13.0: install a newer driver, "
            "or install torch built for CUDA 12.4 or older",
        ),
        ({"cards": []}, "see whether nvidia-smi lists one, and CUDA_VISIBLE_DEVICES"),
        (
            {"packages": MACHINE["packages"] | {"triton": None}},
            "triton is not installed: pip install 'triton>=3.5'",
        ),
        ({"packages": MACHINE["packages"] | {"triton": "3.6.0"}}, "pip install 'triton>=3.7' or"),
        (
            {"torch_asks_for_triton": "3.6.0"},
            "torch 2.13.0 was made for triton 3.6.0, and torch.compile may fail with the 3.7.1",
        ),
        ({"torch_asks_for_triton": "3.7.1"}, None),
        (
            {
                "cards": [CARD | {"name": "B200", "capability": "10.0"}] * 2,
                "packages": MACHINE["packages"] | {"triton": "3.6.0", "numpy": "2.3.5"},
            },
            "triton 3.6.0 computes wrong products on B200 (compute capability 10.0",
        ),
        ({"cards": [CARD | {"core_unavailable": "it is old"}]}, "cuda does not run: it is old."),
        (
            {"cards": [CARD | {"core_unavailable": "it is not built"}] * 2, "nvcc": None},
            "it is not built. There is no nvcc either: install NVIDIA's CUDA toolkit 13.0",
        ),
    ],
)
def test_doctor_says_what_to_do_next(changes, step):
    steps = doctor.next_steps(MACHINE | changes)
    assert len(steps) == (step is not None)
    assert step is None or step in steps[0]


@pytest.mark.shared_data
@pytest.mark.parametrize(
    "case", ["basic", "multi", "ignore", "dropped_joints", "ankles_absent_gt_only"]
)
def test_score_writes_what_the_official_evaluator_found(case, tmp_path):
    folder = shared_data("posetrack_ap", case)
    main(["score", str(folder / "gt"), str(folder / "pred"), "--json", str(tmp_path / "s.json")])
    actual = json.loads((tmp_path / "s.json").read_text())
    expected = json.loads((folder / "expected.json").read_text())
    assert list(actual) == ["columns", "joints", "ap"]
    assert actual["joints"] == expected["joints"][:15]
    assert actual["ap"] == [pytest.approx(v, abs=1e-9) for v in expected["ap"][:15]]
    assert actual["columns"] == {
        k: pytest.approx(v, abs=1e-9) for k, v in expected["columns"].items()
    }
