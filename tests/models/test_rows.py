"""What is not computed changes nothing: losses and gradients of the whole, in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from cmpose.models import coarse, rows
from cmpose.models.coarse import CoarseLearning, Reconstruction
from cmpose.models.losses import cmpose_loss
from tests.models.builders import build, clips, seed_tensor

VARIANTS = {
    "full": {},
    "noise alone": {"mask_task": False},
    "masks alone": {"denoise_task": False},
    "other ratios": {"mask_ratio": 0.2, "noise_ratio": 1.0},
    "nothing masked": {"mask_ratio": 0.0},
    "no fine": {"fine": "off"},
    "no fine, deeper": {"fine": "off", "criss_cross_depth": 2},
    "no tasks, no fine": {"fine": "off", "mask_task": False, "denoise_task": False},
    "no fine, bernoulli": {"fine": "off", "corruption": "bernoulli"},
    "token head, no fine": {"fine": "off", "head": "token"},
    "positions first": {"positions_after_corruption": False},
    "target learns": {"detach_target": False},
    "deeper, own pathways": {"criss_cross_depth": 2, "share_pathways": False},
    "recomputed": {"criss_cross_depth": 2, "checkpoint_activations": True},
    "stochastic depth": {"depth": 3, "drop_path": 0.7, "stem": "patch"},
}


def every_branch(
    self: CoarseLearning, x: Tensor, corrupted: list[Tensor]
) -> tuple[Tensor, list[Reconstruction]]:
    """Each branch by itself, all of its tokens."""
    clean, *others = (self.criss_cross(branch) for branch in x)
    N = corrupted[0].shape[2]
    restored = zip(others, corrupted, strict=True)
    return clean, [Reconstruction(other[:, :, :N], flags, None) for other, flags in restored]


def every_sample(x: Tensor, branch: Callable[[Tensor], Tensor], kept: Tensor) -> Tensor:
    """Each sample's branch, multiplied by 0 where it is dropped."""
    factor = torch.zeros(len(x), 1, 1, 1, dtype=x.dtype)
    factor[kept] = len(x) / len(kept)
    return x + branch(x) * factor


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_and_gradients_are_those_of_the_whole(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(CoarseLearning, "_restore", every_branch)
            monkeypatch.setattr(coarse, "reads", lambda *_, **__: rows.Reads())
            monkeypatch.setattr(rows, "add_for_kept", every_sample)
        model = build(**VARIANTS[name]).double()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.1)
        images = clips(3, model.config).double()
        centers, weight = torch.full((3, 2, 2), 5.0).double(), torch.ones(3, 2).double()
        losses = cmpose_loss(model(images, seed_tensor()), centers, weight, model.config)
        losses.total.backward()
        with torch.no_grad():
            inferred = model.eval()(images).heatmaps
        gradients = [p.grad for p in model.parameters()]
        results.append([*(term.detach() for term in losses), inferred, *gradients])
    assert results[0][0] > 0
    largest = max(float(whole.abs().max()) for whole in results[1])
    for fast, whole in zip(*results, strict=True):
        # The exact gradient of the keys' bias is 0.
        atol = max(1e-12 * float(whole.abs().max()), 1e-15 * largest)
        torch.testing.assert_close(fast, whole, rtol=1e-11, atol=atol)


def test_what_is_not_read_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of the last blocks' MLPs and of the first projections, for 2 clips of 3 × 14 slots."""
    counts: dict[str, list[int]] = {}

    def count(of: nn.Module, name: str) -> None:
        of.register_forward_hook(
            lambda _, x, __: counts.setdefault(name, []).append(x[0][..., 0].numel())
        )

    projected = rows.spread
    monkeypatch.setattr(
        "cmpose.models.fused.spread",
        lambda x, distinct: counts.setdefault("qkv", []).append(len(x)) or projected(x, distinct),
    )
    model = build()
    network = model.coarse.criss_cross
    count(network.first.spatial[0].mlp, "spatial")
    count(network.first.temporal[0].mlp, "temporal")
    count(network.fuse_first, "fused")
    model(clips(2, model.config), seed_tensor())
    every, clean, corrupted = 3 * 2 * 42, 2 * 42, 2 * 16  # round(0.45 · 36) = 16 of a clip
    assert sorted(counts["spatial"]) == sorted(counts["temporal"]) == [clean + 2 * corrupted, every]
    assert counts["fused"] == [clean + 2 * corrupted]
    assert counts["qkv"] == [clean + corrupted + 42] * 2  # masked tokens are alike in all clips
    counts.clear()
    model = build(fine="off").eval()
    network = model.coarse.criss_cross
    count(network.first.temporal[0].mlp, "temporal")
    count(network.fuse_first, "fused")
    assert model(clips(2, model.config)).coarse.keypoint_tokens.shape == (2, 0, 192)
    assert sorted(counts["temporal"]) == [2 * 36, 2 * 42]
    assert counts["fused"] == [2 * 36]


def test_stochastic_depth_keeps_a_count_and_the_expectation() -> None:
    backbone = build(depth=3, drop_path=0.5).backbone  # rates 0, 0.25, 0.5
    x = torch.ones(6, 1, 1, 1)

    def branch(samples: Tensor) -> Tensor:
        computed.append(len(samples))
        return 2.0 * samples

    for block, count in ((0, 6), (1, 4), (2, 3)):
        computed: list[int] = []
        total = torch.zeros(6)
        for seed in range(200):
            drawn = backbone.draw_kept(seed_tensor(seed), 0, 2, 3)
            assert drawn.shape == (3, 2, 6)
            assert torch.equal(drawn.sort(-1).values, torch.arange(6).expand(3, 2, 6))
            total += backbone.blocks[block].drop_path(x, branch, drawn[block, 0]).flatten()
        assert set(computed) == {count}
        # 3 = 1 + 2; what is added is 2 · 6/count with probability count/6.
        deviation = 2 * ((6 - count) / count / 200) ** 0.5
        assert (total / 200 - 3).abs().max() < 4 * deviation + 1e-6
    assert not torch.equal(drawn[1], drawn[2])
    assert not torch.equal(drawn[:, 0], drawn[:, 1])
    assert not torch.equal(drawn, backbone.draw_kept(seed_tensor(199), 2, 2, 3))
    assert torch.equal(drawn, backbone.draw_kept(seed_tensor(199), 0, 2, 3))


@pytest.mark.parametrize(("samples", "rate", "count"), [(96, 0.3, 67), (3, 0.1, 3), (3, 0.9, 1)])
def test_how_many_samples_are_kept(samples: int, rate: float, count: int) -> None:
    """⌊(1 − p) · B · T⌉, but never none: then nothing could make up for what is dropped."""
    assert rows.kept_count(samples, rate) == count
