"""The full model: shapes, branches, ablations, and that every weight learns."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cmpose.config import ModelConfig
from cmpose.models.cmpose import CMPose
from cmpose.models.losses import cmpose_loss
from tests.models.builders import build, clips, seed_tensor, small_config

ABLATIONS = {
    "full": {},
    "no mask task": {"mask_task": False},
    "no denoise task": {"denoise_task": False},
    "primary only": {"mask_task": False, "denoise_task": False},
    "causal only": {"fine": "causal_only"},
    "no fine": {"fine": "off"},
    "token head": {"head": "token"},
    "token head, no fine": {"head": "token", "fine": "off"},
    "own pathways": {"share_pathways": False},
    "plain sum merge": {"normalize_merge": False, "importance": "max"},
    "bernoulli": {"corruption": "bernoulli"},
    "positions first": {"positions_after_corruption": False},
    "plain selection": {"selection_weight": 0.0},
    "one frame": {"num_frames": 1},
    "five frames": {"num_frames": 5},
    "patch stem": {"stem": "patch"},
    "recompute": {"checkpoint_activations": True},
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_every_weight_gets_a_finite_gradient(name):
    model = build(**ABLATIONS[name])
    config = model.config
    output = model(clips(2, config), seed_tensor())
    assert output.heatmaps.shape == (2, 2, 16, 12)
    centers = torch.tensor([[[3.0, 4.0], [8.0, 9.0]]]).expand(2, -1, -1)
    losses = cmpose_loss(output, centers, torch.ones(2, 2), config)
    losses.total.backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None]
    assert silent == []
    assert all(p.grad.isfinite().all() for p in model.parameters())
    # The first step of the untrained heads is tiny but not nothing.
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "head" in n)


def test_auxiliary_tasks_are_there_when_on_and_only_while_training():
    model = build()
    x = clips(2, model.config)
    trained = model(x, seed_tensor())
    assert trained.coarse.mask is not None
    assert trained.coarse.noise is not None
    # exactly round(0.45 · 3 · 12) tokens of each clip
    assert trained.coarse.mask.corrupted.flatten(1).sum(1).tolist() == [16, 16]
    assert trained.coarse.noise.corrupted.flatten(1).sum(1).tolist() == [16, 16]
    inferred = model(x)
    assert inferred.coarse.mask is None
    assert inferred.coarse.noise is None
    only_noise = build(mask_task=False)(x, seed_tensor())
    assert only_noise.coarse.mask is None
    assert only_noise.coarse.noise is not None
    torch.testing.assert_close(only_noise.coarse.noise.prediction, trained.coarse.noise.prediction)


def test_inference_is_the_clean_branch():
    model = build().eval()
    x = clips(2, model.config)
    with torch.no_grad():
        torch.testing.assert_close(model(x).heatmaps, model(x, seed_tensor()).heatmaps)


def test_corruption_does_not_depend_on_how_the_batch_is_split():
    model = build().eval()
    x = clips(4, model.config)
    with torch.no_grad():
        whole = model(x, seed_tensor())
        second = model(x[2:], seed_tensor(), 2)
    assert torch.equal(whole.coarse.mask.corrupted[2:], second.coarse.mask.corrupted)
    torch.testing.assert_close(
        whole.coarse.noise.prediction[2:], second.coarse.noise.prediction, rtol=1e-5, atol=1e-5
    )


def test_masked_tokens_know_where_they_are_only_with_positions_after_corruption():
    for after, differ in ((True, True), (False, False)):
        model = build(mask_ratio=1.0, positions_after_corruption=after).eval()
        with torch.no_grad():
            model.coarse.slot_embed.normal_()
            masked = model(clips(1, model.config), seed_tensor()).coarse.mask.prediction
        masked = masked.view(1, 3, 12, -1)  # all tokens of the clip
        spread = (masked - masked[:, :, :1]).abs().max()
        assert bool(spread > 1e-3) is differ


@pytest.mark.parametrize(
    ("num_frames", "size"), [(1, (64, 48)), (5, (32, 112)), (3, (96, 64)), (17, (64, 48))]
)
def test_any_odd_number_of_frames_and_any_multiple_of_16(num_frames, size):
    tokens = size[0] * size[1] // 256
    model = build(num_frames=num_frames, image_size=size, neighbors=2)
    output = model(clips(1, model.config), seed_tensor())
    assert output.heatmaps.shape == (1, 2, size[0] // 4, size[1] // 4)
    assert output.coarse.features.shape == (1, num_frames, tokens, 192)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"image_size": (65, 48)}, r"model\.image_size=\(65, 48\).*nearest is \(64, 48\)"),
        ({"num_frames": 2}, r"model\.num_frames=2.*odd"),
        ({"num_keypoints": 0}, r"model\.num_keypoints=0"),
        ({"mask_ratio": 1.5}, r"model\.mask_ratio=1\.5"),
        ({"noise_ratio": -0.1}, r"model\.noise_ratio=-0\.1"),
        ({"tokens_per_keypoint": 7}, r"model\.tokens_per_keypoint=7.*use 1 to 6"),
        ({"num_keypoints": 13}, r"a frame of 64×48 has 12; use a larger model\.image_size"),
        ({"num_clusters": 9}, r"model\.num_clusters=9.*8 non-causal"),
        ({"neighbors": 0}, r"model\.neighbors=0"),
        ({"criss_cross_heads": 5}, r"num_heads=5 does not divide"),
        ({"image_size": (16_400, 48)}, r"model\.image_size=\(16400, 48\).*at most 16384"),
        ({"num_frames": 2**63 - 1}, r"model\.num_frames=9223372036854775807: .*\[1, 1001\]"),
        ({"depth": 2**63 - 1}, r"model\.depth=9223372036854775807: must lie in \[0, 1000\]"),
        ({"depth": -1}, r"model\.depth=-1"),
        ({"criss_cross_depth": 0}, r"model\.criss_cross_depth=0: must lie in \[1, 1000\]"),
        ({"drop_path": 1.0}, r"model\.drop_path=1\.0: must be less than 1"),
        ({"mlp_ratio": -2.0}, r"model\.mlp_ratio=-2\.0"),
        ({"head_channels": 0}, r"model\.head_channels=0"),
        ({"noise_std": -1.0}, r"model\.noise_std=-1\.0"),
        ({"sigma": 0.0}, r"model\.sigma=0\.0"),
        ({"selection_weight": -0.1}, r"model\.selection_weight=-0\.1"),
        ({"reconstruction_weight": math.nan}, r"model\.reconstruction_weight=nan"),
    ],
)
def test_a_configuration_that_cannot_work_is_named(fields, named):
    with pytest.raises(ValueError, match=named):
        CMPose(small_config(**fields))


def test_clips_of_another_shape_are_named():
    model = build()
    with pytest.raises(ValueError, match=r"clips has shape .*expected \[B, 3, 3, 64, 48\]"):
        model(torch.zeros(1, 2, 3, 64, 48))
    with pytest.raises(ValueError, match=r"model\.image_size"):
        model(torch.zeros(1, 3, 3, 32, 48))


@pytest.mark.parametrize(
    ("backbone", "millions"), [("small", 22), ("base", 86), ("large", 303), ("huge", 631)]
)
def test_backbones_have_the_sizes_of_vitpose(backbone, millions):
    with torch.device("meta"):
        model = CMPose(ModelConfig(backbone=backbone))
    count = sum(p.numel() for p in model.backbone.parameters()) / 1e6
    assert count == pytest.approx(millions, rel=0.02)
    names = set(model.backbone.state_dict())
    assert {"pos_embed", "patch_embed.proj.weight", "last_norm.bias"} <= names
    assert {"blocks.11.attn.qkv.weight", "blocks.0.mlp.fc2.bias"} <= names
    assert model.backbone.pos_embed.shape[1] == 193


def test_patch_embedding_is_the_strided_convolution_with_padding_2():
    model = build(stem="patch")
    image = torch.randn(1, 3, 64, 48)
    tokens = model.backbone.patch_embed(image)
    padded = torch.nn.functional.pad(image, (2, 2, 2, 2))
    weight = model.backbone.patch_embed.proj.weight
    patch = padded[0, :, 16:32, 32:48]  # row 1, column 2 of the 4×3 grid
    expected = (weight * patch).sum((1, 2, 3)) + model.backbone.patch_embed.proj.bias
    torch.testing.assert_close(tokens[0, 1 * 3 + 2], expected, rtol=1e-4, atol=1e-4)


def test_bernoulli_drop_path_drops_whole_samples_and_keeps_the_mean():
    from cmpose.models.vit import DropPath

    fields = {"depth": 3, "drop_path": 0.5, "drop_path_selection": "bernoulli"}
    backbone = build(**fields).backbone  # rates 0, 0.25, 0.5
    drawn = backbone.draw_kept(seed_tensor(), 0, 1000, 3)
    assert drawn.shape == (3, 2, 3000)
    assert drawn[0].all()
    for block, rate in ((1, 0.25), (2, 0.5)):
        for branch in range(2):
            assert drawn[block, branch].float().mean() == pytest.approx(1 - rate, abs=0.04)
    assert not torch.equal(drawn[2, 0], drawn[2, 1])
    assert not torch.equal(drawn, backbone.draw_kept(seed_tensor(8), 0, 1000, 3))
    second_half = backbone.draw_kept(seed_tensor(), 500, 500, 3)
    assert torch.equal(second_half, drawn[:, :, 1500:])
    drop, mask = DropPath(0.25), drawn[1, 0]
    dropped = drop(torch.zeros(3000, 3), torch.ones_like, mask)
    assert torch.equal(dropped.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert torch.equal(dropped > 0, mask[:, None].expand(-1, 3))


@pytest.mark.parametrize("selection", ["exact", "bernoulli"])
def test_drop_path_acts_in_training_with_a_seed_only(selection):
    model = build(depth=3, drop_path=0.9, stem="patch", drop_path_selection=selection)
    x = clips(2, model.config)
    with torch.no_grad():
        trained = model(x, seed_tensor()).coarse.features
        assert not torch.equal(trained, model(x, seed_tensor(8)).coarse.features)
        assert torch.equal(trained, model(x, seed_tensor()).coarse.features)
        if selection == "bernoulli":  # however the batch is divided
            half = model(x[1:], seed_tensor(), 1).coarse.features
            torch.testing.assert_close(trained[1:], half, rtol=1e-4, atol=1e-5)
        plain = model(x).coarse.features
        assert not torch.equal(trained, plain)
        model.eval()
        assert torch.equal(model(x, seed_tensor()).coarse.features, model(x).coarse.features)


def smoothen(model):
    """GELU for ReLU, whose derivative jumps: an input that rounding turns over gets another one."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.GELU())


