"""The op contract, point 13: arguments that do not fit, for all ops."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cmpose import ops
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
    kwargs = case.make(2, torch.float32)
    kwargs[name] = "x"
    with pytest.raises(TypeError, match=rf"^{_shown(name)} must be .*[Tt]ensor.* got (str|'x')"):
        case.call(**kwargs)


@every_argument
def test_wrong_dtype(case: OpCase, name: str) -> None:
    kwargs = case.make(2, torch.float32)
    kwargs[name] = kwargs[name].to(torch.int32)
    with pytest.raises(TypeError, match=rf"^{_shown(name)} must be of dtype .*got int32"):
        case.call(**kwargs)


@every_argument
def test_wrong_shape(case: OpCase, name: str) -> None:
    kwargs = case.make(2, torch.float32)
    kwargs[name] = torch.stack([kwargs[name]] * 2)
    with pytest.raises(ValueError, match=rf"^{_shown(name)} must "):
        case.call(**kwargs)


@pytest.mark.parametrize(
    ("case", "name"),
    [(c, n) for c, n in ARGUMENTS if n not in ("seed", *_tensors(c)[:1])],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_sizes_that_disagree(case: OpCase, name: str) -> None:
    kwargs = case.make(2, torch.float32)
    kwargs[name] = torch.cat([kwargs[name], kwargs[name][-1:]])
    with pytest.raises(ValueError, match=r"^[\w.]+ must have shape .* got \["):
        case.call(**kwargs)


@pytest.mark.parametrize(
    ("case", "name"),
    [(c, n) for c, n in ARGUMENTS if n not in _tensors(c)[:1]],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_wrong_device(case: OpCase, name: str) -> None:
    kwargs = case.make(2, torch.float32)
    kwargs[name] = kwargs[name].to("meta")
    first = _tensors(case)[0]
    with pytest.raises(
        ValueError, match=rf"^{_shown(name)} must be on {first}'s device cpu, got meta"
    ):
        case.call(**kwargs)


PACKED: dict[str, Callable[[Tensor], Tensor]] = {
    "sparse": lambda t: t.to_sparse(),
    "nested": lambda t: torch.nested.nested_tensor([t.flatten()[:2], t.flatten()[:1]]),
    "jagged": lambda t: torch.nested.nested_tensor([t.flatten()], layout=torch.jagged),
    "mkldnn": lambda _: torch.ones(2).to_mkldnn(),
    "quantised": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8),
    "complex": lambda t: t.to(torch.complex64),
}


@pytest.mark.filterwarnings("ignore:.*nested tensors")
@every_argument
def test_tensors_that_are_not_dense(case: OpCase, name: str) -> None:
    for pack in PACKED.values():
        kwargs = case.make(2, torch.float32)
        kwargs[name] = pack(kwargs[name])
        with pytest.raises(TypeError, match=rf"^{_shown(name)} must be "):
            case.call(**kwargs)


NUMBERS = ("x", [1.0], True, math.nan, 10**400, -(10**400), torch.zeros(2), 1j)
FLAGS = ("x", None, 1, math.nan)
NAMES = ("x", None, 3, torch.zeros(2))
SCALARS = [
    ("spatial_attention", {"scale": (*NUMBERS, 1e300, -1e39), "return_lse": FLAGS}),
    ("temporal_attention", {"scale": (*NUMBERS, 1e300, -1e39), "causal": FLAGS}),
    (
        "corrupt_tokens",
        dict.fromkeys(("mask_ratio", "noise_ratio", "noise_std", "first_clip"), (*NUMBERS, None))
        | {"position_after": FLAGS, "selection": NAMES},
    ),
    ("reconstruction_loss", {"per_channel": FLAGS, "detach_target": FLAGS}),
    ("heatmap_loss", {"sigma": (*NUMBERS, None, 1e-200, 1e300)}),
    ("select_tokens", {"n": (*NUMBERS, None, 1.0), "importance": NAMES}),
    (
        "dpc_knn",
        dict.fromkeys(("k", "num_clusters"), (*NUMBERS, None, 1.0))
        | dict.fromkeys(("scale", "include_self", "return_neighbors"), FLAGS)
        | dict.fromkeys(("peak_delta", "metric"), NAMES),
    ),
    ("knn", {"k": (*NUMBERS, None, 1.0), "include_self": FLAGS, "metric": NAMES}),
    ("merge_clusters", {"num_clusters": (*NUMBERS, None, 1.0), "normalize": FLAGS}),
]
GIVEN: dict[str, dict[str, Any]] = {
    "select_tokens": {"n": 2},
    "dpc_knn": {"k": 3, "num_clusters": 4},
    "knn": {"k": 3},
    "merge_clusters": {"num_clusters": 4},
}


@pytest.mark.parametrize(("op", "scalars"), SCALARS, ids=[op for op, _ in SCALARS])
def test_wrong_scalars(op: str, scalars: dict[str, tuple[Any, ...]]) -> None:
    function, kwargs = getattr(ops, op), CASES[op].make(2, torch.float32) | GIVEN.get(op, {})
    for name, values in (*scalars.items(), ("backend", NAMES)):
        for value in values:
            with pytest.raises((TypeError, ValueError), match=rf"^{name} must be ") as error:
                function(**kwargs | {name: value})
            assert len(str(error.value)) < 200


@pytest.mark.parametrize("selection", [(), None, {"causal": 1, "noncausal": 2}, torch.zeros(1)])
def test_unmerge_tokens_takes_no_other_selection(selection: Any) -> None:
    tokens = torch.zeros(1, 2, 3)
    with pytest.raises(TypeError, match=r"^selection must have .* as the result of select_tokens"):
        ops.unmerge_tokens(tokens, tokens, selection, torch.zeros(1, 2, dtype=torch.int64))


@pytest.mark.parametrize("row", [[math.nan, 1, 2], [math.inf, 1, 2], [-math.inf] * 3])
def test_select_tokens_refuses_rows_without_a_softmax(row: list[float]) -> None:
    logits = torch.zeros(2, 2, 3)
    logits[1, 0, 1] = -math.inf  # one that is never chosen is no fault
    ops.select_tokens(logits, 1)
    logits[1, 1] = torch.tensor(row)
    with pytest.raises(ValueError, match=r"^logits must not be NaN or \+inf"):
        ops.select_tokens(logits, 1)
