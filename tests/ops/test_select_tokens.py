from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from cmpose import ops


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def split_by_hand(scores: list[list[float]], n: int) -> tuple[list[int], list[int]]:
    """One clip, sorted by the documented key."""
    count = len(scores[0])
    best_rank = [count] * count
    for row in scores:
        for rank, token in enumerate(sorted(range(count), key=lambda i: (-row[i], i))):
            best_rank[token] = min(best_rank[token], rank)
    key = [(best_rank[i], -max(row[i] for row in scores), i) for i in range(count)]
    chosen = sorted(range(count), key=lambda i: key[i])[: n * len(scores)]
    return sorted(chosen), [i for i in range(count) if i not in chosen]


@pytest.mark.parametrize(
    ("keypoints", "tokens", "n"), [(1, 1, 1), (3, 17, 2), (15, 61, 4), (4, 8, 2)]
)
def test_split(keypoints: int, tokens: int, n: int) -> None:
    logits = random(5, keypoints, tokens)
    selection = ops.select_tokens(logits, n)
    for b, scores in enumerate(logits.softmax(dim=-1).tolist()):
        causal, noncausal = split_by_hand(scores, n)
        assert selection.causal[b].tolist() == causal
        assert selection.noncausal[b].tolist() == noncausal


@pytest.mark.parametrize("seed", range(5))
def test_split_with_ties(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(0, 3, (6, 4, 19), generator=generator).double()
    selection = ops.select_tokens(logits, 3)
    for b in range(6):
        # Scores that are equal in exact arithmetic can differ in the last bit from row to row.
        scores = [[round(s, 12) for s in row] for row in logits[b].softmax(dim=-1).tolist()]
        causal, _ = split_by_hand(scores, 3)
        assert selection.causal[b].tolist() == causal


def test_by_hand() -> None:
    """Both keypoints like token 2 best; token 0 and 4 are second; n = 1 wants two tokens."""
    logits = torch.tensor([[[1.0, 0.0, 9.0, 0.0, 0.5], [0.0, 0.0, 9.0, 0.5, 3.0]]])
    selection = ops.select_tokens(logits, 1)
    # Best ranks: 1, 2 (the lower index of a tie), 0, 2 (third for the second keypoint), 1. Token 4
    # has the higher score of the two seconds.
    assert selection.causal.tolist() == [[2, 4]]
    assert selection.noncausal.tolist() == [[0, 1, 3]]


def test_equal_logits_go_by_index() -> None:
    selection = ops.select_tokens(torch.zeros(2, 3, 10), 2)
    assert selection.causal.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert selection.noncausal.tolist() == [[6, 7, 8, 9]] * 2


def test_every_keypoints_top_n_is_causal() -> None:
    logits = random(4, 15, 192)
    causal = ops.select_tokens(logits, 4).causal
    for b in range(4):
        assert set(logits[b].topk(4).indices.flatten().tolist()) <= set(causal[b].tolist())


def test_all_tokens_causal() -> None:
    selection = ops.select_tokens(random(2, 3, 6), 2)
    assert torch.equal(selection.causal, torch.arange(6).expand(2, 6))
    assert selection.noncausal.shape == (2, 0)


def test_scores_that_underflow_still_rank() -> None:
    """Softmax gives 0 to all tokens but the first; their logits still rank them."""
    logits = torch.tensor([[[500.0, 0.0, 1.0, 3.0, 2.0]]])
    selection = ops.select_tokens(logits, 3)
    assert selection.scores.tolist() == [[[1, 0, 0, 0, 0]]]
    assert selection.causal.tolist() == [[0, 3, 4]]


def test_scores_and_importance() -> None:
    logits = random(2, 3, 7)
    mean, largest = (ops.select_tokens(logits, 1, importance=i) for i in ("mean", "max"))
    torch.testing.assert_close(mean.scores, logits.softmax(dim=-1))
    torch.testing.assert_close(mean.importance, logits.softmax(dim=-1).mean(dim=1))
    torch.testing.assert_close(largest.importance, logits.softmax(dim=-1).amax(dim=1))
    assert torch.equal(mean.causal, largest.causal)


def test_gradcheck_of_the_largest_score() -> None:
    logits = random(2, 3, 7).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ops.select_tokens(x, 1, importance="max")[:2], (logits,)
    )
    assert not ops.select_tokens(logits, 1).causal.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_splits_as_the_same_numbers_do_in_float64(dtype: torch.dtype) -> None:
    logits = random(8, 15, 192).to(dtype)
    selection, expected = ops.select_tokens(logits, 4), ops.select_tokens(logits.double(), 4)
    assert torch.equal(selection.causal, expected.causal)
    assert selection.scores.dtype == selection.importance.dtype == dtype


def test_errors() -> None:
    logits = random(2, 3, 7)
    with pytest.raises(ValueError, match=r"^n must be between 1 and 2 .*, got 0"):
        ops.select_tokens(logits, 0)
    with pytest.raises(
        ValueError, match=r"^n must be between 1 and 2 \(n·K must not exceed N\), got 3"
    ):
        ops.select_tokens(logits, 3)
    with pytest.raises(ValueError, match=r"importance must be one of mean, max, got 'sum'"):
        ops.select_tokens(logits, 1, importance="sum")
    with pytest.raises(ValueError, match=r"logits must have shape \[B, K, N\]"):
        ops.select_tokens(logits[0], 1)
    with pytest.raises(ValueError, match=r"logits must have 1 ≤ K ≤ N in .*, got \[2, 0, 7\]"):
        ops.select_tokens(logits[:, :0], 1)
    logits[0, 0, 0] = math.nan
    with pytest.raises(ValueError, match=r"logits must not be NaN"):
        ops.select_tokens(logits, 1)
