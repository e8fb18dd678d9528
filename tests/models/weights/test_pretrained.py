"""Starting weights: ViTPose's as transformers computes with them, in every layout, and misfits."""

from __future__ import annotations

import argparse

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from cmpose.data.skeleton import JOINTS
from cmpose.models.cmpose import CMPose
from cmpose.models.losses import cmpose_loss
from cmpose.models.vit import VIT_SIZES
from cmpose.models.weights import pretrained
from cmpose.models.weights.layouts import grid_of
from cmpose.models.weights.pretrained import load_pretrained
from tests.data.synthetic import COCO_KEYPOINTS
from tests.models import vitpose
from tests.models.builders import build, clips, seed_tensor


def pixels(size=(64, 48), batch: int = 1):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def assert_same(ours, theirs) -> None:
    for own, other in zip(ours, theirs, strict=True):
        assert own.abs().max() > 0.5  # zeros would be equal too
        torch.testing.assert_close(own, other, rtol=0, atol=1e-5)


# Of the two largest the first four blocks of 24 and 32: the others are called and computed alike.
@pytest.mark.parametrize(
    ("size", "depth"), [("small", 12), ("base", 12), ("large", 4), ("huge", 4)]
)
def test_features_and_heatmaps_are_those_of_transformers(size, depth, tmp_path):
    theirs = vitpose.vitpose(size, depth=depth)
    expected = vitpose.outputs(theirs, pixels())
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    del theirs
    model = vitpose.cmpose(size, depth=depth)
    report = load_pretrained(model, tmp_path)
    shape = VIT_SIZES[size]
    assert pretrained._backbone_of(shape.width, shape.depth) == size
    named = size if depth == shape.depth else f"of width {shape.width} with {depth} blocks"
    assert f"(Hugging Face VitPose, ViT {named})" in report
    assert "left" not in report
    assert_same(vitpose.outputs_of_ours(model, pixels()), expected)


def test_a_saved_model_of_transformers_at_its_own_size(tmp_path):
    theirs = vitpose.vitpose("small", (256, 192))
    theirs.save_pretrained(tmp_path)
    model = vitpose.cmpose("small", (256, 192))
    load_pretrained(model, tmp_path)
    images = pixels((256, 192), batch=2)
    assert_same(vitpose.outputs_of_ours(model, images), vitpose.outputs(theirs, images))


@pytest.fixture(scope="module")
def small():
    theirs = vitpose.vitpose("small")
    return theirs.state_dict(), vitpose.outputs(theirs, pixels())


def _original(state):
    return {"state_dict": vitpose.original(state), "meta": {"epoch": 210}}


def _mmpose(state):
    return {"state_dict": vitpose.mmpose(vitpose.original(state)), "meta": {}}


def _parallel(state):
    named = vitpose.original(state)
    return {"model": {f"module.{key}": value for key, value in named.items()}}


@pytest.mark.parametrize(
    ("arrange", "name"),
    [
        (_original, "original ViTPose"),
        (_mmpose, "mmpose 1.x"),
        (_parallel, "original ViTPose"),
        (lambda state: state, "Hugging Face VitPose"),
    ],
)
def test_every_layout_as_pth(small, tmp_path, arrange, name):
    state, expected = small
    torch.save(arrange(state), tmp_path / "vitpose-s.pth")
    model = vitpose.cmpose("small")
    report = load_pretrained(model, tmp_path / "vitpose-s.pth")
    assert f"({name}, ViT small)" in report
    assert "left" not in report
    assert_same(vitpose.outputs_of_ours(model, pixels()), expected)


def test_a_bare_vit_gives_the_backbone(small, tmp_path):
    state, (features, _) = small
    named = vitpose.bare(vitpose.original(state))
    extra = {"head.weight": torch.zeros(1000, 384), "decoder_embed.weight": torch.zeros(512, 384)}
    options = argparse.Namespace(lr=1e-3)  # as MAE's training files have it
    torch.save({"model": named | extra, "args": options}, tmp_path / "mae.pth")
    model = vitpose.cmpose("small")
    report = load_pretrained(model, tmp_path / "mae.pth")
    assert "(MAE or timm ViT, ViT small)" in report
    assert "left 1: cls_token (there is no class token in the sequence)" in report
    assert "left 1: head.weight (a classifier)" in report
    assert "left 1: decoder_embed.weight (MAE's decoder)" in report
    assert "timm's ViT-S has 6 heads, ViTPose's 12" in report
    assert_same([vitpose.outputs_of_ours(model, pixels())[0]], [features])


