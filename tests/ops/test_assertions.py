"""Every assertion passes what is right and fails for a planted fault."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.support.assertions import (
    assert_as_close_as_eager,
    assert_fake_matches,
    assert_gradient_strides,
    assert_layout,
    assert_repeats,
    assert_same_bits,
    assert_writes_everything,
    hostile_gradients,
    poisoned_memory,
)

LOW = (torch.float32, torch.float16, torch.bfloat16)
every_dtype = pytest.mark.parametrize("dtype", LOW, ids=str)
TERMS = 100
SEEDS = 20


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


def weighted_sum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q[:, :1] * k).sum(-1) / TERMS + v.sum(-1)


def square(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Positive results, whose roundings are small against them."""
    return (q * q).mean(-1)


every_computation = pytest.mark.parametrize("compute", [attention, weighted_sum, square])


def triple(
    compute: Callable[..., Tensor], dtype: torch.dtype, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A right kernel's result (in float32, in reverse order), eager's in ``dtype``, the exact."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(4, 17, TERMS, generator=generator).to(dtype) for _ in range(3)]
    actual = compute(*(t.float().flip(-1) for t in inputs)).to(dtype)
    actual = actual.flip(-1) if actual.ndim == 3 else actual
    return actual, compute(*inputs), compute(*(t.double() for t in inputs))


def refused(actual: Tensor, eager: Tensor, exact: Tensor, match: str = "") -> None:
    with pytest.raises(AssertionError, match=match):
        assert_as_close_as_eager(actual, eager, exact, reduction=TERMS)


@every_dtype
@every_computation
def test_right_kernels_pass_and_planted_faults_do_not(
    compute: Callable[..., Tensor], dtype: torch.dtype
) -> None:
    for seed in range(SEEDS):
        actual, eager, exact = triple(compute, dtype, seed)
        assert_as_close_as_eager(actual, eager, exact, reduction=TERMS)
        assert_as_close_as_eager(eager, eager, exact, reduction=TERMS)
        for factor in (0.99, 1.01):
            planted = (actual.double() * factor).to(dtype)
            refused(planted, eager, exact, "gain")
            with pytest.raises(AssertionError, match="gain"):
                assert_as_close_as_eager(planted, eager, exact, reduction=TERMS, roundings=2)
        refused((actual.double() + 0.02 * exact.abs().mean()).to(dtype), eager, exact, "bias")
        at = random.Random(seed).randrange(actual.numel())
        for wrong in (float(exact.flatten()[at]) - 0.03 * float(exact.abs().max()), 1e3):
            planted = actual.clone()
            planted.view(-1)[at] = wrong
            refused(planted, eager, exact, "worst")
        swapped = actual.clone().view(-1)
        ends = [int(exact.argmin()), int(exact.argmax())]
        swapped[ends] = swapped[ends[::-1]]
        refused(swapped.view_as(actual), eager, exact, "worst")


@every_dtype
def test_one_percent_on_a_few_elements(dtype: torch.dtype) -> None:
    """1 % is caught on the largest element, and in float32 on any row."""
    for seed in range(SEEDS):
        actual, eager, exact = triple(square, dtype, seed)
        at = int(exact.argmax())
        planted = actual.double()
        planted.view(-1)[at] = exact.view(-1)[at] * (1.02 if dtype == torch.bfloat16 else 1.01)
        refused(planted.to(dtype), eager, exact, "worst")
        planted = actual.double()
        planted[2] *= 1.01
        if dtype == torch.float32:
            refused(planted.to(dtype), eager, exact, "worst")


def test_the_message_names_the_element_and_the_numbers() -> None:
    exact = torch.tensor([[1.0, 2.0], [4.0, 3.0]], dtype=torch.float64)
    eager = exact.float()
    actual = eager.clone()
    actual[1, 0] = 4.5
    with pytest.raises(AssertionError) as raised:
        assert_as_close_as_eager(actual, eager, exact, reduction=4)
    message = str(raised.value)
    assert "worst element is (1, 0): found 4.5, eager 4, exact 4" in message
    # (√4 · 2^-23 + 2^-24) · 4 = 2.5 · 2^-21
    assert "worst: 5.000e-01 > eager 0.000e+00 + allowance 1.192e-06" in message


@every_dtype
def test_the_allowance_is_the_formula(dtype: torch.dtype) -> None:
    """Just inside passes, just outside fails, with eager exact."""
    kind = torch.finfo(dtype)
    exact = torch.full((8,), 2.0, dtype=torch.float64)
    spacing = 2 * kind.eps
    for reduction, roundings, terms in ((1, 1, 0), (100, 1, 1), (10_000, 3, 0), (4, 2, 60)):
        inside = reduction**0.5 * 2**-23 + (roundings - 1) * kind.eps / 2
        allowed = inside * max(2, terms) + kind.eps / 2 * 2
        steps = int(allowed / spacing)
        for count, passes in ((steps, True), (steps + 1, False)):
            actual = (exact + count * spacing).to(dtype)
            options = {"reduction": reduction, "roundings": roundings, "terms": terms}
            if passes:
                assert_as_close_as_eager(actual, exact.to(dtype), exact, **options)
            else:
                with pytest.raises(AssertionError, match="worst"):
                    assert_as_close_as_eager(actual, exact.to(dtype), exact, **options)


def test_an_inexact_eager_widens_what_is_allowed() -> None:
    exact = torch.linspace(1, 2, 50, dtype=torch.float64)
    noise = torch.where(torch.arange(50) % 2 == 0, 1e-3, -1e-3)
    assert_as_close_as_eager((exact + noise).float(), (exact - noise).float(), exact)
    refused((exact + 1.1 * noise).float(), (exact - noise).float(), exact, "worst, mean")


def test_subnormals_round_absolutely() -> None:
    """In float16 half of 2^-24 is lost to rounding however small the number."""
    exact = torch.linspace(0, 2**-20, 999, dtype=torch.float64)
    down = (exact * 2**24).floor().half() * 2**-24
    assert_as_close_as_eager(exact.half(), exact.half(), exact)
    refused(down + 2**-23, exact.half(), exact, "worst")


def test_not_finite() -> None:
    exact = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 1e6], dtype=torch.float64)
    half = exact.half()  # 1e6 overflows
    assert_as_close_as_eager(half, half, exact)
    for at, wrong in ((0, "nan"), (1, "0"), (1, "inf"), (2, "-inf"), (3, "nan"), (4, "60000")):
        planted = half.clone()
        planted[at] = float(wrong)
        refused(planted, half, exact, rf"1 of 5 elements.*\({at},\): found")
    # An eager that overflows on its way widens nothing.
    eager = half.clone()
    eager[0] = float("inf")
    assert_as_close_as_eager(half, eager, exact)
    planted = half.clone()
    planted[0] = 1.01
    refused(planted, eager, exact, "worst")
    nothing = torch.full((3,), float("nan"), dtype=torch.float64)
    assert_as_close_as_eager(nothing.half(), nothing.half(), nothing)
    refused(torch.zeros(3).half(), nothing.half(), nothing, "3 of 3 elements")


