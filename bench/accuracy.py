"""How far results are from exact ones: the reference in float64 on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases import BACKWARD, FORWARD, Case, OpBench, differentiable, floating

WRONG = 0.1
"""A relative error from which on a result is no result; bfloat16's is a hundredth of it."""


def relative_error(found: list[Tensor], exact: list[Tensor]) -> float:
    """‖found − exact‖ / ‖exact‖ over all tensors together."""
    difference = sum(
        float((a.double() - b).square().sum()) for a, b in zip(found, exact, strict=True)
    )
    size = sum(float(b.square().sum()) for b in exact)
    return (difference / size) ** 0.5 if size else difference**0.5


def outcome(
    function: Callable[..., Any], arguments: dict[str, Any], bench: OpBench, direction: str
) -> list[Tensor]:
    """What the error is taken of: floating results; the gradients too unless only forward."""
    result = function(**arguments)
    found = [t.detach() for t in floating(result)]
    if direction == FORWARD:
        return found
    outputs = differentiable(result)
    inputs = [arguments[name] for name in bench.gradients]
    upstream = [
        torch.linspace(-1, 2, o.numel(), dtype=torch.float64, device=o.device)
        .reshape(o.shape)
        .to(torch.bfloat16)  # the same numbers in every dtype
        .to(o.dtype)
        for o in outputs
    ]
    gradients = torch.autograd.grad(outputs, inputs, upstream)
    return list(gradients) if direction == BACKWARD else [*found, *gradients]


def exact_arguments(case: Case, bench: OpBench, device: str) -> tuple[Case, dict[str, Any]]:
    """A case small enough for float64, and its arguments as they are."""
    small = Case(case.op, case.direction, bench.exact_shape(case.shape), case.dtype)
    return small, bench.arguments(small, device, seed=1)


def exact_outcome(case: Case, bench: OpBench, arguments: dict[str, Any]) -> list[Tensor]:
    """The reference's in float64 on the same, already rounded inputs."""
    double = {
        name: value.detach().double().requires_grad_(value.requires_grad)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in arguments.items()
    }
    return outcome(
        lambda **kw: bench.call(**kw, backend="reference"), double, bench, case.direction
    )