@pytest.mark.parametrize("arrange", [lambda state: state, vitpose.original])
def test_expert_0_of_vitpose_plus(tmp_path, arrange):
    theirs = vitpose.vitpose("small", num_experts=3, part_features=96, depth=2)
    state = arrange(theirs.state_dict())
    save_file(state, tmp_path / "plus.safetensors")
    model = vitpose.cmpose("small", depth=2)
    report = load_pretrained(model, tmp_path / "plus.safetensors")
    assert "expert 0 of 3 taken, COCO's (ViTPose+)" in report
    assert "(an expert of another data set)" in report
    assert_same(vitpose.outputs_of_ours(model, pixels()), vitpose.outputs(theirs, pixels()))


def test_positions_of_another_grid_are_resized(small, tmp_path):
    state, _ = small
    save_file(vitpose.original(state), tmp_path / "s.safetensors")
    model = vitpose.cmpose("small", (128, 96))
    assert "pos_embed resized from 4×3 to 8×6 (bicubic)" in load_pretrained(
        model, tmp_path / "s.safetensors"
    )
    stored = state["backbone.embeddings.position_embeddings"]
    grid = stored[:, 1:].reshape(1, 4, 3, 384).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(8, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(model.backbone.pos_embed[:, :1], stored[:, :1], rtol=0, atol=0)
    torch.testing.assert_close(
        model.backbone.pos_embed[0, 1:].view(8, 6, 384), grid[0].permute(1, 2, 0)
    )


def test_a_square_mae_of_another_patch(tmp_path):
    """MAE's ViT-H: 14×14 patches on 224×224 pixels, 16×16 of them."""
    state = vitpose.bare(vitpose.original(vitpose.vitpose("small", depth=1).state_dict()))
    ramp = torch.linspace(-1, 1, 16).view(1, 16, 1, 1).expand(1, 16, 16, 384)
    state["pos_embed"] = torch.cat([torch.zeros(1, 1, 384), ramp.reshape(1, 256, 384)], dim=1)
    state["patch_embed.proj.weight"] = torch.full((384, 3, 14, 14), 0.01)
    torch.save(state, tmp_path / "mae.pth")
    model = vitpose.cmpose("small", (256, 192), depth=1)
    report = load_pretrained(model, tmp_path / "mae.pth")
    assert "pos_embed resized from 16×16 to 16×12" in report
    assert "patch kernel resized from 14×14 to 16×16" in report
    # A ramp down the rows stays one, whatever happens to the columns.
    rows = model.backbone.pos_embed[0, 1:].view(16, 12, 384)
    torch.testing.assert_close(rows, ramp[0, :, :12], rtol=0, atol=1e-6)
    # And an even patch makes the same token.
    kernel = model.backbone.patch_embed.proj.weight
    torch.testing.assert_close(kernel.sum((1, 2, 3)), torch.full((384,), 0.01 * 3 * 14 * 14))


def test_grids_of_tokens():
    assert grid_of(192, (16, 12)) == (16, 12)
    assert grid_of(432, (16, 12)) == (24, 18)
    assert grid_of(196, (16, 12)) == (14, 14)
    assert grid_of(192, (8, 8)) == (16, 12)
    assert grid_of(128, (16, 8)) == (16, 8)
    assert grid_of(197, (16, 12)) is None
    assert grid_of(0, (16, 12)) is None


def test_positions_that_are_no_grid_are_left(small, tmp_path):
    state = vitpose.original(small[0])
    state["backbone.pos_embed"] = torch.zeros(1, 12, 384)
    save_file(state, tmp_path / "s.safetensors")
    model = vitpose.cmpose("small")
    torch.nn.init.ones_(model.backbone.pos_embed)
    report = load_pretrained(model, tmp_path / "s.safetensors")
    assert "left 1: pos_embed (12 positions are no grid of patches)" in report
    assert (model.backbone.pos_embed == 1).all()


def test_cocos_head_for_posetracks_joints(small, tmp_path):
    """Deconvolutions are taken whole, the final layer's rows by the joints' names."""
    state, (features, heatmaps) = small
    save_file(state, tmp_path / "s.safetensors")
    model = vitpose.cmpose("small", num_keypoints=15)
    torch.nn.init.zeros_(model.head.final_layer.weight)
    torch.nn.init.zeros_(model.head.final_layer.bias)
    report = load_pretrained(model, tmp_path / "s.safetensors")
    assert (
        "final layer: 13 of 15 joints by name from its 17 keypoints; head_bottom, head_top "
        "start fresh" in report
    )
    ours = model.head(features).detach()
    for joint, name in enumerate(JOINTS):
        if name in COCO_KEYPOINTS:
            expected = heatmaps[:, COCO_KEYPOINTS.index(name)]
            torch.testing.assert_close(ours[:, joint], expected, rtol=0, atol=1e-5)
        else:
            assert not ours[:, joint].any()


def test_a_simple_head_is_left(tmp_path):
    theirs = vitpose.vitpose("small", depth=1, use_simple_decoder=True)
    save_file(theirs.state_dict(), tmp_path / "s.safetensors")
    model = vitpose.cmpose("small", depth=1)
    model.head.final_layer.weight.data.fill_(7)
    model.head.final_layer.bias.data.fill_(7)
    report = load_pretrained(model, tmp_path / "s.safetensors")
    assert "its head is ViTPose's simple one; the model's has deconvolutions" in report
    assert "head.final_layer.weight (of another shape: [17, 384, 3, 3] in the file" in report
    assert "head.final_layer.bias (the rest of its layer does not fit)" in report
    assert (model.head.final_layer.weight == 7).all()
    assert (model.head.final_layer.bias == 7).all()
    features, _ = vitpose.outputs_of_ours(model, pixels())
    assert_same([features], [vitpose.outputs(theirs, pixels())[0]])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"size": "base"},
            r"width 384 and 12 blocks, but model\.backbone=base has width 768 and 12: set "
            r"model\.backbone=small",
        ),
        ({"size": "huge"}, r"has width 1280 and 32: set model\.backbone=small"),
    ],
)
def test_another_size_is_named(small, tmp_path, fields, message):
    save_file(vitpose.original(small[0]), tmp_path / "s.safetensors")
    with torch.device("meta"):
        model = vitpose.CMPose(
            vitpose.ModelConfig(backbone=fields["size"], image_size=(64, 48), fine="off")
        )
    with pytest.raises(ValueError, match=message):
        load_pretrained(model, tmp_path / "s.safetensors")


