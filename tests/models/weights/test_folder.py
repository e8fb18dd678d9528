"""Model folders: what from_pretrained and save_pretrained leave, and the model card."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch
import yaml

from cmpose.config import Config, DataConfig, TrainConfig
from cmpose.models.cmpose import CMPose
from cmpose.models.weights.card import model_card
from cmpose.models.weights.folder import CheckpointError
from tests.models.builders import build, clips

AP = {"columns": {"Head": 80.123, "Wri": None, "Mean": 71.06}, "joints": [], "ap": []}


def test_round_trip(tmp_path):
    model = build().eval()
    recipe = Config(model=model.config, data=DataConfig(udp=True), train=TrainConfig(epochs=7))
    written = model.save_pretrained(tmp_path / "m", recipe=recipe)
    files = {"model.safetensors", "config.json", "skeleton.json", "README.md"}
    assert {p.name for p in written.iterdir()} == files
    loaded = CMPose.from_pretrained(tmp_path / "m")
    assert loaded.recipe == recipe
    assert not loaded.training
    x = clips(2, model.config)
    assert torch.equal(loaded(x).heatmaps, model(x).heatmaps)
    # What was loaded is written again with all that was known.
    loaded.save_pretrained(tmp_path / "again")
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()


def test_the_backend_is_the_callers(tmp_path):
    build(backend="auto").save_pretrained(tmp_path / "m")
    assert CMPose.from_pretrained(tmp_path / "m").config.backend == "auto"
    loaded = CMPose.from_pretrained(tmp_path / "m", backend="reference")
    assert loaded.config.backend == "reference"


def test_a_model_is_replaced_and_nothing_else(tmp_path):
    build(seed=1).save_pretrained(tmp_path / "m")
    model = build(seed=2)
    model.save_pretrained(str(tmp_path / "m"))
    loaded = CMPose.from_pretrained(tmp_path / "m")
    assert torch.equal(loaded.coarse.keypoint_tokens, model.coarse.keypoint_tokens)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("the only copy")
    with pytest.raises(FileExistsError, match=r"other holds something other than a model"):
        model.save_pretrained(tmp_path / "other")
    assert (tmp_path / "other" / "thesis.tex").read_text() == "the only copy"
    # Other programs' models have files of the same names.
    (tmp_path / "other" / "model.safetensors").write_bytes(b"a text model")
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(FileExistsError, match=r"other holds a model that is none of cmpose.*new"):
        model.save_pretrained(tmp_path / "other")
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == b"a text model"
    # Also beside a model.
    (tmp_path / "m" / "notes").mkdir()
    (tmp_path / "m" / "notes" / ".bashrc.old").write_text("kept")
    (tmp_path / "m" / "notes.txt").symlink_to("nowhere")
    model.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "notes" / ".bashrc.old").read_text() == "kept"
    assert (tmp_path / "m" / "notes.txt").is_symlink()


def test_a_checkpoint_is_not_replaced_by_a_model_alone(tmp_path):
    model = build()
    model.save_pretrained(tmp_path / "step-00000001")
    (tmp_path / "step-00000001" / "state.pt").write_bytes(b"the optimiser")
    with pytest.raises(FileExistsError, match=r"step-00000001 is a checkpoint.*give a new folder"):
        model.save_pretrained(tmp_path / "step-00000001")
    assert (tmp_path / "step-00000001" / "state.pt").read_bytes() == b"the optimiser"


def test_no_model_there(tmp_path):
    with pytest.raises(CheckpointError, match=r"no model\.safetensors there; give a model's fold"):
        CMPose.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"names on a hub are not.*hf download some/model"):
        CMPose.from_pretrained("some/model")


def test_weights_and_recipe_of_two_models(tmp_path):
    build().save_pretrained(tmp_path / "m")
    build(head_channels=16).save_pretrained(tmp_path / "n")
    (tmp_path / "n" / "model.safetensors").replace(tmp_path / "m" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit this model \(head\."):
        CMPose.from_pretrained(tmp_path / "m")


@pytest.mark.parametrize("field", ["model", "model.backbone", "model.depth", "model.stem"])
def test_a_recipe_that_lacks_a_field_is_named_with_its_file(field, tmp_path):
    """The field gets its default, which is another than the model's."""
    folder = build(stem="patch").save_pretrained(tmp_path / "m")
    recipe = json.loads((folder / "config.json").read_text())
    section, _, name = field.partition(".")
    del (recipe[section] if name else recipe)[name or section]
    (folder / "config.json").write_text(json.dumps(recipe))
    with pytest.raises(CheckpointError, match=r"m/model\.safetensors, by .*m/config\.json, does"):
        CMPose.from_pretrained(folder)


