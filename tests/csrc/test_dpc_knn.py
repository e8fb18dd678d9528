"""The CUDA kernels of dpc_knn, for every size: the reference's bits on lattices, and what their
error bound admits on other tokens (tests/ops/support/dpc_knn_checks.py).

On a machine without a GPU they run on the CPU (tests/cuda_on_cpu). Up to kMatrixTokens = 512 tokens
a clip's distances are kept, beyond that only the nearest: both ways are tested.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from cmpose import native, ops
from cmpose.ops.distances import squared_distances
from cmpose.ops.dpc_knn import MATRIX_TOKENS, MAX_NEIGHBORS, MAX_TOKENS
from cmpose.ops.select_tokens import shared_bytes
from tests.ops.support.cases import DEVICE
from tests.ops.support.dpc_knn_checks import (
    assert_equals_reference,
    assert_within_rounding,
    lattice,
)

pytestmark = pytest.mark.skipif(
    ops.available("dpc_knn", DEVICE)["cuda"] is not None,
    reason=str(ops.available("dpc_knn", DEVICE)["cuda"]),
)

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
every_dtype = pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])


def random_tokens(*shape: int, dtype: torch.dtype = FP32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def clustered_tokens(
    batch: int, size: int, width: int, dtype: torch.dtype, seed: int = 0
) -> Tensor:
    """Tokens around M / 7 centres, as tokens of the same body part are close to each other."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(batch, size // 7 + 1, width, generator=generator)
    index = torch.randint(0, size // 7 + 1, (batch, size), generator=generator)
    around = centres[torch.arange(batch)[:, None], index]
    return (around + 0.3 * torch.randn(batch, size, width, generator=generator)).to(dtype)


def clusters_of(tokens: Tensor, k: int, num_clusters: int, **options: Any) -> ops.ClusterResult:
    """What the kernels give, on the CPU."""
    valid = options.pop("valid", None)
    result = ops.dpc_knn(
        tokens.to(DEVICE),
        k,
        num_clusters,
        valid=None if valid is None else valid.to(DEVICE),
        backend="cuda",
        **options,
    )
    return ops.ClusterResult(*(t.cpu() for t in result))


def check_on_lattice(tokens: Tensor, k: int, num_clusters: int, **options: Any) -> None:
    result = clusters_of(tokens, k, num_clusters, **options)
    assert_equals_reference(result, tokens, k, num_clusters, **options)


def check(tokens: Tensor, k: int, num_clusters: int) -> None:
    assert_within_rounding(clusters_of(tokens, k, num_clusters), tokens, k, num_clusters)


SIZES = [
    # M, D, k, L
    pytest.param(1, 8, 1, 1, marks=pytest.mark.sanitized),
    (2, 8, 2, 1),
    (3, 1, 2, 3),
    pytest.param(13, 17, 5, 4, marks=pytest.mark.sanitized),
    (63, 64, 16, 9),
    pytest.param(65, 129, 3, 65, marks=pytest.mark.sanitized),
    (101, 8, 5, 11),
    (128, 320, 5, 32),
    (131, 1280, 5, 32),
    pytest.param(132, 72, 5, 32, marks=pytest.mark.sanitized),
    (132, 768, 5, 32),
    (192, 384, 5, 32),
    pytest.param(193, 72, 8, 49, marks=pytest.mark.sanitized),
    (257, 40, 1, 64),
    (383, 24, 5, 96),
    (509, 56, 2, 127),
    (512, 16, 5, 128),
    pytest.param(513, 48, 5, 128, marks=pytest.mark.sanitized),
    (577, 96, 16, 64),
    (769, 5, 3, 500),
    (1021, 8, 5, 255),
]


@every_dtype
@pytest.mark.parametrize(("size", "width", "k", "num_clusters"), SIZES)
def test_every_size(size: int, width: int, k: int, num_clusters: int, dtype: torch.dtype) -> None:
    tokens = lattice(2 if size < 100 else 1, size, width, dtype=dtype, offset=5)
    check_on_lattice(tokens, k, num_clusters)


@every_dtype
@pytest.mark.parametrize(
    ("size", "width", "k", "num_clusters"),
    [(65, 129, 3, 65), (192, 768, 5, 32), (509, 56, 2, 127), (577, 96, 16, 64)],
)
def test_tokens_off_the_lattice(
    size: int, width: int, k: int, num_clusters: int, dtype: torch.dtype
) -> None:
    check(clustered_tokens(1, size, width, dtype), k, num_clusters)


def test_where_nothing_is_close_the_clusters_are_the_references() -> None:
    tokens = clustered_tokens(6, 24, 96, BF16)
    expected = ops.dpc_knn(tokens.double(), 4, 5, backend="reference")
    result = clusters_of(tokens, 4, 5)
    assert torch.equal(result.centers, expected.centers)
    assert torch.equal(result.assignment, expected.assignment)


OPTIONS = [
    {"scale": False},
    {"include_self": False},
    {"peak_delta": "global_max"},
    {"scale": False, "include_self": False, "peak_delta": "global_max"},
]
BOTH_WAYS = pytest.mark.parametrize("size", [97, 540])


@BOTH_WAYS
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_options(size: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    check_on_lattice(lattice(1, size, 40, dtype=dtype), 5, 17, **options)


@BOTH_WAYS
@pytest.mark.parametrize("options", [{}, {"include_self": False}], ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_valid(size: int, dtype: torch.dtype, options: dict[str, Any]) -> None:
    clips = 2 if size < 100 else 1
    valid = torch.rand(clips, size, generator=torch.Generator().manual_seed(1)) < 0.6
    check_on_lattice(lattice(clips, size, 40, dtype=dtype), 5, 17, valid=valid, **options)


@pytest.mark.sanitized
@BOTH_WAYS
@pytest.mark.parametrize("options", [{}, {"include_self": False}], ids=str)
def test_fewer_valid_tokens_than_neighbours_or_clusters(size: int, options: dict[str, Any]) -> None:
    tokens = lattice(4, size, 24, dtype=BF16)
    valid = torch.zeros(4, size, dtype=torch.bool)
    valid[0, 7] = True
    valid[1, [3, 90]] = True
    valid[2, 5:16] = True  # and none in the last clip
    check_on_lattice(tokens, 5, 17, valid=valid, **options)


@BOTH_WAYS
@every_dtype
def test_equal_tokens(size: int, dtype: torch.dtype) -> None:
    """Equal tokens are at d² = 0 exactly, so ties go by index, as in the reference."""
    clips = 2 if size < 100 else 1
    tokens = random_tokens(1, 1, 50, dtype=dtype).expand(clips, size, 50) * 37
    result = clusters_of(tokens, 3, 6)
    assert (result.log_density == 0).all()
    assert (result.delta == 0).all()
    assert result.centers.tolist() == [list(range(6))] * clips
    assert (result.assignment[:, :6] == torch.arange(6)).all()
    assert (result.assignment[:, 6:] == 0).all()


@BOTH_WAYS
@pytest.mark.parametrize("offset", [0, 1000])
@every_dtype
def test_duplicates(size: int, dtype: torch.dtype, offset: int) -> None:
    tokens = clustered_tokens(1, size, 72, torch.float64) + offset
    generator = torch.Generator().manual_seed(2)
    copies = torch.randint(0, size, (size // 2,), generator=generator)
    tokens[:, : size // 2] = tokens[:, copies]
    check(tokens.to(dtype), 3, 20)


@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
def test_tokens_that_come_nearer_and_nearer(dtype: torch.dtype) -> None:
    """Each tile has nearer tokens than all before it, and many are equally near."""
    size = 600
    positions = torch.where(torch.arange(size) % 2 == 0, 1, -1) * (size - torch.arange(size))
    check_on_lattice(positions[None, :, None].to(dtype), 5, 40)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_where_no_token_has_a_denser_one_among_its_nearest(dtype: torch.dtype) -> None:
    """With k = 1 a token's only neighbour is itself: all of them are searched for."""
    check_on_lattice(lattice(1, 530, 24, dtype=dtype), 1, 40)


@BOTH_WAYS
def test_a_wide_lattice(size: int) -> None:
    """Of numbers that one bfloat16 piece does not hold, far from 0 as well."""
    for offset in (0, 30_000):
        check_on_lattice(lattice(1, size, 8, reach=500, offset=offset), 5, 30)


@every_dtype
@pytest.mark.parametrize("offset", [1e2, 1e4])
def test_an_offset_does_not_cancel(offset: float, dtype: torch.dtype) -> None:
    """Tokens far from 0 and near each other: |x|² + |y|² − 2xy of them as they are would be lost.

    The tokens are rounded to the dtype first; what is left of them is what must be told apart.
    """
    tokens = (clustered_tokens(1, 90, 64, torch.float64) * 8 + offset).to(dtype)
    check(tokens, 5, 12)
    x = tokens.float()
    naive = x.square().sum(-1)[..., None] + x.square().sum(-1)[:, None] - 2 * x @ x.mT
    exact = squared_distances(tokens.double())
    lost = (naive - exact).abs().max() / exact.median()
    if dtype == FP32:  # so much is at stake; 16-bit tokens have too few bits to lose any
        assert lost > (1e-2 if offset == 1e4 else 1e-6)


@BOTH_WAYS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_tokens_that_are_no_numbers(size: int, bad: float) -> None:
    """They count as invalid, in cluster 0; the others cluster as if they were marked so."""
    tokens = lattice(3, size, 40, dtype=BF16)
    tokens[0, [0, 50], 3] = bad
    tokens[1, 20] = bad
    tokens[2] = bad
    with ops.without_value_checks():
        result = clusters_of(tokens, 5, 17)
    assert_equals_reference(result, tokens, 5, 17)
    assert (result.log_density[0, [0, 50]] == -float("inf")).all()
    assert result.assignment[1, 20] == 0
    assert (result.assignment[2] == 0).all()
    assert result.centers[2].tolist() == list(range(17))


@BOTH_WAYS
@pytest.mark.parametrize("huge", [1e19, 3e30])
def test_squares_beyond_float32(size: int, huge: float) -> None:
    """A token whose norm, or the sum of two such norms, overflows counts as an infinite one."""
    tokens = clustered_tokens(1, size, 40, FP32)
    tokens[0, 9], tokens[0, 30] = huge, -huge
    with ops.without_value_checks():
        result = clusters_of(tokens, 5, 17)
    assert (result.log_density[0, [9, 30]] == -float("inf")).all()
    assert (result.assignment[0, [9, 30]] == 0).all()
    assert result.assignment.min() >= 0
    assert result.assignment.max() < 17
    others = [i for i in range(size) if i not in (9, 30)]
    expected = ops.dpc_knn(tokens[:, others].double(), 5, 17, backend="reference")
    torch.testing.assert_close(
        result.log_density[:, others].double(), expected.log_density, rtol=1e-5, atol=0
    )


def test_no_channels_are_refused() -> None:
    tokens = torch.zeros(1, 97, 0, device=DEVICE)
    with pytest.raises(ValueError, match=r"^tokens"):
        ops.dpc_knn(tokens, 3, 5, backend="cuda")
    with pytest.raises(ValueError, match=r"^tokens"):
        ops.dpc_knn_merge(tokens, torch.ones(1, 97, device=DEVICE), 3, 5, backend="cuda")


@contextmanager
def matmul_precision(way: str) -> Iterator[None]:
    """Allows TF32 in one of torch's three ways, which change the same setting."""
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        if way == "set_float32_matmul_precision":
            torch.set_float32_matmul_precision("high")
        elif way == "allow_tf32":
            torch.backends.cuda.matmul.allow_tf32 = True
        else:
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        yield
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize(
    ("size", "way"),
    [
        (97, "set_float32_matmul_precision"),
        (97, "allow_tf32"),
        (97, "fp32_precision"),
        (540, "fp32_precision"),
    ],
)
def test_two_pieces_when_torch_allows_tf32(size: int, way: str) -> None:
    tokens = clustered_tokens(1, size, 64, FP32)
    exact = clusters_of(tokens, 5, 17)
    with matmul_precision(way):
        result = clusters_of(tokens, 5, 17)
    again = clusters_of(tokens, 5, 17)
    assert torch.equal(again.log_density, exact.log_density)
    assert_within_rounding(result, tokens, 5, 17, pieces=2)
    expected = ops.dpc_knn(tokens.double(), 5, 17, backend="reference").log_density
    errors = [(r.log_density - expected).abs().mean() for r in (exact, result)]
    assert errors[1] > 3 * errors[0]  # it is less exact: the flag reaches the kernel


@pytest.mark.parametrize(("size", "dtype"), [(97, BF16), (97, FP32), (250, FP16), (540, BF16)])
@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU orders its threads by itself")
def test_the_order_of_threads_and_copies_does_not_matter(
    size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several slabs of channels and several tiles of columns: every buffer is used again."""
    tokens = clustered_tokens(1, size, 200 if size < 540 else 72, dtype)
    weights = random_tokens(1, size).abs()
    clusters, merged = ops.dpc_knn_merge(tokens, weights, 5, 17, backend="cuda")
    for order, copies in (
        ("backward", "early"), ("5", "late"), ("11", "early"), ("forward", "early"),
    ):  # fmt: skip
        monkeypatch.setenv("CUDA_ON_CPU_ORDER", order)
        monkeypatch.setenv("CUDA_ON_CPU_COPIES", copies)
        again, merged_again = ops.dpc_knn_merge(tokens, weights, 5, 17, backend="cuda")
        for a, b in zip((*clusters, merged), (*again, merged_again), strict=True):
            assert torch.equal(a, b), f"order {order}, copies {copies}"


# -- with merging ---------------------------------------------------------------------------------


@every_dtype
@pytest.mark.parametrize(("size", "width"), [(97, 40), (97, 520), (97, 37), (540, 24)])
def test_merging_along_gives_the_bits_of_the_two_calls(
    size: int, width: int, dtype: torch.dtype
) -> None:
    tokens = clustered_tokens(2, size, width, dtype).to(DEVICE).requires_grad_()
    weights = random_tokens(2, size).abs().to(DEVICE).requires_grad_()
    ramp = torch.linspace(-1, 1, 2 * 17 * width, device=DEVICE).reshape(2, 17, width).to(dtype)
    clusters, merged = ops.dpc_knn_merge(tokens, weights, 5, 17, backend="cuda")
    gradients = torch.autograd.grad(merged, (tokens, weights), ramp)
    apart = ops.dpc_knn(tokens, 5, 17, backend="cuda")
    merged_apart = ops.merge_clusters(tokens, weights, apart.assignment, 17, backend="cuda")
    gradients_apart = torch.autograd.grad(merged_apart, (tokens, weights), ramp)
    for a, b in zip(
        (*clusters, merged, *gradients), (*apart, merged_apart, *gradients_apart), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("backend", ["reference", "auto", "cuda"])
def test_merging_along_on_every_backend(backend: str, normalize: bool) -> None:
    tokens = clustered_tokens(2, 60, 24, FP32).to(DEVICE).requires_grad_()
    weights = random_tokens(2, 60).abs().to(DEVICE).requires_grad_()
    valid = (random_tokens(2, 60, seed=1) < 0.9).to(DEVICE)
    options = {"valid": valid, "include_self": False, "peak_delta": "global_max"}
    clusters, merged = ops.dpc_knn_merge(
        tokens, weights, 4, 9, normalize=normalize, backend=backend, **options
    )
    apart = ops.dpc_knn(tokens, 4, 9, backend="reference", **options)
    merged_apart = ops.merge_clusters(
        tokens, weights, apart.assignment, 9, normalize=normalize, backend="reference"
    )
    assert torch.equal(clusters.assignment, apart.assignment)
    torch.testing.assert_close(merged, merged_apart)
    for a, b in zip(
        torch.autograd.grad(merged.square().sum(), (tokens, weights)),
        torch.autograd.grad(merged_apart.square().sum(), (tokens, weights)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_merging_along_on_two_backends() -> None:
    tokens, weights = (
        clustered_tokens(1, 40, 16, FP32).to(DEVICE),
        random_tokens(1, 40).abs().to(DEVICE),
    )
    expected = ops.dpc_knn_merge(tokens, weights, 3, 5, backend="cuda")
    with ops.backend(dpc_knn="cuda", merge_clusters="reference"):
        clusters, merged = ops.dpc_knn_merge(tokens, weights, 3, 5)
    assert torch.equal(clusters.assignment, expected[0].assignment)
    torch.testing.assert_close(merged, expected[1])


def test_merging_along_checks_its_weights() -> None:
    with pytest.raises(ValueError, match=r"weights must have shape \[B, M\] with M=6"):
        ops.dpc_knn_merge(torch.zeros(1, 6, 3), torch.zeros(1, 5), 2, 2)
    with pytest.raises(TypeError, match=r"weights must be of dtype float32"):
        ops.dpc_knn_merge(torch.zeros(1, 6, 3), torch.zeros(1, 6).long(), 2, 2)


# -- what it takes --------------------------------------------------------------------------------


def test_limits_are_those_of_the_sources() -> None:
    core = native.module()
    assert core.MAX_NEIGHBORS == MAX_NEIGHBORS
    assert core.MAX_TOKENS == MAX_TOKENS
    assert core.MATRIX_TOKENS == MATRIX_TOKENS
    for keypoints, tokens in ((15, 192), (1, 1), (17, 67), (133, 192)):
        assert shared_bytes(keypoints, tokens) == core.select_tokens_shared(keypoints, tokens)
    with pytest.raises(ValueError, match=r"takes 1 to 16 neighbors and up to 65536 tokens, got 17"):
        core.dpc_knn_workspace(0, 1, 20, 3, 17, 2)
    with pytest.raises(ValueError, match=r"dtype must be 0 .*, got 3"):
        core.dpc_knn_workspace(3, 1, 20, 3, 2, 2)


def test_workspace_grows_with_the_tokens_alone() -> None:
    """Beyond 512 tokens it is O(M · (D + k)): five lists of a token's k nearest, 8 bytes each, and
    25 bytes. Below, a clip's d² are there."""

    def size(tokens: int, dtype: int = 2) -> int:
        return native.module().dpc_knn_workspace(dtype, 1, tokens, 768, 5, 32)

    padding = 8 * 256
    assert size(512) <= 512 * 768 * 2 + 4 * 512 * 512 + 5 * 512 + padding
    for tokens in (513, 4096, 65_536):
        assert size(tokens) <= tokens * (768 * 2 + 5 * 5 * 8 + 25) + 2 * padding
        assert size(tokens, 0) <= tokens * (768 * 6 + 5 * 5 * 8 + 25) + 2 * padding


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_it_can_be_captured_in_a_graph() -> None:
    tokens = clustered_tokens(2, 600, 64, BF16).cuda()
    weights = random_tokens(2, 600).abs().cuda()
    for size in (132, 600):
        f, w = tokens[:, :size].contiguous(), weights[:, :size].contiguous()
        expected = ops.dpc_knn_merge(f, w, 5, 17, backend="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            clusters, merged = ops.dpc_knn_merge(f, w, 5, 17, backend="cuda")
        graph.replay()
        assert torch.equal(clusters.assignment, expected[0].assignment)
        assert torch.equal(merged, expected[1])
