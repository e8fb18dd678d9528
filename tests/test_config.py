"""Recipes: typed fields, round trips, overrides, and what is wrong is named."""

from __future__ import annotations

import inspect

import pytest

from cmpose import config


def test_round_trip_and_types():
    recipe = config.from_dict(
        {"model": {"image_size": [128, 96]}, "data": {"augment": {"flip": 0.25}}}
    )
    assert recipe.model.image_size == (128, 96)
    assert recipe.data.augment == config.AugmentConfig(flip=0.25)
    assert recipe.train.step_epochs == (5, 12, 18)
    assert config.from_dict(config.to_dict(recipe)) == recipe


def test_load_with_overrides(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("train: {epochs: 3}\n")
    recipe = config.load(path, **{"train.epochs": 7, "data.augment.flip": 0.0})
    assert recipe.train.epochs == 7
    assert recipe.data.augment.flip == 0.0


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"model": {"backbon": "tiny"}}, "backbon"),
        ({"model": {"depth": "deep"}}, r"model\.depth"),
        ({"train": {"precision": "fp8"}}, r"train\.precision"),
        ({"data": {"augment": {"flop": 1}}}, "flop"),
        ({"model": 3.5}, r"model: expected a mapping of its fields, got 3\.5"),
        ({"data": {"augment": [1]}}, "augment"),
        ({"model": {"noise_std": 10**400}}, r"model\.noise_std: a whole number too large for 64"),
        ({"modl": {}}, "no section 'modl'; there are model, data, train"),
        ({"model": {"backbone": None}}, r"model\.backbone: null is no value; leave the field out"),
        ({"train": {"device": None}}, r"train\.device: null is no value"),
        ({"data": {"augment": {"scale": None}}}, r"data\.augment\.scale: null is no value"),
        ({"train": {"lr": float("inf")}}, r"train\.lr: inf is no finite number"),
        ({"model": {"sigma": float("nan")}}, r"model\.sigma: nan is no finite number"),
    ],
)
def test_a_bad_field_is_named(values, named):
    with pytest.raises(ValueError, match=named):
        config.from_dict(values)


def test_a_recipe_that_is_no_mapping(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("- 1\n")
    with pytest.raises(ValueError, match=r"r\.yaml: a recipe is a YAML mapping"):
        config.load(path)


@pytest.mark.parametrize("content", [b"train: [1\n", b"train:\n\tlr: 1\n", b"\xff\xfe"])
def test_a_recipe_that_is_not_yaml(tmp_path, content):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"r\.yaml(, line \d,)? is not YAML"):
        config.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("odel: {}", "no section 'odel'"),
        ("model: {1: 2}", "1: expected the name of a field"),
        ("model: {depth: x}", "model.depth"),
        ("model: 3", "model: expected a mapping"),
        ("model: 2001-99-99", "is not YAML: month must be in 1..12"),
        ("model: {sigma: " + "9" * 5000, "is not YAML"),
        ("[" * 5000, "is not YAML"),
    ],
)
def test_an_error_in_a_recipe_names_its_file(tmp_path, content, message):
    path = tmp_path / "r.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"r\.yaml.*{message}"):
        config.load(path, **{"model.sigma": 3.0, "train.epochs": 1})


def test_a_recipe_with_a_byte_order_mark_is_read(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfmodel: {depth: 3}\n")
    assert config.load(path).model.depth == 3


def test_differences_names_fields():
    old, new = config.Config(), config.Config()
    new.data.augment.flip, new.train.lr = 0.1, 1.0
    differences = config.differences(config.to_dict(old), config.to_dict(new))
    assert differences == {"data.augment.flip": (0.5, 0.1), "train.lr": (2e-4, 1.0)}


def test_every_field_is_documented():
    for section in (*config.SECTIONS.values(), config.AugmentConfig):
        for name in section.__dataclass_fields__:
            assert f"\n    {name}: " in (inspect.getdoc(section) or ""), (
                f"{section.__name__}.{name}"
            )
