"""What is fused for speed equals its plain formula: values and all gradients, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from cmpose.models import fused
from cmpose.models.criss_cross import CrissCross
from tests.models.builders import small_config

Function = Callable[[Tensor], Iterable[Tensor]]


def network(**fields) -> CrissCross:
    """A criss-cross network of width 8 in float64; every parameter counts in its results."""
    torch.manual_seed(0)
    criss_cross = CrissCross(8, 2, small_config(**fields)).double()
    for parameter in criss_cross.parameters():
        nn.init.normal_(parameter, std=0.5)
    return criss_cross


def assert_equal(parameters: Iterable[nn.Parameter], fast: Function, plain: Function) -> None:
    """Both give the same for one x [2, 3, 5, 8], and the same gradients to it and to parameters."""
    parameters = list(parameters)
    results = []
    for function in (fast, plain):
        x = torch.randn(2, 3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        outputs = list(function(x.requires_grad_()))
        weights = [torch.linspace(-1, 1 + i, o.shape[-1]).double() for i, o in enumerate(outputs)]
        loss = sum((o * w).square().sum() for o, w in zip(outputs, weights, strict=True))
        gradients = torch.autograd.grad(loss, [x, *parameters], allow_unused=True)
        results.append([*outputs, *gradients])
    for a, b in zip(*results, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_shared_projections() -> None:
    criss_cross = network()
    blocks = criss_cross.first.spatial[0], criss_cross.first.temporal[0]
    assert_equal(
        criss_cross.parameters(),
        lambda x: fused.shared_projections(x, *blocks),
        lambda x: [block.attn.qkv(block.norm1(x)) for block in blocks],
    )


def test_the_gradient_of_two_projections_is_written_out_rightly() -> None:
    tensors = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((2, 3, 5, 8), (24, 8), (24,), (24, 8), (24,))
    ]
    assert torch.autograd.gradcheck(fused._TwoProjections.apply, tensors)


def test_two_projections_have_no_forward_derivative_that_is_silently_zero() -> None:
    x, weight, bias = torch.randn(2, 3, 8), torch.randn(4, 8), torch.randn(4)
    with forward_ad.dual_level():
        for n in range(5):
            tensors = [x, weight, bias, weight, bias]
            tensors[n] = forward_ad.make_dual(tensors[n], torch.ones_like(tensors[n]))
            with pytest.raises(NotImplementedError, match="jvp"):
                fused._TwoProjections.apply(*tensors)
        a = x.clone().requires_grad_()
        out, _ = fused._TwoProjections.apply(a, weight, bias, weight, bias)
        upstream = forward_ad.make_dual(torch.ones_like(out), torch.full_like(out, 2.0))
        [gradient] = torch.autograd.grad(out, a, upstream)
        primal, tangent = forward_ad.unpack_dual(gradient)
        torch.testing.assert_close(tangent, 2 * primal)


def test_block_from_qkv() -> None:
    block = network().first.temporal[0]
    assert_equal(
        block.parameters(),
        lambda x: [fused.block_from_qkv(block, x, block.attn.qkv(block.norm1(x)))],
        lambda x: [block(x)],
    )


@pytest.mark.parametrize("recompute", [True, False])
def test_both_stacks(recompute: bool) -> None:
    criss_cross = network(criss_cross_depth=2, checkpoint_activations=recompute)
    stacks = criss_cross.first.spatial, criss_cross.first.temporal
    assert_equal(
        criss_cross.parameters(),
        lambda x: fused.both_stacks(*stacks, x),
        lambda x: [stack(x) for stack in stacks],
    )


def test_linear_of_concat() -> None:
    a, b = network().fuse_first, network().fuse_second
    assert_equal(
        (*a.parameters(), *b.parameters()),
        lambda x: [fused.linear_of_concat(x, x.sin(), a, b)],
        lambda x: [
            nn.functional.linear(
                torch.cat([x, x.sin()], dim=-1), torch.cat([a.weight, b.weight], dim=1), a.bias
            )
        ],
    )


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("depth", [1, 2])
def test_the_criss_cross_network_is_equation_5(shared: bool, recompute: bool, depth: int) -> None:
    """Linear(D_T(D_S(X)) ⊕ D_S(D_T(X))), block by block."""
    criss_cross = network(
        share_pathways=shared, checkpoint_activations=recompute, criss_cross_depth=depth
    )
    first, second = criss_cross.first, criss_cross.second or criss_cross.first

    def plain(x: Tensor) -> list[Tensor]:
        one, other = x, x
        for block in (*first.spatial, *first.temporal):
            one = block(one)
        for block in (*second.temporal, *second.spatial):
            other = block(other)
        both = torch.cat([one, other], dim=-1)
        weight = torch.cat([criss_cross.fuse_first.weight, criss_cross.fuse_second.weight], dim=1)
        return [nn.functional.linear(both, weight, criss_cross.fuse_first.bias)]

    assert_equal(criss_cross.parameters(), lambda x: [criss_cross(x)], plain)
