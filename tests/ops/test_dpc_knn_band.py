"""What the validator of dpc_knn takes and what it refuses: planted faults, simulated kernels."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cmpose import ops
from cmpose.ops import ClusterResult
from cmpose.ops.dpc_knn import squared_distances
from tests.ops.support.dpc_knn_band import (
    U,
    assert_clusters_within_band,
    centred_norms,
    exact_squares,
    square_error,
)

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def random_tokens(
    *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, spread: float = 1.0
) -> Tensor:
    """Gaussian tokens, each of its own scale (1 to 1 + spread), so that densities differ."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(*shape, generator=generator, dtype=torch.float64)
    scale = 1 + spread * torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float64)
    return (tokens * scale).to(dtype)


def lattice(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator).float()


def from_squares(
    square: Tensor, tokens: Tensor, k: int, num_clusters: int, **options: Any
) -> ClusterResult:
    """The reference's result for these squared distances [B, M, M]."""
    with pytest.MonkeyPatch.context() as patch:
        module = squared_distances.__globals__
        patch.setitem(module, "squared_distances", lambda x: square.to(x.dtype))
        return ops.dpc_knn(tokens, k, num_clusters, backend="reference", **options)


# -- what passes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("include_self", [True, False])
@pytest.mark.parametrize("peak_delta", ["row_max", "global_max"])
@pytest.mark.parametrize("scale", [True, False])
def test_the_reference_passes(
    dtype: torch.dtype, include_self: bool, peak_delta: str, scale: bool
) -> None:
    options: dict[str, Any] = {
        "include_self": include_self,
        "peak_delta": peak_delta,
        "scale": scale,
    }
    for tokens in (
        random_tokens(2, 61, 100, dtype=dtype),
        random_tokens(2, 40, 7, seed=1, dtype=dtype) + 3,
        lattice(3, 40, 5).to(dtype),
        random_tokens(1, 1, 33, dtype=dtype).expand(2, 9, 33),
        random_tokens(2, 30, 24, dtype=dtype)[:, torch.arange(40) % 30],
    ):
        found = ops.dpc_knn(tokens, 5, 9, **options)
        assert_clusters_within_band(found, tokens, 5, 9, **options)
        valid = torch.rand(tokens.shape[:2], generator=torch.Generator().manual_seed(2)) < 0.6
        valid[-1] = torch.arange(tokens.shape[1]) < 3  # fewer than clusters
        found = ops.dpc_knn(tokens, 5, 9, valid=valid, **options)
        assert_clusters_within_band(found, tokens, 5, 9, valid=valid, **options)


def test_no_valid_token_passes() -> None:
    tokens = random_tokens(2, 8, 5)
    valid = torch.zeros(2, 8, dtype=torch.bool)
    found = ops.dpc_knn(tokens, 2, 3, valid=valid)
    assert assert_clusters_within_band(found, tokens, 2, 3, valid=valid).certain == 2


def test_tokens_that_are_no_numbers() -> None:
    tokens = random_tokens(3, 30, 12)
    tokens[0, [4, 9], 3] = math.nan
    tokens[1, 5:] = math.inf
    tokens[2] = math.nan
    with ops.without_value_checks():
        found = ops.dpc_knn(tokens, 3, 8)
    ties = assert_clusters_within_band(found, tokens, 3, 8)
    assert ties.certain >= 1
    planted = found.assignment.clone()
    planted[0, 9] = 1
    with pytest.raises(AssertionError, match="clip 0: a token that is at no distance"):
        assert_clusters_within_band(found._replace(assignment=planted), tokens, 3, 8)


def test_edges_pass() -> None:
    for size, width, k, num_clusters in ((1, 4, 1, 1), (2, 1, 2, 2), (17, 3, 17, 17), (9, 5, 1, 1)):
        tokens = random_tokens(3, size, width)
        found = ops.dpc_knn(tokens, k, num_clusters)
        assert_clusters_within_band(found, tokens, k, num_clusters)
    empty = tokens[:0]
    assert_clusters_within_band(ops.dpc_knn(empty, 2, 2), empty, 2, 2)


@pytest.mark.parametrize(
    ("size", "width", "num_clusters", "share"), [(192, 768, 32, 0.05), (576, 384, 64, 0.05)]
)
def test_near_ties_are_rare(size: int, width: int, num_clusters: int, share: float) -> None:
    """The band leaves little open: else it would let anything pass."""
    tokens = random_tokens(2, size, width, dtype=torch.bfloat16)
    found = ops.dpc_knn(tokens, 5, num_clusters)
    ties = assert_clusters_within_band(found, tokens, 5, num_clusters)
    assert sum(ties[:3]) > 0
    assert max(ties[:3]) <= share * 2 * size