def test_form() -> None:
    exact = torch.ones(3, 4, dtype=torch.float64)
    good = exact.half()
    assert_as_close_as_eager(good, good, exact)
    refused(good[:2], good, exact, r"shape \[2, 4\]")
    refused(good.T, good, exact, r"shape \[4, 3\]")
    refused(good, good.T, exact, r"eager \[4, 3\]")
    refused(good.float(), good, exact, "dtype torch.float32")
    refused(good, good, exact.float(), "exact must be float64")
    refused(good.int(), good.int(), exact, "compare torch.int32 with torch.equal")
    empty = exact[:0]
    assert_as_close_as_eager(empty.half(), empty.half(), empty)
    refused(empty.half().T, empty.half(), empty, "shape")
    zero = torch.zeros(5, dtype=torch.float64)
    assert_as_close_as_eager(zero.half(), zero.half(), zero)
    refused(zero.half() + 1e-6, zero.half(), zero, "worst, mean, bias")
    scalar = torch.tensor(3.0, dtype=torch.float64)
    assert_as_close_as_eager(scalar.half(), scalar.half(), scalar)
    refused(scalar.half() * 1.01, scalar.half(), scalar, "worst")


def test_layout() -> None:
    good = torch.empty(2, 3, 4)
    assert_layout(good, (2, 3, 4), torch.float32)
    assert_layout(good.transpose(1, 2), (2, 4, 3), torch.float32, (12, 1, 4))
    assert_layout(torch.empty(2, 1, 4).transpose(0, 1).transpose(0, 1), [2, 1, 4], torch.float32)
    for planted, match in (
        (good.transpose(1, 2), "shape"),
        (torch.empty(2, 4, 3).transpose(1, 2), r"strides \[12, 1, 3\]"),
        (torch.empty(2, 3, 5)[..., :4], r"strides \[15, 5, 1\]"),
        (torch.empty(3, 4).expand(2, 3, 4), r"strides \[0, 4, 1\]"),
        (good.half(), "dtype torch.float16"),
    ):
        with pytest.raises(AssertionError, match=match):
            assert_layout(planted, (2, 3, 4), torch.float32)


