"""``cmpose init``: a recipe to begin with, which trains as it is."""

from __future__ import annotations

import json

import pytest

from cmpose import config
from cmpose.cli import main
from cmpose.starter import RECIPE, write_recipe


def test_the_recipe_trains_as_it_is(rendered, tmp_path, capsys):
    folder = tmp_path / "my own"
    main(["init", str(folder), "--data", str(rendered)])
    printed = capsys.readouterr().out
    assert "cmpose render" not in printed  # the data are there
    assert f"cmpose train --config '{folder / RECIPE}' --output '{folder / 'run'}'" in printed
    quick = ["--train.epochs", "1", "--data.num_workers", "0"]
    main(["train", "--config", str(folder / RECIPE), "--output", str(folder / "run"), *quick])
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert metrics["ap"]["columns"]["Mean"] is not None
    written = json.loads((folder / "run" / "config.json").read_text())
    assert written["model"]["num_keypoints"] == 15  # taken from the annotations


def test_the_recipe_is_commented_and_a_recipe(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main(["init", "new/one"])
    printed = capsys.readouterr().out
    assert "cmpose render new/one/data --videos" in printed
    text = (tmp_path / "new" / "one" / RECIPE).read_text()
    recipe = config.load(tmp_path / "new" / "one" / RECIPE)
    assert recipe.data.root == "new/one/data"
    assert text.count("#") > 20


@pytest.mark.parametrize("root", ['C:\\data "1"', "~/Bilder & Ü", "a: b # c"])
def test_any_path_of_data_comes_back(root, tmp_path):
    assert config.load(write_recipe(tmp_path, root)).data.root == root


def test_what_is_there_is_kept(tmp_path):
    (tmp_path / RECIPE).write_text("mine")
    with pytest.raises(SystemExit, match=r"recipe\.yaml: is there already: move it, or give an"):
        main(["init", str(tmp_path)])
    assert (tmp_path / RECIPE).read_text() == "mine"