def test_certain_clips_are_there_and_counted() -> None:
    tokens = random_tokens(8, 40, 16)
    ties = assert_clusters_within_band(ops.dpc_knn(tokens, 5, 8), tokens, 5, 8)
    assert ties.certain >= 6
    near = lattice(8, 40, 16)  # full of ties between tokens that are not equal
    assert assert_clusters_within_band(ops.dpc_knn(near, 5, 8), near, 5, 8).certain == 0


# -- the distances and their bound ----------------------------------------------------------------


def test_exact_squares() -> None:
    tokens = random_tokens(1, 50, 300, dtype=torch.float64)[0] + 1e3
    tokens[[7, 30, 31]] = tokens[2].clone()
    same, square = exact_squares(tokens)
    assert same.nonzero().tolist() == [
        [i, j] for i in range(50) for j in range(50) if i == j or {i, j} <= {2, 7, 30, 31}
    ]
    torch.testing.assert_close(square, squared_distances(tokens[None])[0], rtol=1e-9, atol=0)
    assert (square[same] == 0).all()
    assert torch.equal(square, square.T)
    assert torch.equal(square[7], square[2])


def truncated(x: Tensor) -> Tensor:
    """float64 → towards zero to float32, as float64."""
    near = x.float().double()
    return torch.where(near.abs() > x.abs(), near.float().nextafter(torch.zeros(())).double(), near)


def subtracted(tokens: Tensor) -> Tensor:
    """What the kernel subtracts from a clip's tokens: [M, D] → [D] float32."""
    x = tokens.float()
    mean = x.mean(dim=0)
    spread = (x.amax(dim=0) - mean).maximum(mean - x.amin(dim=0))
    mantissa, exponent = spread.frexp()
    unit = torch.ldexp(torch.ones_like(mean), torch.where(mantissa == 0.5, exponent - 1, exponent))
    shift = (mean / unit).round() * unit
    shift = torch.where(spread == 0, mean, shift)
    y = x - shift
    exact = (y.to(tokens.dtype).float() == y) & (y + shift == x)
    return shift if tokens.dtype == torch.float32 else shift * exact.all(dim=0)


def simulated_squares(tokens: Tensor, pieces: str = "exact") -> Tensor:
    """d² as tensor cores give it: exact products, 8 channels a step, sums truncated to float32."""
    rest = tokens.float() - subtracted(tokens)
    split = []
    for _ in range(3):
        split.append(rest.bfloat16().double())
        rest = rest - split[-1].float()
    first, second, third = split
    if tokens.dtype != torch.float32:
        # float16 has more bits than a piece, and no pieces
        first, second, third = first + second + third, second * 0, third * 0
    elif pieces == "two":
        third = third * 0
    main, left, right = (torch.zeros(len(tokens), len(tokens)).double() for _ in range(3))
    for at in range(0, tokens.shape[1], 8):
        a, b, c = (part[:, at : at + 8] for part in (first, second, third))
        main = truncated(main + a @ a.T)
        if tokens.dtype == torch.float32 and pieces == "exact":
            main = truncated(main + b @ b.T)
        for one, other in ((a, b), (a, c)):
            left = truncated(left + one @ other.T)
            right = truncated(right + other @ one.T)
    gram = main.float() + (left.float() + right.float())
    norm = gram.diagonal()
    square = (norm[:, None] + norm - 2 * gram).clamp(min=0)
    return square.masked_fill((tokens[:, None] == tokens).all(dim=-1), 0.0).double()