def gradients_in(model, dtype):
    """Those of the weights for clips of ``dtype``, which all outputs have to have."""
    model.zero_grad()
    output = model(clips(2, model.config).to(dtype), seed_tensor())
    assert output.heatmaps.dtype == output.coarse.features.dtype == dtype
    assert output.coarse.mask.prediction.dtype == dtype
    centers, weight = torch.full((2, 2, 2), 5.0), torch.ones(2, 2)
    cmpose_loss(output, centers, weight, model.config).total.backward()
    return {n: p.grad for n, p in model.named_parameters()}


@pytest.mark.parametrize(("head", "selection"), [("deconv", "bernoulli"), ("token", "exact")])
def test_the_clips_dtype_is_the_computations_and_weights_stay_float32(head, selection):
    """bfloat16 differs from float32 by its rounding only; no product or norm is promoted.

    The bound is twice what weights do that are off by as much as bfloat16 rounds: that alone
    changes gradients about as much as bfloat16 does, whichever weights were drawn.
    """
    model = build(head=head, fine="off", depth=2, drop_path=0.2, drop_path_selection=selection)
    gradients_in(model, torch.bfloat16)
    smoothen(model)
    wide, narrow = gradients_in(model, torch.float32), gradients_in(model, torch.bfloat16)
    assert {g.dtype for g in narrow.values()} == {torch.float32}
    rounding = torch.finfo(torch.bfloat16).eps / 2
    with torch.no_grad():
        for weights in model.parameters():
            weights *= 1 + rounding * (2 * torch.rand_like(weights) - 1)
    off = gradients_in(model, torch.float32)
    for name in ("coarse.fusion.linear.weight", "backbone.blocks.0.mlp.fc1.weight"):
        bound = 2 * (off[name] - wide[name]).norm()
        assert bound < 0.05 * wide[name].norm(), name
        assert (narrow[name] - wide[name]).norm() < bound, name
