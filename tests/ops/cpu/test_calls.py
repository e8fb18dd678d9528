"""An eager call skips the registered op where nothing in torch is to see it, and only there."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cmpose import ops

TOKENS, WEIGHTS = torch.randn(1, 6, 4), torch.rand(1, 6)
ASSIGNMENT = torch.tensor([[0, 1, 0, 2, 1, 0]])


def merged() -> torch.Tensor:
    return ops.merge_clusters(TOKENS, WEIGHTS, ASSIGNMENT, 3, backend="cpu")


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def test_a_mode_sees_the_op_and_not_what_is_inside() -> None:
    with _Seen() as mode:
        merged()
    assert "cmpose.merge_clusters.default" in mode.names
    assert not any("embedding_bag" in name for name in mode.names)


def test_the_profiler_sees_the_op() -> None:
    activity = torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profile:
        merged()
    assert "cmpose::merge_clusters" in {event.key for event in profile.key_averages()}


def test_another_default_device_does_not_reach_inside() -> None:
    expected = merged()
    with torch.device("meta"):
        assert torch.equal(merged(), expected)


def test_a_subclass_of_tensor_goes_through_the_op() -> None:
    class Named(torch.Tensor):
        pass

    actual = ops.merge_clusters(TOKENS.as_subclass(Named), WEIGHTS, ASSIGNMENT, 3, backend="cpu")
    assert torch.equal(actual.as_subclass(torch.Tensor), merged())
