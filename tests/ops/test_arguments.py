"""The op contract, point 13: arguments that do not fit, for all ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops.support.cases import CASES, OpCase


def _tensors(case: OpCase) -> list[str]:
    return [n for n, v in case.make(2, torch.float32).items() if isinstance(v, Tensor)]


ARGUMENTS = [(case, name) for case in CASES.values() for name in _tensors(case)]
every_argument = pytest.mark.parametrize(
    ("case", "name"), ARGUMENTS, ids=[f"{case.name}-{name}" for case, name in ARGUMENTS]
)


def _shown(name: str) -> str:
    """What a message calls an argument."""
    return {
        "causal_index": r"selection\.causal",
        "noncausal_index": r"selection\.noncausal",
    }.get(name, name)


@every_argument
def test_not_a_tensor(case: OpCase, name: str) -> None:
    made = case.make(2, torch.float32)
    made[name] = 3
    with pytest.raises(TypeError, match=rf"^{_shown(name)} must be .*[Tt]ensor.* got int"):
        case.call(**made)


@every_argument
def test_wrong_dtype(case: OpCase, name: str) -> None:
    made = case.make(2, torch.float32)
    made[name] = made[name].to(torch.int32)
    with pytest.raises(TypeError, match=rf"^{_shown(name)} must be of dtype .*got int32"):
        case.call(**made)


@every_argument
def test_wrong_shape(case: OpCase, name: str) -> None:
    made = case.make(2, torch.float32)
    made[name] = torch.stack([made[name]] * 2)
    with pytest.raises(ValueError, match=rf"^{_shown(name)} must "):
        case.call(**made)


@pytest.mark.parametrize(
    ("case", "name"),
    [(c, n) for c, n in ARGUMENTS if n not in ("seed", *_tensors(c)[:1])],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_sizes_that_disagree(case: OpCase, name: str) -> None:
    made = case.make(2, torch.float32)
    made[name] = torch.cat([made[name], made[name][-1:]])
    with pytest.raises(ValueError, match=r"^[\w.]+ must have shape .* got \["):
        case.call(**made)


@pytest.mark.parametrize(
    ("case", "name"),
    [(c, n) for c, n in ARGUMENTS if n not in _tensors(c)[:1]],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_wrong_device(case: OpCase, name: str) -> None:
    made = case.make(2, torch.float32)
    made[name] = made[name].to("meta")
    first = _tensors(case)[0]
    with pytest.raises(
        ValueError, match=rf"^{_shown(name)} must be on {first}'s device cpu, got meta"
    ):
        case.call(**made)