def test_a_recipe_of_which_no_model_can_be_built_is_named_with_its_file(tmp_path):
    folder = build().save_pretrained(tmp_path / "m")
    recipe = json.loads((folder / "config.json").read_text())
    recipe["model"]["num_frames"] = 2
    (folder / "config.json").write_text(json.dumps(recipe))
    with pytest.raises(CheckpointError, match=r"m/config\.json: model\.num_frames=2: must be odd"):
        CMPose.from_pretrained(folder)


def test_memory_that_a_model_lacks_is_told_with_the_recipe_and_the_size_of_the_weights(tmp_path):
    folder = build().save_pretrained(tmp_path / "m")
    message = r"m/config\.json: memory ran out .* the weights beside it are [\d.]+ MB"
    full = mock.patch.object(torch.nn.Linear, "reset_parameters", side_effect=MemoryError)
    with full, pytest.raises(CheckpointError, match=message):
        CMPose.from_pretrained(folder)


def test_the_card_says_what_is_known(tmp_path):
    model = build()
    recipe = Config(model=model.config, data=DataConfig(root="/mnt/disk7/PoseTrack18"))
    recipe.model.pretrained = "/home/somebody/vitpose-b.pth"
    run = {"ap": AP, "box_source": "ground truth", "data": "PoseTrack18/val", "clips": 9}
    other = {"ap": AP, "box_source": "boxes.json"}
    card = model_card(recipe, [run | {"steps": 120}, other])
    assert "| PoseTrack18/val |" in card.replace("`", "")
    assert "| ground truth | 9 | 80.1 | – | 71.1 |" in card
    assert "| unknown | boxes.json | – | 80.1 | – | 71.1 |" in card
    assert "| Training data | `PoseTrack18/annotations/train` |" in card
    assert "| Starting weights | `vitpose-b.pth` |" in card
    assert "| Steps | 120 |" in card
    assert f"torch {torch.__version__}" in card
    # A published card does not tell the paths of the machine that wrote it.
    assert "disk7" not in card
    assert "somebody" not in card
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "cmpose"
    assert front["license"] == "unknown"


def test_the_card_says_what_is_unknown(tmp_path):
    model = build()
    card = (model.save_pretrained(tmp_path / "m") / "README.md").read_text()
    for name in ("Steps", "Training data", "Starting weights"):
        assert f"| {name} | unknown |" in card
    assert "AP: unknown." in card
    assert "whether it was run is unknown" in card
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model"]["backbone"] == "tiny"


def test_half_the_bytes_give_nearly_the_same(tmp_path):
    model = build().eval()
    with torch.no_grad():  # a number too large for 16 bits keeps its 32
        model.backbone.patch_embed.layers[1].running_var[0] = 1e6
    whole, half = (
        model.save_pretrained(tmp_path / str(half), half=half) / "model.safetensors"
        for half in (False, True)
    )
    assert half.stat().st_size < 0.52 * whole.stat().st_size
    loaded = CMPose.from_pretrained(half.parent)
    for key, value in model.state_dict().items():
        assert loaded.state_dict()[key].dtype == value.dtype
        torch.testing.assert_close(loaded.state_dict()[key], value, rtol=2**-11, atol=2**-25)
