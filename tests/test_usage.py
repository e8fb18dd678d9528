"""What a wrong command line or recipe is answered with."""

from __future__ import annotations

import re

import pytest

from cmpose import config, help_text, usage
from cmpose.cli import COMMANDS, main

PREDICT = "predict v.mp4 --checkpoint a --out o "


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train --model.backbon tiny", "--model.backbon: no such option; did you mean --model.ba"),
        ("train --train.lr abc", "--train.lr abc: expected a number"),
        ("train --model.image_size [1]", "--model.image_size [1]: expected 2 values"),
        ("train --model 3", "--model: is a group; give --model.FIELD"),
        ("train --model.backbone=huuge", "--model.backbone huuge: expected one of tiny, small, b"),
        ("train --data.udp maybe", "--data.udp maybe: expected true or false"),
        ("export", "give CHECKPOINT and --out"),
        ("predict --checkpoint a --out o", "give VIDEO"),
        ("predict v.mp4 --out", "--out: needs a value"),
        (PREDICT + "--batch_size x", "--batch-size x: expected a whole number"),
        (PREDICT + "--batch-size x", "--batch-size x: expected a whole number"),
        (PREDICT + "--fps x", "--fps x: expected a number"),
        (PREDICT + "--outputs [x]", "--outputs x: expected one of video, poses, coco, csv"),
        (PREDICT + "--explain=3", "--explain 3: takes no value"),
        (PREDICT + "w", "w: one argument too many"),
    ],
)
def test_a_usage_error_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 2
    error = capsys.readouterr().err
    command = arguments.split()[0]
    assert error.startswith(f"cmpose {command}: {message}")
    assert error.endswith(f"(cmpose {command} --help)\n")
    assert error.count("\n") == 1


def test_help_names_what_must_be_given(capsys):
    usage_of_evaluate = help_of(capsys, "evaluate", "--help").splitlines()[0]
    assert usage_of_evaluate == "usage: cmpose evaluate --checkpoint CHECKPOINT [options]"
    assert help_of(capsys, "score", "--help").startswith(
        "usage: cmpose score GROUND_TRUTH PREDICTIONS [options]"
    )


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("train:\n  epochs: [1\n", ", line 3, is not YAML: expected ',' or ']', but got"),
        ("data:\n  augment: 3\n", ", line 2: bad configuration: data.augment: expected a mapping"),
        (
            "model:\n  bakbone: tiny\n",
            ", line 2: bad configuration: model.bakbone: no such field; did ",
        ),
        (None, ": no such recipe; configs/ has some"),
    ],
)
def test_an_error_in_a_recipe_is_one_line_with_its_file(recipe, message, tmp_path, capsys):
    file = tmp_path / "r.yaml"
    if recipe is not None:
        file.write_text(recipe)
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", str(file), "--output", str(tmp_path / "run")])
    error = capsys.readouterr().err or f"{ended.value.code}\n"
    assert error.startswith(f"cmpose train: {file}{message}")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "cmpose: give a command; there are init, train, "),
        (["prdict", "v.mp4"], "cmpose: prdict: no such command; did you mean predict?"),
    ],
)
def test_a_wrong_command_is_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def test_hyphens_are_taken_in_options_alone():
    names = {"--batch_size", "--dry-run", "--train.batch_size"}
    words = ["--batch-size", "3", "--train.batch-size=a-b_c", "--dry_run", "--x-y", "a-b"]
    expected = ["--batch_size", "3", "--train.batch_size=a-b_c", "--dry-run", "--x-y", "a-b"]
    assert usage.same_but_hyphens(words, names) == expected


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("train: {lr: 1}\nmodel:\n  depth: x\n", ", line 3: bad configuration: model.depth x"),
        ("data:\n  augment:\n    flp: 1\n", r", line 3: bad configuration: data.augment.flp: no"),
        ("\n\nmodl: {}\n", ", line 3: bad configuration: no section 'modl'"),
        ("model: {depth: null}\n", ", line 1: bad configuration: model.depth: null is no value"),
    ],
)
def test_an_error_in_a_recipe_names_its_line(content, line, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=f"r.yaml{line}"):
        config.load(path)


def test_a_long_value_is_cut():
    with pytest.raises(ValueError, match=r"model\.backbone x{60}: expected one") as refused:
        config.from_dict({"model": {"backbone": "x" * 5000}})
    assert len(str(refused.value)) < 200


def test_a_message_that_is_not_known_stays_whole():
    assert usage.one_line("something\n  new", ()) == "something new"


def help_of(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    assert not ended.value.code
    return capsys.readouterr().out


def test_messages_have_hyphens_in_options_alone():
    unchanged = "--model.image_size x, runs/a--b_c, a_b"
    assert help_text.hyphenated(f"--on_error: {unchanged}") == f"--on-error: {unchanged}"


def test_help_shows_options_with_hyphens_and_fields_as_files_have_them(capsys):
    text = help_of(capsys, "predict", "--help")
    assert "--batch-size BATCH_SIZE" in text
    assert not re.search(r"--\w+_", text)
    assert "--model.image_size" in help_of(capsys, "train", "--help-all")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_short_and_in_plain_words(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = help_of(capsys, command, "--help")
    assert len(text.splitlines()) < 60  # a screen
    assert text.startswith(f"usage: cmpose {command} ")
    for word in ("Literal", "typing", "type:", "null", "default: )", "default: False", "``"):
        assert word not in text


def test_all_fields_are_in_the_long_help(capsys):
    fields = config.flatten(config.to_dict(config.Config()))
    short, whole = help_of(capsys, "train", "--help"), help_of(capsys, "train", "--help-all")
    for field in fields:
        assert f"--{field} " in whole
        assert (f"--{field} " in short) is (field in config.COMMON)
    more = len(fields) - len(config.COMMON)
    assert f"{more} more fields of the recipe: --help-all" in " ".join(short.split())
