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
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from cmpose import ops
from cmpose.ops import library

Arguments = dict[str, Any]


def _attention() -> Arguments:
    return {"qkv": torch.randn(1, 2, 1, 3, 1, 8, requires_grad=True)}


def _corruption() -> Arguments:
    return {
        "tokens": torch.randn(1, 1, 2, 4, requires_grad=True),
        "keypoint_tokens": torch.randn(1, 4, requires_grad=True),
        "position": torch.randn(1, 3, 4, requires_grad=True),
        "seed": torch.tensor(0),
    }


def _reconstruction() -> Arguments:
    return {
        "pred": torch.randn(1, 1, 2, 4, requires_grad=True),
        "target": torch.randn(1, 1, 2, 4),
        "corrupted": torch.ones(1, 1, 2, dtype=torch.bool),
    }


def _heatmaps() -> Arguments:
    return {
        "pred": torch.randn(1, 1, 2, 2, requires_grad=True),
        "keypoints": torch.zeros(1, 1, 2),
        "visible": torch.ones(1, 1),
    }


def _frames() -> Arguments:
    matrices = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]])
    frames = torch.zeros(1, 1, 2, 2, 3, dtype=torch.uint8)
    return {"frames": frames, "matrices": matrices, "size": (2, 2)}


def _logits() -> Arguments:
    return {"logits": torch.randn(1, 1, 4, requires_grad=True), "n": 1}


def _tokens() -> Arguments:
    return {"tokens": torch.randn(1, 4, 4), "k": 1, "num_clusters": 2}


def _members() -> Arguments:
    return {
        "tokens": torch.randn(1, 4, 4, requires_grad=True),
        "weights": torch.rand(1, 4, requires_grad=True),
        "assignment": torch.tensor([[0, 1, 1, 0]]),
        "num_clusters": 2,
    }


def _cells() -> Arguments:
    return {
        "causal": torch.randn(1, 1, 4, requires_grad=True),
        "merged": torch.randn(1, 2, 4, requires_grad=True),
        "selection": ops.select_tokens(torch.randn(1, 1, 4), 1),
        "assignment": torch.tensor([[0, 1, 1]]),
    }


CASES: dict[str, Callable[[], Arguments]] = {
    "spatial_attention": _attention,
    "temporal_attention": _attention,
    "corrupt_tokens": _corruption,
    "reconstruction_loss": _reconstruction,
    "heatmap_loss": _heatmaps,
    "warp_clips": _frames,
    "select_tokens": _logits,
    "dpc_knn": _tokens,
    "merge_clusters": _members,
    "unmerge_tokens": _cells,
}


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


@contextmanager
def _stubbed(call: Callable[[], Any]) -> Iterator[None]:
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
            registered[name]["reference"] = keeping(name, entries["reference"])
        call()
        for name in before:
            result = results.get(name)
            registered[name]["reference"] = lambda *_, result=result: result
        yield
    finally:
        for name, entries in before.items():
            registered[name].update(entries)


def _time(call: Callable[[], Any], seconds: float) -> float:
    """Microseconds a call, the best of 30 repeats."""
    call()
    number = max(int(seconds / 30 / max(timeit.timeit(call, number=20) / 20, 1e-7)), 1)
    return min(timeit.repeat(call, number=number, repeat=30)) / number * 1e6


def _three(
    call: Callable[..., Any], arguments: Arguments, seconds: float
) -> tuple[float, float | None, float | None]:
    """Without gradients, forward with gradients, and forward with backward."""
    detached = {k: v.detach() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    plain = _time(lambda: call(**detached), seconds)
    inputs = [v for v in arguments.values() if isinstance(v, Tensor) and v.requires_grad]
    if not inputs:
        return plain, None, None
    ones = torch.ones_like(_first(call(**arguments)))

    def both() -> None:
        torch.autograd.grad(_first(call(**arguments)), inputs, ones)

    return plain, _time(lambda: call(**arguments), seconds), _time(both, seconds)


def measure(seconds: float = 1.0) -> dict[str, tuple[float, float | None, float | None]]:
    """Microseconds beside the body, per op and for torch's attention; about 3 × seconds each."""
    found = {}
    with ops.without_value_checks():  # as on a GPU, where nobody looks at values
        for op, make in CASES.items():
            arguments = make()
            function = getattr(ops, op)

            def once(function: Any = function, arguments: Arguments = arguments) -> None:
                out = _first(function(**arguments))
                if out.requires_grad:
                    out.sum().backward()

            with _stubbed(once):
                found[op] = _three(function, arguments, seconds)
    q = torch.randn(1, 1, 2, 8, requires_grad=True)
    found["torch's SDPA, body included"] = _three(
        lambda q: scaled_dot_product_attention(q, q, q), {"q": q}, seconds
    )
    return found


def table(found: dict[str, tuple[float, float | None, float | None]]) -> str:
    """As a Markdown table."""

    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.1f}"

    lines = ["| op | no gradient | forward | forward + backward |", "|---|---|---|---|"]
    lines += [f"| {op} | {' | '.join(map(cell, times))} |" for op, times in found.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"µs a call; torch {torch.__version__}, Python {platform.python_version()}, CPU\n")
    print(table(measure()))
