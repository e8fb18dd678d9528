"""Random calls of every op on every backend: right against float64, or refused by argument.

A call is drawn from its number, so that a number is all that is needed to see it again.
"""

from __future__ import annotations

import inspect
import math
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from cmpose import ops
from tests.fuzz.conftest import FACTOR
from tests.ops.support.cases import (
    CASES,
    OPTIONS,
    OpCase,
    differentiable,
    dtypes_of,
    gradients,
    leaves,
)

HOSTILE: tuple[Any, ...] = (
    *(None, "", "mean", True, 0, -1, 1, 2, 7, 2**31, 2**63, -(2**63) - 1, 10**400),
    *(
        0.0,
        -0.5,
        0.5,
        1e-200,
        1e300,
        math.nan,
        math.inf,
        -math.inf,
        1j,
        [],
        [1],
        (2, 3),
        {},
        object(),
    ),
)
SCALARS: dict[str, tuple[str, ...]] = {
    "spatial_attention": ("lengths", "scale", "return_lse"),
    "temporal_attention": ("lengths", "causal", "scale"),
    "corrupt_tokens": (
        *("mask_ratio", "noise_ratio", "noise_std", "selection", "position_after", "first_clip"),
        "seed",
    ),
    "reconstruction_loss": ("per_channel", "normalizer"),
    "heatmap_loss": ("sigma", "normalizer"),
    "warp_clips": ("mean", "std", "dtype"),
    "select_tokens": ("importance",),
    "dpc_knn": ("scale", "include_self", "peak_delta", "metric", "return_neighbors", "valid"),
    "knn": ("include_self", "metric", "radius", "valid"),
    "merge_clusters": ("normalize",),
}
"""Options that the cases leave out, by op."""

BACKENDS = {case.id: case.backends for case in (*CASES.values(), *OPTIONS)}


def hostile_tensor(value: Tensor, draw: random.Random) -> Any:
    """A tensor that is not what it should be, or something else."""
    changes: tuple[Callable[[], Any], ...] = (
        lambda: draw.choice(HOSTILE),
        lambda: value[..., :0],
        lambda: value[:1],
        lambda: value.flatten(),
        lambda: value[None],
        lambda: value.to(draw.choice([torch.int32, torch.bool, torch.float64, torch.complex64])),
        lambda: value.to_sparse(),
        lambda: torch.nested.nested_tensor(list(value)),
        lambda: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
        lambda: value.to("meta"),
        lambda: torch.full_like(value, draw.choice([-1, 0, 1, 100])),
        lambda: torch.full_like(value, draw.choice([math.nan, math.inf, 1e30])),
    )
    try:
        return draw.choice(changes)()
    except (RuntimeError, TypeError, IndexError, OverflowError):
        return None  # the change does not exist for this tensor


def odd_layout(value: Tensor, draw: random.Random) -> Tensor:
    """The same numbers elsewhere in memory: strided, permuted, offset, or one clip expanded."""
    kind = draw.randrange(6)
    if kind == 0 and value.ndim:
        return torch.stack((value, torch.zeros_like(value)), dim=-1)[..., 0]
    if kind == 1 and value.ndim > 1:
        order = draw.sample(range(value.ndim), value.ndim)
        back = [order.index(i) for i in range(value.ndim)]
        return value.permute(order).contiguous().permute(back)
    if kind == 2:
        room = torch.zeros(value.numel() + 3, dtype=value.dtype)
        room[3:] = value.flatten()
        return room[3:].view(value.shape)
    if kind == 3 and value.ndim:
        return value[:1].expand_as(value)
    return value


class Drawn:
    """A call: its op, backend and arguments."""

    def __init__(self, number: int) -> None:
        draw = self.draw = random.Random(number)
        self.case: OpCase = draw.choice([*CASES.values(), *OPTIONS])
        self.backend = draw.choice(BACKENDS[self.case.id])
        # The interpreter takes a second for what others do in a millisecond.
        if self.backend == "triton" and draw.random() < 0.95:
            self.backend = "auto"
        self.dtype = draw.choice(dtypes_of(self.backend))
        names = list(inspect.signature(self.case.make).parameters)[2:]
        sizes = dict(self.case.kernel_sizes)
        if draw.random() < 0.7:
            choices = [1, 2, 3] if self.backend == "triton" else [1, 2, 3, 5, 8, 13, 17]
            sizes |= {n: draw.choice(choices) for n in names if n not in "dHhw"}
        self.kwargs = self.case.make(draw.choice([0, 1, 2, 3]), self.dtype, **sizes)
        self.changed = draw.random() < 0.5
        self.kwargs = {n: odd_layout(v, draw) for n, v in self.kwargs.items()}
        if self.changed:
            self.change()
        self.poisoned = not self.changed and draw.random() < 0.15
        if self.poisoned:
            name = draw.choice([n for n in self.kwargs if n in self.case.floating] or [""])
            if name and self.kwargs[name].numel():
                value = self.kwargs[name].contiguous().clone()
                value.view(-1)[draw.randrange(value.numel())] = draw.choice([math.nan, math.inf])
                self.kwargs[name] = value

    def change(self) -> None:
        """Makes one argument another than it should be."""
        draw, options = self.draw, SCALARS.get(self.case.id, ())
        if options and draw.random() < 0.6:
            self.kwargs[draw.choice(options)] = draw.choice(HOSTILE)
            return
        name = draw.choice(list(self.kwargs))
        self.kwargs[name] = hostile_tensor(self.kwargs[name], draw)

    def __str__(self) -> str:
        shown = {
            n: f"{v.dtype}{list(v.shape)}" if isinstance(v, Tensor) and not v.is_nested else repr(v)
            for n, v in self.kwargs.items()
        }
        return f"{self.case.name} on {self.backend}: {shown}"

    def run(self, backend: str, kwargs: dict[str, Any]) -> list[Any]:
        return leaves(self.case.call(**kwargs, backend=backend))