def test_another_depth_is_named_unless_it_was_asked_for(tmp_path):
    state = vitpose.original(vitpose.vitpose("small", depth=3).state_dict())
    save_file(state, tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match=r"3 blocks.*no model\.backbone of that.*model\.depth=3"):
        load_pretrained(vitpose.cmpose("small"), tmp_path / "s.safetensors")
    model = vitpose.cmpose("small", depth=2)
    report = load_pretrained(model, tmp_path / "s.safetensors")
    assert "(model.depth=2)" in report
    torch.testing.assert_close(
        model.state_dict()["backbone.blocks.1.mlp.fc1.weight"],
        state["backbone.blocks.1.mlp.fc1.weight"],
        rtol=0,
        atol=0,
    )


def test_a_file_that_fits_nothing_names_the_nearest_layout(tmp_path):
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"none of its 1 tensors fits.*'conv1\.weight'"):
        load_pretrained(build(), tmp_path)
    near = {
        "backbone.layers.0.attn.qkv.weight": torch.zeros(9, 3),
        "backbone.stem.weight": torch.zeros(3),
    }
    save_file(near, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"the nearest layout is mmpose 1\.x's \(1 keys of it\), in which there is"
    ):
        load_pretrained(build(depth=1), tmp_path)


class Evil:
    def __reduce__(self):
        return print, ("this must not run",)


def test_pickles_run_no_code(tmp_path, capsys):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "hook": Evil()}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth.*Python objects.*print.*may run any code"):
        load_pretrained(build(), tmp_path / "x.pth")
    assert "this must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_a_damaged_file_is_named(tmp_path, name):
    (tmp_path / name).write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=rf"model\.pretrained=.*{name}"):
        load_pretrained(build(), tmp_path / name)