@pytest.mark.parametrize("width", [64, 768])
@pytest.mark.parametrize("offset", [0.0, 2.0, 6.0, 100.0])
@pytest.mark.parametrize("uneven", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_simulated_tensor_cores_stay_within_the_bound(
    width: int, offset: float, uneven: bool, dtype: torch.dtype
) -> None:
    tokens = random_tokens(1, 40, width, seed=width) + offset
    tokens[0, 1] = 2 * offset - tokens[0, 0]
    tokens[0, 2] = tokens[0, 0]
    tokens[0, 3] = tokens[0, 0] + 1e-3
    if uneven:  # a large first channel, so that every partial sum is large; and one far token
        tokens[:, :, 0] *= 40
        tokens[:, 9] *= 8
    tokens = tokens.to(dtype)
    usable = torch.ones(40, dtype=torch.bool)
    _, exact = exact_squares(tokens[0].double())
    for pieces in ("exact", "two"):
        found = simulated_squares(tokens[0], pieces)
        bound = square_error(tokens[0], usable, pieces)
        error = (found - exact).abs()
        assert (error <= bound).all()
        if not uneven and offset < 10 and pieces == "exact":
            assert (error / bound).max() > 0.02  # the bound is no far-fetched one
        result = from_squares(found[None], tokens, 5, 12)
        assert_clusters_within_band(result, tokens, 5, 12, pieces=pieces)


def test_the_bound_is_the_formula() -> None:
    # Spread 3 and 5: multiples of 4 and 8; the means 0 and 1 go to 0.
    x = torch.tensor([[3.0, 1.0], [-3.0, 1.0], [0.0, 6.0], [0.0, -4.0]])
    usable = torch.ones(4, dtype=torch.bool)
    assert torch.equal(centred_norms(x, usable), x.double().norm(dim=-1))
    square = (10**0.5 + 6) ** 2
    for dtype, pieces, factor in (
        (torch.float32, "exact", U * (16 + 8)),
        (torch.float32, "two", U * (8 + 8) + 2**-15),
        (torch.bfloat16, "exact", U * (8 + 8)),
        (torch.float16, "two", U * (8 + 8)),
    ):
        error = square_error(x.to(dtype), usable, pieces)
        assert math.isclose(error[0, 2], factor * square, rel_tol=1e-12)
    wide = torch.cat((x, x.new_zeros(4, 63)), dim=1).bfloat16()  # 65 channels are 128
    assert math.isclose(square_error(wide, usable)[0, 2], U * (16 + 8) * square, rel_tol=1e-12)


def test_what_is_subtracted() -> None:
    usable = torch.ones(4, dtype=torch.bool)
    # Mean 102.25, spread 2.75: a multiple of 4. One value: itself. Mean 107.9, spread 104.4: 128,
    # but for bfloat16 0, because 8 bits do not hold 3.515625 − 128.
    x = torch.tensor([[100.0, 7.3, 128], [102, 7.3, 200], [102, 7.3, 3.515625], [105, 7.3, 100]])
    for dtype, third in ((torch.float32, 128), (torch.bfloat16, 0)):
        tokens = x.to(dtype)
        left = tokens.double() - torch.tensor([104, float(tokens[0, 1]), third]).double()
        torch.testing.assert_close(centred_norms(tokens, usable), left.norm(dim=-1))
    # Tokens that do not count are left out of the mean; without any, nothing is subtracted.
    usable[3] = False
    x = torch.tensor([[1.0], [2.0], [3.0], [1000.0]])
    assert centred_norms(x, usable).tolist() == [1, 0, 1, 998]
    assert centred_norms(x, ~usable).tolist() == [999, 998, 997, 0]
    assert centred_norms(x, usable & False).tolist() == [1, 2, 3, 1000]
    # Half-way between multiples either may be it: the farther counts.
    x = torch.tensor([[0.5], [1.5]])
    assert centred_norms(x, torch.ones(2, dtype=torch.bool)).tolist() == [0.5, 0.5]
    x = torch.tensor([[2.25], [0.75]])
    assert centred_norms(x, torch.ones(2, dtype=torch.bool)).tolist() == [1.25, 1.25]


def perturbed(tokens: Tensor, factor: float, seed: int, valid: Tensor | None = None) -> Tensor:
    """Exact d² with errors up to ``factor`` times the bound, symmetric, alike for equal tokens."""
    generator = torch.Generator().manual_seed(seed)
    squares = []
    for b, x in enumerate(tokens):
        usable = torch.ones(len(x), dtype=torch.bool) if valid is None else valid[b]
        same, square = exact_squares(x.double())
        noise = 2 * torch.rand(square.shape, generator=generator, dtype=square.dtype) - 1
        noise = noise.triu(1) + noise.triu(1).T
        if seed % 2:
            noise = noise.sign()  # the ends of the band
        error = factor * noise * square_error(x, usable)
        square = (square + error).clamp(min=0).masked_fill(same, 0.0)
        first = same.to(torch.int8).argmax(dim=-1)
        squares.append(square[first][:, first])
    return torch.stack(squares)


@pytest.mark.parametrize("seed", range(30))
def test_any_error_within_the_bound_passes(seed: int) -> None:
    for tokens in (
        random_tokens(2, 64, 256, seed=seed, dtype=torch.bfloat16),
        lattice(2, 40, 4, seed=seed),
        random_tokens(2, 30, 24, seed=seed)[:, torch.arange(40) % 30],
    ):
        square = perturbed(tokens, 0.99, seed)
        found = from_squares(square, tokens, 5, 12)
        assert_clusters_within_band(found, tokens, 5, 12)
        valid = torch.rand(tokens.shape[:2], generator=torch.Generator().manual_seed(seed)) < 0.7
        square = perturbed(tokens, 0.99, seed, valid)
        found = from_squares(square, tokens, 5, 12, valid=valid, peak_delta="global_max")
        assert_clusters_within_band(found, tokens, 5, 12, valid=valid, peak_delta="global_max")


@pytest.mark.parametrize("seed", range(4))
def test_thirty_times_the_bound_does_not(seed: int) -> None:
    tokens = random_tokens(8, 192, 256, seed=seed, dtype=torch.bfloat16)
    square = perturbed(tokens, 30, seed)
    found = from_squares(square, tokens, 5, 48)
    with pytest.raises(AssertionError, match="clip 0: log ρ is out of its band"):
        assert_clusters_within_band(found, tokens, 5, 48)
    # Where log ρ is right, δ tells, and where that is right as well the assignment, if it is a
    # token's that lies between two centres.
    right = ops.dpc_knn(tokens, 5, 48)
    found = found._replace(log_density=right.log_density)
    with pytest.raises(AssertionError, match="clip 0: δ does not follow"):
        assert_clusters_within_band(found, tokens, 5, 48)
    square = perturbed(tokens, 100, seed)
    to_centers = square.gather(2, right.centers[:, None].expand(-1, 192, -1))
    assignment = to_centers.argmin(dim=-1).scatter(1, right.centers, torch.arange(48).expand(8, 48))
    with pytest.raises(AssertionError, match=r"clip \d: a token is not with its nearest centre"):
        assert_clusters_within_band(right._replace(assignment=assignment), tokens, 5, 48)


# -- planted faults -------------------------------------------------------------------------------

TOKENS = random_tokens(2, 60, 32, seed=5)
K, L = 5, 10


def right() -> ClusterResult:
    found = ops.dpc_knn(TOKENS, K, L)
    return ClusterResult(*(t.clone() for t in found))


def refused(found: ClusterResult, match: str, tokens: Tensor = TOKENS, **options: Any) -> None:
    with pytest.raises(AssertionError, match=match):
        assert_clusters_within_band(found, tokens, K, found.centers.shape[1], **options)


def rank_of(found: ClusterResult, b: int) -> list[int]:
    return found.log_density[b].argsort(descending=True, stable=True).tolist()


def test_one_wrong_label() -> None:
    for token in range(60):
        found = right()
        found.assignment[1, token] = (found.assignment[1, token] + 1) % L
        own = token in found.centers[1].tolist()
        match = "not in its own cluster" if own else "not with its nearest centre"
        refused(found, f"clip 1: a .*{match}")


def test_two_centres_swapped() -> None:
    for place in range(L - 1):
        found = right()
        found.centers[1, [place, place + 1]] = found.centers[1, [place + 1, place]]
        refused(found, "clip 1: a centre is before a token with a larger score")


def test_a_centre_that_is_none() -> None:
    found = right()
    score = found.log_density + found.delta.log()
    found.centers[0, -1] = score[0].argsort(descending=True)[L]
    refused(found, "a centre is before a token with a larger score")
    found = right()
    found.centers[0, -1] = found.centers[0, 0]
    refused(found, "a token is a centre twice")


def test_one_log_density() -> None:
    for factor in (1 - 1e-3, 1 + 1e-3, math.nan):
        found = right()
        found.log_density[0, 13] *= factor
        refused(found, r"clip 0: log ρ is out of its band: 1 of 60, the first \(13,\)")


def test_delta_of_a_later_token() -> None:
    square = squared_distances(TOKENS)
    for place in (1, 5, 58):
        found = right()
        order = rank_of(found, 0)
        token, later = order[place], order[place + 1]
        found.delta[0, token] = (square[0, token, later] / 32).sqrt()
        refused(found, rf"clip 0: δ does not follow .* the first \({token},\)")


def test_the_wrong_peak() -> None:
    found = right()
    whole = ops.dpc_knn(TOKENS, K, L, peak_delta="global_max")
    assert_clusters_within_band(whole, TOKENS, K, L, peak_delta="global_max")
    refused(whole, "δ does not follow")
    refused(found, "δ does not follow", peak_delta="global_max")


def test_other_options() -> None:
    for options in ({"scale": False}, {"include_self": False}):
        refused(right(), "log ρ is out of its band", **options)


def test_out_of_range() -> None:
    for name, value in (("centers", 60), ("centers", -1), ("assignment", L), ("assignment", -1)):
        found = right()
        getattr(found, name)[1, 3] = value
        refused(found, rf"{name} out of range: 1 of .*\(1, 3\): found {value}")


def test_form() -> None:
    found = right()
    refused(found._replace(delta=found.delta.double()), r"delta is \[2, 60\] torch.float64")
    refused(found._replace(assignment=found.assignment[:, :9]), r"assignment is \[2, 9\]")


def from_mirrored(tokens: Tensor, **options: Any) -> ClusterResult:
    """Ties by the larger index: the reference on the tokens in reverse order."""
    found = ops.dpc_knn(tokens.flip(1), K, L, **options)
    last = tokens.shape[1] - 1
    return ClusterResult(
        found.log_density.flip(1),
        found.delta.flip(1),
        last - found.centers,
        found.assignment.flip(1),
    )


@pytest.mark.parametrize("seed", range(5))
def test_ties_by_the_larger_index(seed: int) -> None:
    tokens = lattice(1, 40, 3, seed=seed)
    refused(from_mirrored(tokens), "δ does not follow|a tie with a smaller index", tokens)
    copies = random_tokens(1, 30, 24, seed=seed)[:, torch.arange(40) % 30]
    refused(from_mirrored(copies), "δ does not follow", copies)
    distinct = random_tokens(1, 40, 24, seed=seed)
    assert_clusters_within_band(from_mirrored(distinct), distinct, K, L)


def test_a_tie_between_centres_to_the_later_one() -> None:
    tokens = random_tokens(1, 6, 8)[:, [0, 1, 2, 3, 0, 0, 4, 5, 1, 0]]
    found = ops.dpc_knn(tokens, K, 9)
    assert found.centers[0].tolist().index(4) < found.centers[0].tolist().index(5)
    left = next(t for t in range(10) if t not in found.centers[0].tolist())
    assert left == 9  # another copy of token 0, which is in the cluster of the first
    for copy in (4, 5):
        planted = found.assignment.clone()
        planted[0, 9] = found.centers[0].tolist().index(copy)
        refused(found._replace(assignment=planted), "not with its nearest centre", tokens)


def test_equal_tokens_with_different_densities() -> None:
    tokens = random_tokens(1, 30, 24)[:, torch.arange(40) % 30]
    found = ops.dpc_knn(tokens, K, L)
    planted = found.log_density.clone()
    planted[0, 3] = planted[0, 3].nextafter(torch.tensor(0.0))
    refused(found._replace(log_density=planted), "equal tokens have different log ρ", tokens)


def test_an_invalid_token_before_a_valid_one() -> None:
    valid = torch.ones(2, 60, dtype=torch.bool)
    valid[:, [0, 7, 20]] = False
    found = ops.dpc_knn(TOKENS, K, 60, valid=valid)
    assert_clusters_within_band(found, TOKENS, K, 60, valid=valid)
    for place in range(56, 59):
        planted = found.centers.clone()
        planted[0, [place, place + 1]] = planted[0, [place + 1, place]]
        refused(found._replace(centers=planted), "a centre is before", valid=valid)
    few = torch.zeros(2, 60, dtype=torch.bool)
    few[:, 30:35] = True
    found = ops.dpc_knn(TOKENS, K, L, valid=few)
    planted = found.assignment.clone()
    planted[0, 2] = 7
    refused(found._replace(assignment=planted), "an invalid centre's cluster", valid=few)
    refused(ops.dpc_knn(TOKENS, K, L), "log ρ is out of its band", valid=few)
    planted = found.delta.clone()
    planted[1, 4] = 1e-3
    refused(found._replace(delta=planted), "δ does not follow", valid=few)


def test_a_clip_without_near_ties_is_compared_with_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last line of defence, in case that the rules above have a hole."""
    tokens = random_tokens(1, 20, 16, seed=1)
    found = ops.dpc_knn(tokens, K, 4)
    assert assert_clusters_within_band(found, tokens, K, 4).certain == 1
    other: Callable[..., ClusterResult] = ops.dpc_knn
    monkeypatch.setattr(ops, "dpc_knn", lambda x, *a, **kw: other(x.flip(1), *a, **kw))
    refused(
        found, "centers of a clip without near-ties differ from the float64 reference's", tokens
    )
