"""Files that wrap weights, hold two sets of them, or hold what is no weight."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from cmpose.models.weights import pretrained
from cmpose.models.weights.containers import find_sets
from cmpose.models.weights.folder import CheckpointError, load_into
from cmpose.models.weights.pretrained import load_pretrained
from tests.models import vitpose
from tests.models.builders import build

POSITIONS = "backbone.pos_embed"
SIZE = {"size": "tiny", "depth": 1}


@pytest.fixture(scope="module")
def plain():
    return vitpose.original(vitpose.vitpose(**SIZE).state_dict())


@pytest.fixture
def model():
    return vitpose.cmpose(**SIZE, stem="patch")


def twice(state):
    """Other weights, to be told from the plain ones: a moving average, say."""
    return {key: value * 2 for key, value in state.items()}


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict_ema": s},
        lambda s: {"model_ema": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}}},
        lambda s: {"ema_state_dict": prefixed(s, "module.")},
        lambda s: {"model_state_dict": s, "epoch": 3},
        lambda s: {"teacher": prefixed(s, "module.")},
        lambda s: {"ema": {"module": s, "updates": 7}},
        lambda s: {"anything": {"at_all": s}},
        lambda s: prefixed(s, "model."),
        lambda s: {"state_dict": prefixed(s, "net.")},
        lambda s: {"state_dict": prefixed(s, "module.model._orig_mod.")},
        lambda s: prefixed(s, "ema_model.module."),
    ],
)
def test_every_container_and_prefix_is_read(wrap, plain, model, tmp_path):
    torch.save(wrap(plain), tmp_path / "x.pth")
    report = load_pretrained(model, tmp_path / "x.pth")
    assert "(original ViTPose, ViT of width 192 with 1 blocks)" in report
    assert "left" not in report
    assert "several sets" not in report
    for key in (POSITIONS, "backbone.blocks.0.mlp.fc1.weight", "head.final_layer.bias"):
        expected = plain[key.replace("head.", "keypoint_head.")]
        assert torch.equal(model.state_dict()[key], expected)


@pytest.mark.parametrize(
    ("wrap", "times", "choice"),
    [
        (lambda s: {"state_dict": s, "state_dict_ema": twice(s)}, 2, "state_dict_ema (an average)"),
        (lambda s: {"model_ema": twice(s), "model": s}, 2, "model_ema (an average) is taken, not"),
        (
            lambda s: {"state_dict": prefixed(s, "model.") | prefixed(twice(s), "ema_model.")},
            2,
            "state_dict.ema_model (an average) is taken, not state_dict",
        ),
        # Half an average would leave half of the model at random.
        (
            lambda s: {"model": s, "model_ema": {POSITIONS: 2 * s[POSITIONS]}},
            1,
            "model is taken, not model_ema",
        ),
        # mmengine has swapped the two.
        (
            lambda s: {
                "state_dict": twice(s),
                "ema_state_dict": prefixed(s, "module.") | {"steps": torch.tensor(9)},
            },
            2,
            "state_dict (an average) is taken, not ema_state_dict",
        ),
        (lambda s: {"model": s, "best": twice(s)}, 1, "model is taken, not best"),
    ],
)
def test_of_two_sets_the_choice_is_said(wrap, times, choice, plain, model, tmp_path):
    torch.save(wrap(plain), tmp_path / "x.pth")
    report = load_pretrained(model, tmp_path / "x.pth")
    assert f"it holds several sets of weights: {choice}" in report
    assert torch.equal(model.backbone.pos_embed, times * plain[POSITIONS])


def test_sets_that_nothing_tells_apart_are_refused(plain, model, tmp_path):
    torch.save({"first": plain, "second": twice(plain)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth holds several sets of weights \(first, second\)"):
        load_pretrained(model, tmp_path / "x.pth")
    save_file(prefixed(twice(plain), "model.") | plain, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x\.safetensors holds '.*' and 'model\..* either m"):
        load_pretrained(model, tmp_path / "x.safetensors")


def test_what_is_there_instead_of_weights_is_named(model, tmp_path):
    torch.save({"epoch": 3, "args": {"lr": 0.1}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"it is a dictionary of 'epoch' \(int\), 'args' \(dict\)"):
        load_pretrained(model, tmp_path / "x.pth")
    torch.save({"pose": {"conv1.weight": torch.zeros(3)}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"none of its 1 tensors.*the file has 'pose\.conv1\.wei"):
        load_pretrained(model, tmp_path / "x.pth")


def test_a_dino_teacher_gives_the_whole_backbone(plain, model, tmp_path):
    """Its keys begin with backbone. as ViTPose's do, but its last norm has timm's name."""
    teacher = prefixed(vitpose.bare(plain), "backbone.") | {"head.mlp.0.weight": torch.zeros(8)}
    student = prefixed(twice(teacher), "module.")
    torch.save({"student": student, "teacher": teacher}, tmp_path / "x.pth")
    report = load_pretrained(model, tmp_path / "x.pth")
    assert "teacher (an average) is taken, not student" in report
    norm = plain["backbone.last_norm.weight"]
    assert torch.equal(model.backbone.last_norm.weight, norm)


def one_infinite(tensor):
    tensor = tensor.clone()
    tensor[0, 3, 5] = torch.inf
    return tensor


ODD = {
    "sparse_coo": lambda t: t.to_sparse(),
    "sparse_csr": lambda t: t[0].to_sparse_csr(),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
    "complex64": lambda t: torch.complex(t, t),
    "int8": lambda t: t.to(torch.int8),
    "bool": lambda t: t > 0,
    "NaN or infinite": lambda t: t.where(t > 0, torch.nan),
    "1 of 2496 values that are NaN or infinite": one_infinite,
    "NaN or infinite: ": lambda t: t.double() * 1e300,  # too large for float32
}


@pytest.mark.filterwarnings("ignore")  # torch's, of quantisation and sparse tensors
@pytest.mark.parametrize("fault", ODD)
@pytest.mark.parametrize("key", [POSITIONS, "keypoint_head.final_layer.weight"])
def test_what_is_no_finite_number_is_refused(fault, key, plain, model, tmp_path):
    odd = ODD[fault](plain[POSITIONS])
    torch.save({"state_dict": plain | {key: odd}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=rf"x\.pth: state_dict\.{key} (is|holds) .*{fault}"):
        load_pretrained(model, tmp_path / "x.pth")


def test_what_is_not_taken_may_be_anything(plain, model, tmp_path):
    torch.save(plain | {"backbone.cls_token": torch.full((1, 1, 192), torch.nan)}, tmp_path / "x")
    assert "left 1: backbone.cls_token" in load_pretrained(model, tmp_path / "x")


SHAPES = [(), (0,), (5,), (17,), (192,), (13, 192), (2, 13, 192), (1, 0, 192), (1, 1, 0), (3, 3, 0)]


@pytest.mark.parametrize("layout", ["original", "transformers", "bare"])
def test_a_tensor_of_any_shape_is_left_and_named(layout, plain, tmp_path, monkeypatch):
    state = vitpose.vitpose(**SIZE).state_dict()
    named = {"original": plain, "transformers": state, "bare": vitpose.bare(plain)}[layout]
    model = vitpose.cmpose(**SIZE, stem="patch")
    (tmp_path / "x.pth").touch()
    for number, key in enumerate(named):
        shape = SHAPES[number % len(SHAPES)]
        # Norms tell the model's width, which is another error.
        if "norm" not in key and shape != named[key].shape:
            damaged = named | {key: torch.zeros(shape)}
            monkeypatch.setattr(pretrained, "_load", lambda *_, content=damaged: content)
            assert "left" in load_pretrained(model, tmp_path / "x.pth"), key


@pytest.mark.parametrize("shape", SHAPES)
def test_misshapen_positions_are_left_and_named(shape, plain, model, tmp_path):
    torch.save(plain | {POSITIONS: torch.zeros(shape)}, tmp_path / "x.pth")
    torch.nn.init.ones_(model.backbone.pos_embed)
    report = load_pretrained(model, tmp_path / "x.pth")
    assert f"left 1: pos_embed ({list(shape)} is not [1, positions, width])" in report
    assert (model.backbone.pos_embed == 1).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_models_own_weights_must_be_finite(value):
    model = build()
    weights = model.state_dict()
    weights["coarse.keypoint_tokens"] = weights["coarse.keypoint_tokens"].clone()
    weights["coarse.keypoint_tokens"][1, 2] = value
    with pytest.raises(CheckpointError, match=r"run/x: coarse\.keypoint_tokens holds 1 of .*NaN"):
        load_into(model, weights, "run/x")
    weights["coarse.keypoint_tokens"] = weights["coarse.keypoint_tokens"].bool()
    with pytest.raises(CheckpointError, match=r"run/x: coarse\.keypoint_tokens is bool: weights"):
        load_into(model, weights, "run/x")


def test_keys_are_taken_apart_at_dots_only():
    sets = find_sets({"modelling.weight": torch.zeros(1), "model": torch.ones(1), "n": 3})
    assert [list(each.tensors) for each in sets] == [["modelling.weight", "model"]]
