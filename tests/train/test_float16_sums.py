"""Products summed in float16: by hand, against a loop in float64, and all of a training step."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.flop_counter import flop_registry

from cmpose.train import train as training
from cmpose.train.float16_sums import CONVOLUTIONS, PRODUCTS, STEP, Float16Sums, product
from cmpose.train.train import Interrupted
from tests.recipes import FINE, recipe
from tests.train.test_train import lines


def by_loop(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a [M, K] b [K, N] as the equation reads: exact sums in float64, rounded after each step."""
    out = np.zeros((a.shape[0], b.shape[1]), np.float16)
    for i, j in np.ndindex(*out.shape):
        products, total = a[i].astype(np.float64) * b[:, j].astype(np.float64), np.float16(0)
        for k in range(0, len(products), STEP):
            total = np.float16(np.float64(total) + products[k : k + STEP].sum())
        out[i, j] = total
    return out


def few_bits(*shape: int, seed: int = 0) -> Tensor:
    """Multiples of 1/16 up to 4, of which float32 sums are exact, and float16 sums are not."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randint(-64, 65, shape, generator=g) / 16).half()


@pytest.mark.parametrize("inner", [1, 8, 61, 200])
def test_it_is_the_equation_bit_for_bit(inner) -> None:
    a, b = few_bits(3, 5, inner), few_bits(3, inner, 7, seed=1)
    actual = product(a, b)
    for index in range(3):
        assert np.array_equal(actual[index].numpy(), by_loop(a[index].numpy(), b[index].numpy()))
        assert torch.equal(product(a[index], b[index]), actual[index])
    exact = (a.double() @ b.double()).half()
    assert torch.equal(product(a, b, step=None), exact)
    if inner == 200:
        assert (actual != exact).float().mean() > 0.5, "float16 loses digits"


def row(*values: float) -> Tensor:
    return product(torch.tensor([values]).half(), torch.ones(len(values), 1).half())[0, 0]


def test_cases_by_hand() -> None:
    """From 2048 on float16 numbers are 2 apart, from 16384 on 16."""
    rest = [0.0] * (STEP - 1)
    assert row(2048.0, *rest, *[1.0, *rest] * 50) == 2048, "each 1 is lost: 2049 is a tie, to even"
    assert row(2048.0, *[1.0] * 7) == 2056, "summed within a step, 2055 is rounded once"
    assert row(*[1.0] * 4096) == 4096
    assert row(*[1.0] * 20000) == 16384, "8 more are half of what numbers are apart"
    assert row(60000.0, 60000.0, -60000.0) == 60000, "no float16 number in between within a step"
    assert row(60000.0, *rest, 60000.0, *rest, -60000.0).isinf()
    tiny = torch.tensor([[2.0**-14]]).half()
    assert product(tiny, torch.tensor([[2.0**-10]]).half()) == 2.0**-24, "subnormal numbers count"
    assert torch.equal(product(torch.ones(2, 0).half(), torch.ones(0, 3).half()), torch.zeros(2, 3))


def test_ordinary_numbers_are_off_by_the_roundings_alone() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*shape, generator=g).half() for shape in ((64, 768), (768, 48)))
    exact, bound = a.double() @ b.double(), torch.zeros(64, 48, dtype=torch.float64)
    for end in range(STEP, 768 + STEP, STEP):  # each rounds a sum that is off already
        total = (a[:, :end].double() @ b[:end].double()).abs()
        bound += (total + bound) * (2.0**-11 + 2.0**-20)
    error = (product(a, b).double() - exact).abs()
    assert (error <= bound).all()
    once = (exact.half().double() - exact).abs()
    assert error.mean() > 3 * once.mean()


def test_bad_numbers_are_refused_and_stay_what_they_are() -> None:
    with pytest.raises(ValueError, match=r"b is torch\.float32: sums in float16 are of float16"):
        product(few_bits(2, 2), few_bits(2, 2).float())
    a = few_bits(2, 16)
    a[1, 3] = float("nan")
    assert torch.equal(product(a, few_bits(16, 2)).isnan(), torch.tensor([[False] * 2, [True] * 2]))


def test_values_and_gradients_of_a_linear_map_are_such_sums() -> None:
    x, weight, bias = few_bits(50, 40), few_bits(24, 40, seed=1), few_bits(24, seed=2)
    gradient = few_bits(50, 24, seed=3)
    leaves = [part.requires_grad_() for part in (x, weight, bias)]
    with Float16Sums():
        y = F.linear(*leaves)
        d_x, d_weight, d_bias = torch.autograd.grad(y, leaves, gradient)
        outside = x.detach().float() @ weight.detach().float().t()
    x, weight, bias = (part.detach() for part in leaves)
    assert torch.equal(y, (product(x, weight.t()).float() + bias.float()).half())
    assert torch.equal(d_x, product(gradient, weight))
    assert torch.equal(d_weight, product(gradient.t(), x))
    assert torch.equal(d_bias, gradient.sum(0))
    assert torch.equal(outside, x.float() @ weight.float().t()), "float32 products are plain"
    assert not torch.equal(y, F.linear(x, weight, bias))


def test_what_is_added_to_is_added_to() -> None:
    a, b, c = few_bits(3, 5, 40), few_bits(3, 40, 7, seed=1), few_bits(3, 5, 7, seed=2)
    with Float16Sums():
        outside = torch.baddbmm(c, a, b, beta=2, alpha=0.5)
        inside = c.clone()
        assert inside.baddbmm_(a, b, beta=2, alpha=0.5) is inside
        flat = c[0].clone()
        flat.addmm_(a[0], b[0])
    expected = (product(a, b).float() / 2 + 2 * c.float()).half()
    assert torch.equal(outside, expected)
    with Float16Sums(step=None):
        once = torch.baddbmm(c, a, b)
    assert torch.equal(once, ((a.float() @ b.float()).half().float() + c.float()).half())
    assert torch.equal(inside, expected)
    assert torch.equal(flat, (product(a[0], b[0]).float() + c[0].float()).half())


def test_a_convolution_is_torchs_own() -> None:
    x, weight, bias = few_bits(2, 3, 9, 8), few_bits(4, 3, 3, 3, seed=1), few_bits(4, seed=2)
    results = []
    for emulate in (False, True):
        leaves = [part.clone().requires_grad_() for part in (x, weight, bias)]
        with Float16Sums() if emulate else torch.enable_grad():
            y = F.conv2d(*leaves, padding=1)
            results.append([y, *torch.autograd.grad(y.sum(), leaves)])
    for plain, emulated in zip(*results, strict=True):
        assert emulated.dtype == torch.float16
        torch.testing.assert_close(emulated, plain, rtol=2.0**-10, atol=0)


class Seen(TorchDispatchMode):
    """Counts operators of which torch counts operations, if they have float16 arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        halves = any(isinstance(a, Tensor) and a.dtype == torch.float16 for a in args)
        if halves and func._overloadpacket in flop_registry:
            self.calls[func] += 1
        return func(*args, **kwargs or {})