def assert_named(error: Exception, call: Drawn) -> None:
    """The message begins with an argument's name, or is the backend's refusal."""
    text = str(error)
    if isinstance(error, ops.BackendUnavailable):
        assert text.startswith(f"{call.case.name} cannot run on backend"), f"{call}: {text}"
        return
    function = getattr(ops, call.case.name)
    names = {*inspect.signature(function).parameters, *("q", "k", "v")}
    names |= {"selection.causal", "selection.noncausal"}
    first = re.split(r"[\s:(]", text, maxsplit=1)[0]
    assert first in names, f"{call}: {type(error).__name__}: {text}"


def assert_in_range(outputs: list[Any], call: Drawn) -> None:
    """No index lies outside what it indexes."""
    sizes = {
        "select_tokens": lambda: [call.kwargs["logits"].shape[2]] * 2,
        "dpc_knn": lambda: [call.kwargs["tokens"].shape[1], 4],  # centres; clusters
        "knn": lambda: [call.kwargs["tokens"].shape[1], call.kwargs["tokens"].shape[1] + 1],
    }
    tensors = [t for t in outputs if isinstance(t, Tensor) and not t.is_meta]
    indices = [t for t in tensors if t.dtype == torch.int64]
    for out, size in zip(indices, sizes[call.case.name]() if indices else (), strict=False):
        if out.numel():
            assert int(out.min()) >= 0, f"{call}: an index is {int(out.min())}"
            assert int(out.max()) < size, f"{call}: an index is {int(out.max())} of {size}"


def assert_right(outputs: list[Any], call: Drawn) -> None:
    """As the reference in float64, up to the rounding of the dtype."""
    exact = {
        n: v.double() if isinstance(v, Tensor) and n in call.case.floating else v
        for n, v in call.kwargs.items()
    }
    assert_close(outputs, call.run("reference", exact), call, "result")


def assert_close(
    outputs: Sequence[Any], truth: Sequence[Any], call: Drawn, what: str, terms: float = 1e-3
) -> None:
    """The same up to the rounding of the call's dtype, of sums whose terms are about ``terms``."""
    eps = torch.finfo(call.dtype).eps
    for index, (actual, expected) in enumerate(zip(outputs, truth, strict=True)):
        if not isinstance(actual, Tensor):
            continue
        assert actual.shape == expected.shape, (
            f"{call}: {what} {index} has shape {list(actual.shape)}"
        )
        if not actual.is_floating_point() or not actual.numel():
            continue
        if call.case.name == "dpc_knn" and index:
            continue  # δ, centres and clusters hang on near-ties; tests/ops has the bound
        finite = expected.isfinite()
        assert torch.equal(actual.isfinite(), finite), f"{call}: {what} {index} is not finite"
        scale = float(expected[finite].abs().max()) if finite.any() else 0.0
        error = float((actual.double() - expected)[finite].abs().max()) if finite.any() else 0.0
        # A logit of |q| |k| moves a weight by that share of an ulp; here they are below 64.
        assert error <= 64 * eps * max(scale, terms) + 1e-4 * scale, (
            f"{call}: {what} {index} is off by {error:.3g} of {scale:.3g}"
        )


def assert_gradients_right(call: Drawn) -> None:
    """As the reference's in float64, up to the rounding of the dtype."""
    both = []
    for dtype, backend in ((call.dtype, call.backend), (torch.float64, "reference")):
        kwargs = {n: v.to(dtype) if n in call.case.floating else v for n, v in call.kwargs.items()}
        inputs = [kwargs[n].detach().requires_grad_() for n in call.case.gradients]
        kwargs |= zip(call.case.gradients, inputs, strict=True)
        outputs = differentiable(call.case.call(**kwargs, backend=backend))
        both.append(gradients(outputs, inputs, call.dtype))
    assert_close(*both, call, "gradient", terms=1.0)  # which may cancel


@pytest.mark.filterwarnings("ignore")
def test_random_calls(hunt: Callable[..., None]) -> None:
    def check(number: int) -> None:
        call = Drawn(number)
        try:
            with torch.no_grad():
                if call.poisoned:
                    with ops.without_value_checks():
                        outputs = call.run(call.backend, call.kwargs)
                else:
                    outputs = call.run(call.backend, call.kwargs)
        except (TypeError, ValueError, ops.BackendUnavailable) as error:
            assert_named(error, call)
            return
        except Exception as error:
            raise AssertionError(f"{call}: {type(error).__name__}: {error}") from error
        assert_in_range(outputs, call)
        if not call.changed and not call.poisoned:
            assert_right(outputs, call)
            if call.case.gradients and number % 2:
                assert_gradients_right(call)

    hunt(check, st.integers(0, 2**62), tries=300 if FACTOR == 1 else 600, shrink=False)