@pytest.fixture
def library() -> Iterator[torch.library.Library]:
    with torch.library._scoped_library("cmpose_test_assertions", "FRAGMENT") as fragment:
        yield fragment


def right_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], dtype=torch.float32)


FAKES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "strides": (
        lambda x: (x.new_empty(x.shape[::-1]).mT, right_fake(x)[1]),
        "result 0 has strides",
    ),
    "shape": (lambda x: (right_fake(x)[0], x.new_empty(3)), "result 1 has shape"),
    "dtype": (lambda x: (right_fake(x)[0], x.new_empty(x.shape[0])), "result 1 has dtype"),
    "device": (lambda x: (right_fake(x)[0].to("meta"), right_fake(x)[1]), "result 0 has device"),
}


@pytest.mark.parametrize("wrong", [None, *FAKES])
def test_fakes(library: torch.library.Library, wrong: str | None) -> None:
    library.define("op(Tensor x) -> (Tensor, Tensor)")

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return (x + x).contiguous(), x.float().sum(1)

    library.impl("op", run, "CompositeExplicitAutograd")
    fake, match = FAKES[wrong] if wrong else (right_fake, "")
    torch.library.register_fake("cmpose_test_assertions::op", fake, lib=library)
    op = torch.ops.cmpose_test_assertions.op.default
    for x in (torch.ones(2, 5).half(), torch.ones(5, 2).half().T):
        if wrong is None:
            assert_fake_matches(op, [x])
            assert_fake_matches(op, [x[:0]])
        elif wrong != "strides" or x.is_contiguous():
            with pytest.raises(AssertionError, match=match):
                assert_fake_matches(op, [x])


def test_a_fake_that_keeps_the_strides_of_its_input(library: torch.library.Library) -> None:
    """The most common mistake: right for contiguous inputs and wrong for permuted ones."""
    library.define("like(Tensor x) -> Tensor")
    library.impl("like", lambda x: (x + x).contiguous(), "CompositeExplicitAutograd")
    torch.library.register_fake("cmpose_test_assertions::like", torch.empty_like, lib=library)
    op = torch.ops.cmpose_test_assertions.like.default
    assert_fake_matches(op, [torch.ones(2, 5)])
    with pytest.raises(AssertionError, match=r"strides \[2, 1\], its fake \[1, 5\]"):
        assert_fake_matches(op, [torch.ones(2, 5).T])


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 3), (2, 3, 4, 5)], ids=str)
def test_hostile_gradients_stay_in_their_memory_and_differ(shape: tuple[int, ...]) -> None:
    names = []
    for name, grad in hostile_gradients(shape, torch.empty(0)):
        names.append(name)
        assert grad.shape == shape
        # as_strided raises where this would leave the memory.
        misread = grad.as_strided(shape, torch.empty(shape).stride())
        assert not grad.is_contiguous() or grad.storage_offset() or grad.numel() == 1
        assert torch.equal(misread, grad) == grad.is_contiguous()
    assert len(set(names)) == len(names) >= min(2 * sum(n > 1 for n in shape), 1)
    assert [g for _, g in hostile_gradients((0, 3), torch.empty(0))] == []


class _Cube(torch.autograd.Function):
    """x³; ``assume`` is what its backward takes the gradient for."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, assume: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.assume = assume
        return x * x * x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return 3 * x * x * ctx.assume(grad), None


def _as_contiguous(grad: Tensor) -> Tensor:
    """What a kernel reads if it takes a gradient's pointer and ignores its strides."""
    return grad.as_strided(grad.shape, torch.empty(grad.shape).stride())