def test_all_products_of_a_step_are_reached_and_none_of_an_evaluation(
    rendered, tmp_path, monkeypatch
):
    fields = {**FINE, "train.epochs": 1, "train.batch_size": 8, "model.head": "token"}
    modes, mode = [], Seen()

    def ended(*_, **__):
        modes.append(_get_current_dispatch_mode_stack())
        raise Interrupted

    def watched(self, batch):
        with mode:
            return step(self, batch)

    step = training.Trainer.step
    monkeypatch.setattr(training, "evaluate_model", ended)
    with pytest.raises(Interrupted):
        training.train(recipe(rendered, **fields), tmp_path / "plain", progress=False)
    monkeypatch.setattr(training.Trainer, "step", watched)
    fields |= {"train.products": "fp16_accumulate_emulated", "train.precision": "fp16"}
    with pytest.raises(Interrupted):
        training.train(recipe(rendered, **fields), tmp_path / "emulated", progress=False)
    assert modes == [[], []]
    assert mode.calls.keys() <= {*PRODUCTS, *CONVOLUTIONS}
    aten = torch.ops.aten
    assert {aten.mm.default, aten.addmm.default, aten.bmm.default} <= mode.calls.keys()
    logs = [[line["loss"] for line in lines(tmp_path / run)] for run in ("plain", "emulated")]
    assert logs[1][0] == pytest.approx(logs[0][0], rel=0.005)
    assert logs[1] != logs[0]
