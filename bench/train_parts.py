"""Time of a training step by part, forward and backward, from borders set around the parts.

A border is an identity whose passing is stamped: by a CUDA event on a card, so that the parts add
up to the step, by the host's clock on a CPU. In the backward pass a part lasts from its results'
border to its inputs' border; a part whose inputs take no gradient lasts to the end of the pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Stamp = Callable[[], Any]


class _Border(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, note: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.note = note
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        ctx.note()
        return None, *grads


class Recorder:
    """Collects the stamps of one step.

    Args:
        stamp: () → a mark in time.
        between: (mark, mark) → seconds, asked when the step is over.
    """

    def __init__(self, stamp: Stamp, between: Callable[[Any, Any], float]) -> None:
        self.stamp, self.between = stamp, between
        self.spans: list[tuple[str, list[Any]]] = []

    def begin(self, part: str) -> list[Any]:
        span = [self.stamp(), None]
        self.spans.append((part, span))
        return span

    def end(self, span: list[Any]) -> None:
        span[1] = self.stamp()

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """``function`` with borders around it."""

        def run(*arguments: Any, **keywords: Any) -> Any:
            backward: list[list[Any]] = []

            def leave() -> None:
                if backward:
                    self.end(backward[-1])

            arguments, keywords = self._border((arguments, keywords), leave)
            span = self.begin(part)
            result = function(*arguments, **keywords)
            self.end(span)
            return self._border(result, lambda: backward.append(self.begin(part)))

        return run

    def _border(self, value: Any, note: Callable[[], None]) -> Any:
        leaves, spec = pytree.tree_flatten(value)
        places = [i for i, t in enumerate(leaves) if isinstance(t, Tensor) and t.requires_grad]
        if not places or not torch.is_grad_enabled():
            return value
        passed = _Border.apply(note, *(leaves[i] for i in places))
        for place, tensor in zip(places, passed, strict=True):
            leaves[place] = tensor
        return pytree.tree_unflatten(leaves, spec)

    def close(self) -> None:
        """The backward pass is over: spans that were not left end now."""
        for _, span in self.spans:
            if span[1] is None:
                self.end(span)

    def seconds(self) -> dict[str, float]:
        """Per part, once the step is over."""
        found: dict[str, float] = {}
        for part, (start, stop) in self.spans:
            found[part] = found.get(part, 0.0) + self.between(start, stop)
        return found


def cuda_recorder() -> Recorder:
    """Stamps by CUDA events on the current stream."""

    def stamp() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(start: torch.cuda.Event, stop: torch.cuda.Event) -> float:
        stop.synchronize()
        return start.elapsed_time(stop) * 1e-3

    return Recorder(stamp, between)
