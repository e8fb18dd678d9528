"""What an op costs beside its body: ``python -m bench.overhead``, on any machine.

The bodies are replaced by functions that return tensors made before, so what is left is argument
checks, the choice of a backend, torch's dispatcher and autograd. One thread, the best of many
repeats, microseconds a call. torch's own ``scaled_dot_product_attention`` on tensors of a few
elements stands beside it; that includes its body.
"""

from __future__ import annotations

import platform
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils import _pytree as pytree

from bench.harness.shapes import FORWARD, FP32
from bench.harness.targets import bench_of
from bench.harness.workload import Workload, tensors
from bench.report import tables
from cmpose import ops
from cmpose.ops import library
from cmpose.ops.backends import OPS

SDPA = "torch's SDPA, body included"


Overhead = tuple[float, float | None, float | None]
"""Microseconds a call: no gradient, forward, forward + backward; None where none is taken."""


@contextmanager
def without_bodies(call: Callable[[], Any]) -> Iterator[None]:
    """Within it each registered op returns what it returned in a call of ``call`` before."""
    registered = library.IMPLEMENTATIONS
    before = {name: dict(entries) for name, entries in registered.items()}
    results: dict[str, Any] = {}

    def keeping(name: str, body: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            results[name] = body(*arguments)
            return results[name]

        return run

    try:
        for name, entries in before.items():
            registered[name].update({b: keeping(name, body) for b, body in entries.items()})
        call()
        for name, entries in before.items():
            result = results.get(name)
            registered[name].update(dict.fromkeys(entries, lambda *_, result=result: result))
        yield
    finally:
        for name, entries in before.items():
            registered[name].update(entries)


def _time(call: Callable[[], Any], seconds: float) -> float:
    """Microseconds a call, the best of 30 repeats."""
    call()
    number = max(int(seconds / 30 / max(timeit.timeit(call, number=20) / 20, 1e-7)), 1)
    return min(timeit.repeat(call, number=number, repeat=30)) / number * 1e6


def _both(call: Callable[[], Any], arguments: dict[str, Any]) -> Callable[[], Any]:
    """Forward, and back from the first result; forward alone for an op without gradients."""
    inputs = [t for t in tensors(arguments) if t.requires_grad]
    if not inputs:
        return call
    ones = torch.ones_like(tensors(call())[0])
    return lambda: torch.autograd.grad(tensors(call())[0], inputs, ones)


def _overhead(call: Callable[..., Any], arguments: dict[str, Any], seconds: float) -> Overhead:
    detached = pytree.tree_map_only(torch.Tensor, torch.Tensor.detach, arguments)
    plain = _time(partial(call, **detached), seconds)
    forward = partial(call, **arguments)
    both = _both(forward, arguments)
    if both is forward:
        return plain, None, None
    return plain, _time(forward, seconds), _time(both, seconds)


def measure(seconds: float = 1.0) -> dict[str, Overhead]:
    """What each op takes beside its body, and torch's attention; about 3 × seconds each."""
    results = {}
    with ops.without_value_checks():  # as on a GPU, where nobody looks at values
        for op in OPS:
            bench = bench_of(op)
            arguments = bench.arguments(Workload(op, FORWARD, bench.small, FP32), "cpu")
            call = partial(bench.call, backend="auto")
            with without_bodies(_both(partial(call, **arguments), arguments)):
                results[op] = _overhead(call, arguments, seconds)
    q = torch.randn(1, 1, 2, 8, requires_grad=True)
    results[SDPA] = _overhead(lambda q: scaled_dot_product_attention(q, q, q), {"q": q}, seconds)
    return results


def table(results: dict[str, Overhead]) -> str:
    """As a Markdown table."""
    rows = [
        (op, *("–" if time is None else f"{time:.1f}" for time in times))
        for op, times in results.items()
    ]
    return tables.table(("op", "no gradient", "forward", "forward + backward"), rows)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"µs a call; torch {torch.__version__}, Python {platform.python_version()}, CPU\n")
    print(table(measure()))
