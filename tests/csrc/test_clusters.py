"""The CUDA kernels of merge_clusters, unmerge_tokens and select_tokens, beyond the op contract.

Sizes for each path through the sources, bad labels, mixed dtypes, unaligned tensors.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cmpose import native, ops
from tests.ops.support.assertions import assert_as_close_as_eager
from tests.ops.support.cases import DEVICE, Split

pytestmark = [
    pytest.mark.sanitized,
    pytest.mark.skipif(
        ops.available("merge_clusters", DEVICE)["cuda"] is not None,
        reason=str(ops.available("merge_clusters", DEVICE)["cuda"]),
    ),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def clustering_inputs(
    batch: int, size: int, width: int, clusters: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(batch, size, width, generator=generator).to(dtype)
    weights = torch.rand(batch, size, generator=generator) + 0.1
    assignment = torch.randint(0, clusters, (batch, size), generator=generator)
    return tokens.to(DEVICE), weights.to(DEVICE), assignment.to(DEVICE)


def merge(
    tokens: Tensor,
    weights: Tensor,
    assignment: Tensor,
    clusters: int,
    backend: str,
    dtype: torch.dtype,
    normalize: bool,
) -> list[Tensor]:
    """Merged tokens and the gradients, with everything but the assignment in ``dtype``."""
    inputs = [tokens.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_()]
    merged = ops.merge_clusters(*inputs, assignment, clusters, normalize=normalize, backend=backend)
    ramp = torch.linspace(-1, 2, merged.numel(), dtype=torch.float64).reshape(merged.shape)
    return [merged.detach(), *torch.autograd.grad(merged, inputs, ramp.to(merged))]


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("size", "width", "clusters"),
    [
        (192, 256, 7),  # a block sorts the clip's tokens by itself
        (256, 8, 1024),
        (257, 24, 60),  # the order is made once
        (40, 16, 5000),  # likewise, since its clusters are too many for a block
    ],
)
def test_merge_of_every_way(
    size: int, width: int, clusters: int, dtype: torch.dtype, normalize: bool
) -> None:
    tokens, weights, assignment = clustering_inputs(2, size, width, clusters, dtype)
    weights = weights.to(dtype)
    arguments = tokens, weights, assignment, clusters
    actual = merge(*arguments, "cuda", dtype, normalize)
    eager = merge(*arguments, "reference", dtype, normalize)
    exact = merge(*arguments, "reference", torch.float64, normalize)
    for a, b, c in zip(actual, eager, exact, strict=True):
        assert_as_close_as_eager(a, b, c, reduction=max(size, width))


@pytest.mark.parametrize("width", [72, 33])
@pytest.mark.parametrize("size", [190, 389])
def test_sums_are_in_index_order(size: int, width: int) -> None:
    """Bit for bit, also in a cluster with most of the tokens, which spans several tiles."""
    tokens, _, assignment = clustering_inputs(2, size, width, 9)
    assignment[1, torch.rand(size, generator=torch.Generator().manual_seed(1)) < 0.8] = 5
    weights = torch.ones(2, size, device=DEVICE)
    merged = ops.merge_clusters(tokens, weights, assignment, 11, normalize=False, backend="cuda")
    expected = torch.zeros(2, 11, width, device=DEVICE)
    for b in range(2):
        for token, cluster in zip(tokens[b], assignment[b].tolist(), strict=True):
            expected[b, cluster] += token
    assert torch.equal(merged, expected)


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_weights_of_another_dtype(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    tokens, weights, assignment = clustering_inputs(2, 50, 24, 5, dtype)
    weights = weights.to(weight_dtype)
    results = []
    for backend in ("cuda", "reference"):
        inputs = [tokens.clone().requires_grad_(), weights.clone().requires_grad_()]
        merged = ops.merge_clusters(*inputs, assignment, 5, backend=backend)
        gradients = torch.autograd.grad(merged.float().square().sum(), inputs)
        assert [g.dtype for g in gradients] == [dtype, weight_dtype]
        results.append([merged.detach(), *gradients])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("inputs", ["tokens", "weights"])
def test_one_gradient_alone(inputs: str) -> None:
    tokens, weights, assignment = clustering_inputs(2, 50, 24, 5)
    leaf = (tokens if inputs == "tokens" else weights).requires_grad_()
    merged = ops.merge_clusters(tokens, weights, assignment, 5, backend="cuda")
    expected = ops.merge_clusters(tokens, weights, assignment, 5, backend="reference")
    (a,) = torch.autograd.grad(merged.square().sum(), leaf)
    (b,) = torch.autograd.grad(expected.square().sum(), leaf)
    torch.testing.assert_close(a, b)


def test_weights_that_cancel_and_empty_clusters() -> None:
    """A cluster that is empty, or whose weights sum to 0, is 0 and has no gradient."""
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 5.0], [7.0, 11.0]]], device=DEVICE)
    weights = torch.tensor([[2.0, -2.0, 0.5]], device=DEVICE)
    assignment = torch.tensor([[1, 1, 3]], device=DEVICE)
    tokens.requires_grad_()
    weights.requires_grad_()
    merged = ops.merge_clusters(tokens, weights, assignment, 4, backend="cuda")
    assert merged.tolist() == [[[0, 0], [0, 0], [0, 0], [7, 11]]]
    d_tokens, d_weights = torch.autograd.grad(merged.sum(), (tokens, weights))
    assert d_tokens.tolist() == [[[0, 0], [0, 0], [1, 1]]]
    assert d_weights.tolist() == [[0, 0, 0]]
    plain = ops.merge_clusters(tokens, weights, assignment, 4, normalize=False, backend="cuda")
    assert plain.tolist() == [[[0, 0], [-4, -6], [0, 0], [3.5, 5.5]]]


def test_weights_whose_sum_has_no_reciprocal_in_float32() -> None:
    tokens = torch.tensor([[[1.0], [3.0]]], device=DEVICE, requires_grad=True)
    weights = torch.full((1, 2), 1e-39, device=DEVICE)
    assignment = torch.zeros(1, 2, dtype=torch.int64, device=DEVICE)
    merged = ops.merge_clusters(tokens, weights, assignment, 1, backend="cuda")
    assert merged.item() == 2.0
    (d_tokens,) = torch.autograd.grad(merged.sum(), tokens)
    assert d_tokens.tolist() == [[[0.5], [0.5]]]


@pytest.mark.parametrize("size", [30, 270])
def test_labels_out_of_range_belong_to_no_cluster(size: int) -> None:
    """Undefined, but nothing is read or written out of bounds, and other clusters are right."""
    tokens, weights, assignment = clustering_inputs(1, size, 16, 6)
    bad = assignment.clone()
    bad[0, 3], bad[0, 7] = -1, 2**40
    valid = [i for i in range(size) if i not in (3, 7)]
    with ops.without_value_checks():
        actual = ops.merge_clusters(tokens, weights, bad, 6, backend="cuda")
    expected = ops.merge_clusters(
        tokens[:, valid], weights[:, valid], assignment[:, valid], 6, backend="cuda"
    )
    assert torch.equal(actual, expected)
    tokens.requires_grad_()
    with ops.without_value_checks():
        merged = ops.merge_clusters(tokens, weights, bad, 6, backend="cuda")
    (gradient,) = torch.autograd.grad(merged.sum(), tokens)
    assert (gradient[0, [3, 7]] == 0).all()


def test_nan_stays_in_its_cluster() -> None:
    tokens, weights, assignment = clustering_inputs(1, 40, 16, 4)
    tokens[0, 11] = float("nan")
    merged = ops.merge_clusters(tokens, weights, assignment, 4, backend="cuda")
    mine = int(assignment[0, 11])
    assert merged[0, mine].isnan().all()
    assert merged[0, [c for c in range(4) if c != mine]].isfinite().all()


def unaligned(tensor: Tensor) -> Tensor:
    """The same numbers, contiguous, but starting one number after a multiple of 16 bytes."""
    padded = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return padded[1:].copy_(tensor.flatten()).view(tensor.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_tensors(dtype: torch.dtype) -> None:
    tokens, weights, assignment = clustering_inputs(2, 50, 32, 5, dtype)
    shifted = unaligned(tokens)
    assert shifted.is_contiguous()
    assert shifted.data_ptr() % 16 != 0
    for call in (
        lambda f: ops.merge_clusters(f, weights, assignment, 5, backend="cuda"),
        lambda f: ops.dpc_knn_merge(f, weights, 3, 5, backend="cuda")[1],
        lambda f: ops.unmerge_tokens(
            f[:, :20], f[:, 20:25], split(2, 20, 30), assignment[:, :30], backend="cuda"
        ),
    ):
        assert torch.equal(call(shifted), call(tokens))


def split(batch: int, causal: int, noncausal: int) -> Split:
    order = torch.rand(batch, causal + noncausal, generator=torch.Generator().manual_seed(4))
    order = order.argsort(dim=1).to(DEVICE)
    return Split(order[:, :causal].sort(1).values, order[:, causal:].sort(1).values)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("causal", "noncausal", "width"), [(0, 9, 8), (3, 300, 16), (60, 132, 40)])
def test_unmerge_of_every_way(causal: int, noncausal: int, width: int, dtype: torch.dtype) -> None:
    selection = split(2, causal, noncausal)
    own, merged, assignment = (
        clustering_inputs(2, causal, width, 1, dtype)[0],
        clustering_inputs(2, 7, width, 1, dtype)[0],
        clustering_inputs(2, noncausal, 1, 7)[2],
    )
    results = []
    for backend, kind in (("cuda", dtype), ("reference", dtype), ("reference", torch.float64)):
        inputs = [own.to(kind).requires_grad_(), merged.to(kind).requires_grad_()]
        grid = ops.unmerge_tokens(*inputs, selection, assignment, backend=backend)
        ramp = torch.linspace(-1, 2, grid.numel(), dtype=torch.float64).reshape(grid.shape)
        gradients = torch.autograd.grad(grid, inputs, ramp.to(dtype).to(grid))
        results.append([grid.detach(), *gradients])
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert_as_close_as_eager(*(r[2] for r in results), reduction=noncausal)


def test_unmerge_with_indices_out_of_range() -> None:
    """Undefined, but never out of bounds."""
    own, merged, assignment = torch.ones(1, 2, 8), torch.ones(1, 3, 8), torch.tensor([[0, 9, -1]])
    selection = Split(torch.tensor([[0, 77]]), torch.tensor([[1, 2, -5]]))
    tensors = [t.to(DEVICE) for t in (own, merged, assignment)]
    selection = Split(selection.causal.to(DEVICE), selection.noncausal.to(DEVICE))
    tensors[0].requires_grad_()
    tensors[1].requires_grad_()
    with ops.without_value_checks():
        grid = ops.unmerge_tokens(*tensors[:2], selection, tensors[2], backend="cuda")
        gradients = torch.autograd.grad(grid[:, :2].sum(), tensors[:2])
    assert grid.shape == (1, 5, 8)
    assert (grid[0, :2] == 1).all()
    assert (gradients[0][0, 0] == 1).all()


@pytest.mark.parametrize("importance", ["mean", "max"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [90, 523])
def test_select_tokens_with_ties(size: int, importance: str, dtype: torch.dtype) -> None:
    """Whole numbers as logits, with 0 and -0: many are equal, within rows and between them. More
    than 256 tokens are sorted in several parts."""
    generator = torch.Generator().manual_seed(5)
    logits = torch.randint(-2, 3, (3, 9, size), generator=generator).to(dtype)
    logits[..., ::2] *= -1
    logits = logits.to(DEVICE)
    results = []
    for backend in ("cuda", "reference"):
        leaf = logits.clone().requires_grad_()
        selection = ops.select_tokens(leaf, 4, importance=importance, backend=backend)
        total = (
            selection.scores.float().square().sum() + selection.importance.float().square().sum()
        )
        results.append([*(t.detach() for t in selection), *torch.autograd.grad(total, leaf)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("which", ["scores", "importance"])
def test_select_tokens_with_one_gradient(which: str) -> None:
    logits = torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(6)).to(DEVICE)
    gradients = []
    for backend in ("cuda", "auto", "reference"):
        leaf = logits.clone().requires_grad_()
        out = getattr(ops.select_tokens(leaf, 2, backend=backend), which)
        gradients.append(torch.autograd.grad(out.square().sum(), leaf)[0])
    torch.testing.assert_close(gradients[0], gradients[2])
    torch.testing.assert_close(gradients[1], gradients[2])


def test_no_channels_are_refused() -> None:
    tokens, weights, assignment = clustering_inputs(2, 20, 0, 3)
    with pytest.raises(ValueError, match=r"^tokens"):
        ops.merge_clusters(tokens, weights, assignment, 3, backend="cuda")


def test_select_tokens_with_nan() -> None:
    """Some split: every index once, in ascending order."""
    logits = torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    logits[0, 2, 7] = float("nan")
    logits[1] = float("nan")
    with ops.without_value_checks():
        selection = ops.select_tokens(logits, 2, backend="cuda")
    for causal, noncausal in zip(selection.causal, selection.noncausal, strict=True):
        assert (causal.diff() > 0).all()
        assert (noncausal.diff() > 0).all()
        together = torch.cat([causal, noncausal]).sort().values
        assert torch.equal(together.cpu(), torch.arange(30))


def test_the_most_logits_that_fit() -> None:
    logits = torch.randn(1, 10, 1024, generator=torch.Generator().manual_seed(7)).to(DEVICE)
    actual = ops.select_tokens(logits, 3, backend="cuda")
    expected = ops.select_tokens(logits, 3, backend="reference")
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("order", ["backward", "5"])
@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU orders its threads by itself")
def test_the_order_of_threads_does_not_matter(order: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def everything() -> list[Tensor]:
        tokens, weights, assignment = clustering_inputs(2, 60, 24, 6)
        tokens.requires_grad_()
        logits = torch.randn(2, 5, 67, generator=torch.Generator().manual_seed(8)).requires_grad_()
        selection = ops.select_tokens(logits, 1, backend="cuda")
        merged = ops.merge_clusters(tokens, weights, assignment, 6, backend="cuda")
        long = clustering_inputs(1, 270, 8, 6)
        grid = ops.unmerge_tokens(
            tokens[:, :5], merged, split(2, 5, 60), assignment, backend="cuda"
        )
        total = grid.square().sum() + selection.scores.square().sum()
        gradients = torch.autograd.grad(total, (tokens, logits))
        return [*selection, merged, grid, *gradients, ops.merge_clusters(*long, 6, backend="cuda")]

    expected = everything()
    monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
    for a, b in zip(everything(), expected, strict=True):
        assert torch.equal(a, b)


def test_workspace_is_needed_only_where_a_block_cannot_sort() -> None:
    size = native.module().clusters_workspace
    assert size(0, 2, 256, 768, 4096) == 0
    assert size(0, 2, 257, 768, 32) == 4 * 2 * (257 + 33)
    assert size(0, 1, 8, 768, 4097) == 4 * (8 + 4098)
