"""How far results are from exact ones: the op's reference in float64 on the same inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bench.harness.shapes import BACKWARD, FORWARD
from bench.harness.workload import OpBench, tensors

WRONG = 0.1
"""From this relative error on a result is a wrong one; bfloat16's is a hundredth of it."""


def relative_error(result: list[Tensor], exact: list[Tensor]) -> float:
    """‖result − exact‖ / ‖exact‖ over all tensors together."""
    pairs = zip(result, exact, strict=True)
    difference = sum(float((a.double() - b).square().sum()) for a, b in pairs)
    size = sum(float(b.square().sum()) for b in exact)
    return (difference / size) ** 0.5 if size else difference**0.5


def outcome(
    function: Callable[..., Any], arguments: dict[str, Any], bench: OpBench, direction: str
) -> list[Tensor]:
    """What the error is taken of: floating results; the gradients too unless only forward."""
    result = function(**arguments)
    values = [t.detach() for t in tensors(result) if t.is_floating_point()]
    if direction == FORWARD:
        return values
    outputs = [t for t in tensors(result) if t.requires_grad]
    inputs = [arguments[name] for name in bench.gradients]
    # By way of bfloat16, so the same numbers in every dtype.
    spread = [torch.linspace(-1, 2, o.numel(), device=o.device).view(o.shape) for o in outputs]
    upstream = [s.bfloat16().to(o.dtype) for s, o in zip(spread, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, inputs, upstream)
    return list(gradients) if direction == BACKWARD else [*values, *gradients]


def exact_outcome(arguments: dict[str, Any], bench: OpBench, direction: str) -> list[Tensor]:
    """The reference's in float64 on the same, already rounded inputs."""

    def exact(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)

    double = pytree.tree_map_only(Tensor, exact, arguments)
    return outcome(lambda **kw: bench.call(**kw, backend="reference"), double, bench, direction)
