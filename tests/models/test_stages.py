"""The parts of the model against what the paper's equations say."""

from __future__ import annotations

import pytest
import torch

from cmpose.models.coarse import TemporalFusion
from cmpose.models.criss_cross import CrissCross
from cmpose.models.fine import FineTokenEnhancement, gather_tokens, score_heatmaps
from cmpose.models.losses import cmpose_loss
from tests.models.builders import build, clips, seed_tensor, small_config


def test_temporal_fusion_starts_by_passing_the_key_frame():
    fusion = TemporalFusion(4, 3)
    fusion.reset()
    x = torch.randn(2, 3, 5, 4)
    torch.testing.assert_close(fusion(x), x[:, 1])


def test_spatial_attention_stays_in_a_frame_and_temporal_in_a_slot():
    torch.manual_seed(0)
    network = CrissCross(8, 2, small_config()).double()
    x = torch.randn(1, 3, 5, 8, dtype=torch.float64)
    changed = x.clone()
    changed[0, 0, 0, 0] += 1.0  # one channel: layer norm would not see a shift of all
    spatial = network.first.spatial[0]
    moved = (spatial(changed) - spatial(x)).abs().sum(-1)[0] > 1e-9
    assert moved[0].all()
    assert not moved[1:].any()
    temporal = network.first.temporal[0]
    moved = (temporal(changed) - temporal(x)).abs().sum(-1)[0] > 1e-9
    assert moved[:, 0].all()
    assert not moved[:, 1:].any()


def test_fine_tokens_stand_in_their_cells():
    torch.manual_seed(0)
    stage = FineTokenEnhancement(16, small_config())
    tokens, keypoints = torch.randn(2, 12, 16), torch.randn(2, 2, 16)
    output = stage(tokens, keypoints)
    assert output.fine.shape == (2, 4 + 3, 16)
    causal, rest = output.selection.causal, output.selection.noncausal
    assert torch.equal(torch.cat([causal, rest], 1).sort(1).values, torch.arange(12).expand(2, -1))
    torch.testing.assert_close(gather_tokens(output.grid, causal), output.fine[:, :4])
    merged = gather_tokens(output.fine[:, 4:], output.clusters.assignment)
    torch.testing.assert_close(gather_tokens(output.grid, rest), merged)
    torch.testing.assert_close(gather_tokens(tokens, causal), output.fine[:, :4])


def test_merged_token_is_the_importance_weighted_mean_of_its_cluster():
    torch.manual_seed(0)
    stage = FineTokenEnhancement(16, small_config())
    tokens, keypoints = torch.randn(1, 12, 16), torch.randn(1, 2, 16)
    output = stage(tokens, keypoints)
    scores = output.selection.scores
    torch.testing.assert_close(scores.sum(-1), torch.ones(1, 2))
    for cluster in range(3):
        member = output.selection.noncausal[0][output.clusters.assignment[0] == cluster]
        weight = scores[0].mean(0)[member]
        expected = (weight[:, None] * tokens[0, member]).sum(0) / weight.sum()
        torch.testing.assert_close(output.fine[0, 4 + cluster], expected)


@pytest.mark.parametrize("sharpness", [30.0, 60.0, 90.0, 120.0, 240.0, 1e4])
def test_tokens_that_no_keypoint_attends_keep_finite_gradients(sharpness):
    """All of the softmax on the causal tokens: the others' importance underflows."""
    torch.manual_seed(0)
    stage = FineTokenEnhancement(16, small_config())
    with torch.no_grad():
        stage.query.weight.copy_(torch.eye(16))
        stage.key.weight.copy_(torch.eye(16) * sharpness)
    tokens, keypoints = torch.randn(8, 12, 16, requires_grad=True), torch.randn(8, 2, 16)
    output = stage(tokens, keypoints)
    output.fine.square().sum().backward()
    for gradient in (tokens.grad, *(p.grad for p in stage.parameters())):
        assert gradient.isfinite().all()
    if sharpness == 1e4:
        rest = gather_tokens(tokens, output.selection.noncausal)
        member = torch.nn.functional.one_hot(output.clusters.assignment, 3).float()
        mean = member.mT @ rest / member.sum(1)[..., None]
        torch.testing.assert_close(output.fine[:, 4:], mean)


def test_causal_only_empties_the_other_cells():
    torch.manual_seed(0)
    stage = FineTokenEnhancement(16, small_config(fine="causal_only"))
    output = stage(torch.randn(1, 12, 16), torch.randn(1, 2, 16))
    assert output.clusters is None
    assert (gather_tokens(output.grid, output.selection.noncausal) == 0).all()
    torch.testing.assert_close(gather_tokens(output.grid, output.selection.causal), output.fine)


def test_selection_term_is_what_teaches_the_scores():
    centers, weight = torch.tensor([[[2.0, 3.0], [9.0, 12.0]]]), torch.ones(1, 2)
    for mu in (0.0, 0.1):
        model = build(fine="causal_only", selection_weight=mu)
        cmpose_loss(model(clips(1, model.config)), centers, weight, model.config).total.backward()
        gradient = model.fine.query.weight.grad
        assert (gradient is not None and bool(gradient.abs().sum() > 0)) is (mu > 0)


def test_scores_are_enlarged_to_heatmaps():
    scores = torch.zeros(1, 2, 12)
    scores[0, 1, 3 * 1 + 2] = 1.0  # row 1, column 2 of the 4×3 grid
    heatmaps = score_heatmaps(scores, (4, 3), (16, 12))
    assert heatmaps.shape == (1, 2, 16, 12)
    assert not heatmaps[0, 0].any()
    assert 0.5 < heatmaps[0, 1].max() <= 1.0
    peak = heatmaps[0, 1].flatten().argmax().item()
    assert peak // 12 in range(4, 8)
    assert peak % 12 in range(8, 12)


def test_loss_is_the_weighted_sum_of_equation_14():
    model = build(reconstruction_weight=0.3, selection_weight=0.2)
    output = model(clips(2, model.config), seed_tensor())
    losses = cmpose_loss(output, torch.full((2, 2, 2), 5.0), torch.ones(2, 2), model.config)
    expected = losses.pose + 0.3 * (losses.mask + losses.noise) + 0.2 * losses.selection
    torch.testing.assert_close(losses.total, expected)
    # An untrained head draws next to nothing: a joint costs about πσ² = 12.6.
    assert float(losses.pose.detach()) == pytest.approx(12.6, rel=0.05)


def test_pose_losses_of_parts_add_up_to_the_whole():
    model = build(mask_task=False, denoise_task=False).eval()
    x = clips(4, model.config)
    centers = torch.rand(4, 2, 2) * 10
    weight = torch.tensor([[1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [1.0, 0.0]])
    whole = cmpose_loss(model(x), centers, weight, model.config).pose
    parts = [
        cmpose_loss(model(x[i]), centers[i], weight[i], model.config, joints=weight.sum() / 2).pose
        for i in (slice(0, 2), slice(2, 4))
    ]
    torch.testing.assert_close(sum(parts) / 2, whole)