def test_a_file_without_tensors(tmp_path):
    torch.save({"state_dict": {"epoch": 3}}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth holds no tensors by name.*state_dict"):
        load_pretrained(build(), tmp_path / "x.pth")
    torch.save([torch.zeros(1)], tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"x\.pth holds no tensors by name"):
        load_pretrained(build(), tmp_path / "x.pth")


def test_no_file(tmp_path):
    for path in (tmp_path, tmp_path / "no.pth"):
        with pytest.raises(FileNotFoundError, match=r"no model\.safetensors and no file of weigh"):
            load_pretrained(build(), path)


def test_a_packaged_model_by_its_name():
    model = CMPose.from_pretrained("tiny")
    start = CMPose(model.recipe.model)
    load_pretrained(start, "tiny")
    for name, value in model.state_dict().items():
        assert torch.equal(start.state_dict()[name], value), name


# -- identity_start -------------------------------------------------------------------------------


def test_an_identity_start_predicts_what_vitpose_predicts(tmp_path):
    """The whole model on clips of different frames, for the joints that both have, in float32."""
    theirs = vitpose.vitpose("small", (64, 64), depth=2)
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    clip = torch.randn(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    shared = [joint for joint, name in enumerate(JOINTS) if name in COCO_KEYPOINTS]
    assert len(shared) == 13
    rows = [COCO_KEYPOINTS.index(JOINTS[joint]) for joint in shared]
    expected = vitpose.outputs(theirs, clip[:, 1])[1][:, rows]
    fields = {"backbone": "small", "stem": "patch", "depth": 2, "head_channels": 256}
    fields |= {"num_keypoints": 15, "tokens_per_keypoint": 1, "num_clusters": 1, "neighbors": 1}

    def heatmaps(**more):
        model = build(image_size=(64, 64), **fields, **more).eval()
        load_pretrained(model, tmp_path)
        with torch.no_grad():
            return model(clip).heatmaps[:, shared]

    for fine in ("full", "causal_only", "off"):
        assert_same([heatmaps(fine=fine, identity_start=True)], [expected])
    assert (heatmaps() - expected).abs().max() > 0.01


def test_an_identity_start_learns_in_every_part():
    """After one step of gradient descent the gate has opened, and all weights have gradients."""
    model = build(identity_start=True, depth=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = clips(2, model.config)
    centers, weight = torch.full((2, 2, 2), 5.0), torch.ones(2, 2)
    for _ in range(3):
        optimizer.zero_grad()
        output = model(batch, seed_tensor())
        cmpose_loss(output, centers, weight, model.config).total.backward()
        optimizer.step()
    assert model.fine.gate.item() != 0
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_a_model_without_a_gate_is_taken_with_the_gate_open(tmp_path):
    before = build(seed=1, fine="full")
    torch.nn.init.normal_(before.coarse.criss_cross.fuse_first.weight)
    save_file(before.state_dict(), tmp_path / "model.safetensors")
    model = build(identity_start=True)
    assert "no gate" in load_pretrained(model, tmp_path)
    images = clips(1, model.config)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(images).heatmaps, before.eval()(images).heatmaps)


def test_an_identity_start_needs_vitposes_head():
    with pytest.raises(ValueError, match=r"model\.identity_start=true needs model\.head=deconv"):
        build(identity_start=True, head="token")


def test_a_model_of_one_frame_starts_one_of_several(tmp_path):
    one = build(seed=1, num_frames=1).eval()
    three = build(seed=2, num_frames=3).eval()
    with torch.no_grad():  # as training would leave it
        one.coarse.fusion.linear.weight.add_(0.1 * torch.randn(192, 192))
        one.head.final_layer.weight.mul_(1000)
    report = load_pretrained(three, one.save_pretrained(tmp_path / "one"))
    assert "it is of 1 frame: its tokens are the key frame's of 3" in report
    assert "nothing starts fresh" in report
    still = clips(2, one.config)
    torch.testing.assert_close(
        three(still.expand(-1, 3, -1, -1, -1)).heatmaps, one(still).heatmaps, rtol=1e-3, atol=1e-4
    )
