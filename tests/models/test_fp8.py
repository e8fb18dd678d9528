"""Linear maps in fp8, emulated and by torch's own call: values and gradients against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cmpose.models import fp8
from cmpose.models.criss_cross import CrissCross
from cmpose.models.layers import Linear
from cmpose.train.flops import counter
from tests.models.builders import small_config

SCALED = str(torch.ops.aten._scaled_mm)

KINDS = pytest.mark.parametrize("emulate", [True, False], ids=["emulated", "torch"])
U = {fp8.FORWARD: 2.0**-4, fp8.BACKWARD: 2.0**-3}
STEP = {fp8.FORWARD: 2.0**-9, fp8.BACKWARD: 2.0**-16}
"""Half a unit in the last place of numbers from 1 to 2, and the distance of the smallest ones."""


def rounding(x: Tensor, dtype: torch.dtype) -> Tensor:
    """By how much each number may change, from the format and the definition of its scale."""
    x = x.double().abs()
    scale = 2.0 ** -torch.floor(torch.log2(torch.finfo(dtype).max / x.max()))
    return torch.maximum(U[dtype] * x, scale * STEP[dtype] / 2)


def assert_product(actual: Tensor, a: Tensor, b: Tensor, kinds: tuple[torch.dtype, ...]) -> None:
    """got = a b to the rounding of both, of float32 sums and of the result; not much better."""
    a, b = a.double(), b.double()
    da, db = rounding(a, kinds[0]), rounding(b, kinds[1])
    bound = da @ b.abs() + a.abs() @ db + da @ db
    bound += (a.abs() @ b.abs()) * a.shape[1] * 2.0**-23
    exact = a @ b
    bound += (exact.abs() + bound) * torch.finfo(actual.dtype).eps / 2
    error = (actual.double() - exact).abs()
    assert (error <= bound).all()
    assert error.mean() > 0.01 * bound.mean(), "products are in fp8"


def case(dtype: torch.dtype, rows: int = 37) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [1, rows, 32], W [48, 32], b [48], a gradient, whose sizes differ by 2⁸."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1, rows, 32, generator=g) * torch.exp2(torch.randn(rows, 1, generator=g) * 4)
    weight, bias = torch.randn(48, 32, generator=g) * 0.02, torch.randn(48, generator=g)
    gradient = torch.randn(1, rows, 48, generator=g) * 1e-5
    return x.to(dtype).requires_grad_(), weight.requires_grad_(), bias.requires_grad_(), gradient


@KINDS
@pytest.mark.parametrize("rows", [37, 48])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_values_and_gradients_are_right_to_rounding(emulate, rows, dtype) -> None:
    x, weight, bias, gradient = case(dtype, rows)
    gradient = gradient.to(dtype)
    nothing = torch.zeros(48, requires_grad=True)
    (y,) = fp8.linears(x, (weight, nothing), emulate=emulate)
    assert y.dtype == dtype
    assert y.shape == (1, rows, 48)
    d_x, d_weight, d_bias = torch.autograd.grad(y, [x, weight, nothing], gradient)
    assert d_x.dtype == dtype
    assert d_weight.dtype == d_bias.dtype == torch.float32
    flat, g = x.detach()[0], gradient[0]
    forward, backward = fp8.FORWARD, fp8.BACKWARD
    assert_product(y.detach()[0], flat, weight.detach().t(), (forward, forward))
    assert_product(d_x[0], g, weight.detach(), (backward, forward))
    assert_product(d_weight, g.t(), flat, (backward, forward))
    torch.testing.assert_close(d_bias.double(), g.double().sum(0), rtol=1e-5, atol=1e-9)
    (with_bias,) = fp8.linears(x, (weight, bias), emulate=emulate)
    expected = y.detach().double() + bias.to(dtype).double()
    size = y.detach().abs().max().item() + bias.abs().max().item()
    atol = 2 * size * max(torch.finfo(dtype).eps, 2.0**-22)
    torch.testing.assert_close(with_bias.double(), expected, rtol=0, atol=atol)


def test_the_emulation_takes_torchs_products() -> None:
    """What the two rounded is the same: sums of 16-bit results differ in their order alone."""
    results = []
    for emulate in (True, False):
        x, weight, bias, gradient = case(torch.bfloat16)
        (y,) = fp8.linears(x, (weight, bias), emulate=emulate)
        results.append([y, *torch.autograd.grad(y, [x, weight, bias], gradient.bfloat16())])
    for a, b in zip(*results, strict=True):
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=2 * eps, atol=float(a.detach().abs().max()) * 2**-20)


@pytest.mark.parametrize("dtype", [fp8.FORWARD, fp8.BACKWARD])
@pytest.mark.parametrize("size", [1.0, 448.0, 448.0001, 3e-20, 3e38, 57344.0])
def test_the_scale_is_the_least_power_of_two_that_holds_the_largest(dtype, size) -> None:
    x = torch.tensor([[0.3, -1.0, 1e-3, 0.0]]) * size
    values, scale = fp8.quantize(x, dtype)
    assert torch.frexp(scale).mantissa == 0.5
    largest = torch.finfo(dtype).max
    assert largest / 2 * (1 - 2**-23) < x.abs().max() / scale <= largest * (1 + 2**-23)
    error = (values.double() * scale.double() - x.double()).abs()
    assert (error <= rounding(x, dtype)).all()


def test_numbers_that_are_none_stay_so_and_zeros_are_zeros() -> None:
    values, scale = fp8.quantize(torch.zeros(2, 16), fp8.FORWARD)
    assert (values.float() == 0).all()
    assert scale.isfinite()
    weight = torch.randn(16, 16)
    for bad in (float("nan"), float("inf")):
        x = torch.randn(3, 16)
        x[1, 2] = bad
        for emulate in (True, False):
            (y,) = fp8.linears(x, (weight, None), emulate=emulate)
            assert y[1].isnan().all()


def test_several_maps_of_one_input_are_each_its_own() -> None:
    x, weight, bias, gradient = case(torch.bfloat16)
    other = (weight.detach() * 3 + 0.01).requires_grad_()
    g = gradient.bfloat16()
    both = fp8.linears(x, (weight, bias), (other, None), emulate=True)
    actual = torch.autograd.grad(both, [x, weight, other, bias], [g, 2 * g])
    (first,) = fp8.linears(x, (weight, bias), emulate=True)
    (second,) = fp8.linears(x, (other, None), emulate=True)
    one = torch.autograd.grad(first, [x, weight, bias], g)
    two = torch.autograd.grad(second, [x, other], 2 * g)
    assert torch.equal(both[0], first)
    assert torch.equal(both[1], second)
    for a, b in zip(actual, (one[0] + two[0], one[1], two[1], one[2]), strict=True):
        assert torch.equal(a, b)


def test_a_compiled_one_is_the_same() -> None:
    """One graph. Scales are powers of two, so that compiling cannot round otherwise."""
    results = []
    for compiled in (False, True):
        x, weight, bias, gradient = case(torch.float32)
        run = torch.compile(fp8.linears, fullgraph=True) if compiled else fp8.linears
        (y,) = run(x, (weight, bias), emulate=False)
        results.append([y, *torch.autograd.grad(y, [x, weight, bias], gradient)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=float(a.detach().abs().max()) * 1e-6)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_criss_cross_network_takes_its_products_in_fp8(depth: int) -> None:
    """All of them, in training mode alone, as one graph; as near to the plain one as fp8 is."""
    torch.manual_seed(0)
    network = CrissCross(32, 2, small_config(criss_cross_depth=depth, mlp_ratio=1.5)).train()
    network.reset_fusion()
    x = torch.randn(2, 3, 5, 32)
    plain = network(x)
    linears = [part for part in network.modules() if isinstance(part, Linear)]
    for part in linears:
        part.fp8 = "emulated"
    with counter() as products:
        eager = network(x)
    assert not torch.equal(eager, plain)
    assert (eager - plain).norm() < 0.1 * plain.norm()
    plain_flops = products.get_total_flops()
    for part in linears:
        part.fp8 = "card"
    with counter() as products:
        network(x.bfloat16())
    in_fp8 = products.get_flop_counts()["Global"].get(torch.ops.aten._scaled_mm, 0)
    attention = products.get_total_flops() - in_fp8
    assert in_fp8 > 0.9 * plain_flops - attention
    names = {str(name) for name in products.get_flop_counts()["Global"]}
    assert not any(name.endswith(("addmm", "mm", "addmm_")) for name in names - {SCALED}), names
    if depth == 2:
        for part in linears:
            part.fp8 = "emulated"
        compiled = torch.compile(network, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), eager)
    assert torch.equal(network.eval()(x), plain)