def _as_dense_rows(grad: Tensor) -> Tensor:
    """What a kernel reads if it takes the first stride and assumes the others."""
    return grad.as_strided(grad.shape, (grad.stride(0), *torch.empty(grad.shape).stride()[1:]))


def _without_offset(grad: Tensor) -> Tensor:
    return grad.as_strided(grad.shape, grad.stride(), 0)


@pytest.mark.parametrize("dtype", [torch.float64, *LOW], ids=str)
def test_gradient_strides(dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, 5, dtype=dtype, requires_grad=True)
    y = torch.randn(3, 4, 5, dtype=dtype, requires_grad=True)
    assert_gradient_strides(lambda x, y: (_Cube.apply(x, lambda g: g), x.sum(), x * y), [x, y])
    assert_gradient_strides(lambda x: x.mean((1, 2)), [x])
    for assume in (_as_contiguous, _as_dense_rows, _without_offset):
        with pytest.raises(AssertionError, match="input 0's gradient has"):
            assert_gradient_strides(lambda x, assume=assume: (x + 1, _Cube.apply(x, assume)), [x])
    with pytest.raises(AssertionError, match="no output carries a gradient"):
        assert_gradient_strides(lambda x: x.detach(), [x])
    empty = torch.randn(0, 4, dtype=dtype, requires_grad=True)
    assert_gradient_strides(lambda x: _Cube.apply(x, _as_contiguous), [empty])


def test_repeats() -> None:
    values = torch.randn(3000, generator=torch.Generator().manual_seed(0))
    assert_repeats(lambda: (values.sum(), values * 2, 7))
    order = random.Random(0)

    def racing() -> Tensor:
        """Partial sums are added in the order in which they happen to arrive."""
        parts = list(values.view(60, 50).sum(1))
        order.shuffle(parts)
        total = torch.zeros(())
        for part in parts:
            total = total + part
        return total

    torch.testing.assert_close(racing(), racing())  # a tolerance would not show it
    with pytest.raises(
        AssertionError, match=r"call \d of 5 differs from the first, result 0: 1 of"
    ):
        assert_repeats(racing)


def test_same_bits() -> None:
    a = torch.tensor([1.0, float("nan"), 0.0])
    assert_same_bits((a, [a.half()]), (a.clone(), [a.half()]))
    assert_same_bits(a[:0], a[:0])
    for planted, match in (
        (a * torch.tensor([1, 1, -1]), r"1 of 3 elements .* \(2,\): -0.0, not 0.0"),
        (a + torch.tensor([2**-23, 0, 0]), r"the first is \(0,\)"),
        (a.half(), "dtype"),
        (a[None], "shape"),
        (torch.stack([a, a], 1)[:, 0], "strides"),
    ):
        with pytest.raises(AssertionError, match=match):
            assert_same_bits(planted, a)


@pytest.mark.parametrize(
    "dtype", [*LOW, torch.float64, torch.int64, torch.int32, torch.uint8, torch.bool], ids=str
)
def test_poisoned_memory(dtype: torch.dtype) -> None:
    before = torch.are_deterministic_algorithms_enabled()
    with poisoned_memory():
        for tensor in (torch.empty(3, dtype=dtype), torch.ones(3).new_empty(3, dtype=dtype)):
            if dtype.is_floating_point:
                assert tensor.isnan().all()
            else:
                assert (tensor == (dtype == torch.bool or torch.iinfo(dtype).max)).all()
    assert torch.are_deterministic_algorithms_enabled() == before

    def partial() -> Tensor:
        """Writes all but the last element, over memory that happens to be right."""
        out = torch.empty(4, dtype=dtype)
        if not torch.are_deterministic_algorithms_enabled():
            out.zero_()
        out[:3] = 0
        return out

    def whole() -> Tensor:
        return torch.empty(4, dtype=dtype).zero_()

    assert_writes_everything(whole)
    with pytest.raises(AssertionError, match=r"in poisoned memory, result 0: 1 of 4 .* \(3,\)"):
        assert_writes_everything(partial)


def test_poison_is_taken_away_after_an_error() -> None:
    def fail() -> None:
        with poisoned_memory():
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not torch.are_deterministic_algorithms_enabled()
