"""Nothing between an op's call and its last launch waits for the device or copies from the host.

This is shown in three ways: by reading the source, by running every launcher on tensors that have
no values, and on a GPU by capturing every op in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from cmpose import ops
from cmpose.kernels import launch
from cmpose.ops import backends, library
from tests.kernels.compile_check import OPS, cases_of
from tests.kernels.host_reads import host_reads, makers
from tests.ops.support.assertions import assert_same_bits
from tests.ops.support.cases import CASES, OpCase, differentiable, leaves, upstream
from tests.shared_data import PROJECT

# -- by the source --------------------------------------------------------------------------------

NOT_LAUNCHED = {"kernels/tune.py"}  # a program that measures

SOURCES = {
    str(path.relative_to(PROJECT)): path.read_text()
    for folder in ("kernels", "cmpose/ops")
    for path in sorted((PROJECT / folder).glob("*.py"))
    if str(path.relative_to(PROJECT)) not in NOT_LAUNCHED
}

ALLOWED = {
    ("cmpose/ops/merge_clusters.py", "merge_clusters_backward_reference"): "assignment is int64",
    ("cmpose/ops/unmerge_tokens.py", "unmerge_tokens_reference"): "assignment is int64, no mask",
    ("cmpose/ops/unmerge_tokens.py", "unmerge_tokens_backward_reference"): "indices are int64",
}
"""Functions that only seem to read a value, and why they do not. Code behind ``checks.readable``
needs no entry, because that is false on a card and in torch.compile."""


def reads_of(sources: dict[str, str]) -> dict[tuple[str, str], list[str]]:
    """(file, function) → what it reads."""
    others = frozenset().union(*map(makers, sources.values()))
    reads: dict[tuple[str, str], list[str]] = {}
    for name, source in sources.items():
        for read in host_reads(source, others):
            reads.setdefault((name, read.function), []).append(f"{name}:{read.line}: {read.what}")
    return reads


def test_no_source_reads_on_the_host() -> None:
    assert {"kernels/launch.py", "cmpose/ops/library.py"} <= set(SOURCES)
    reads = reads_of(SOURCES)
    lines = [line for key, lines in reads.items() if key not in ALLOWED for line in lines]
    assert not lines, "\n".join(lines)
    assert set(ALLOWED) <= set(reads), "ALLOWED has a line that nothing needs"


PLANTED = [
    "x.item()",
    "torch.nonzero(x)",
    "torch.where(x > 0)",
    "torch.cuda.synchronize()",
    "bool(x.any())",
    "int(x.shape[0] + x[0])",
    "max(x, 3)",
    "x if x.any() else 0",
    "not_none = x is not None and x.isnan().any() and 3",
    "0 < x < 3",
    "x[x > 0]",
    "x[:, ~x.isnan()]",
    "x[mask]",
    "torch.tensor([1.0, 2.0], device=x.device)",
    "torch.zeros(3).to(device=x.device, non_blocking=True)",
    "torch.repeat_interleave(x, 3)",
    "assert x.sum() > 0",
    "y = x + 1\n    if y.max() > 3:\n        return",
    "y, z = x.aminmax()\n    while y < z:\n        y += 1",
    "for row in x:\n        if row:\n            break",
    "y = made()\n    if y > 0:\n        return",
    "def inner():\n        return x.item()\n    inner()",
    "z = lambda: x.item()",
    "y = [bool(row) for row in x.unbind()]",
    "if mask.any() or readable(x):\n        return",
    "if readable(x) or bool(x.any()):\n        return",
    "if not readable(x) and x.any():\n        return",
    "if not readable(x):\n        pass\n    x.item()",
]

INNOCENT = [
    "if x is None or x.numel() == 0 or x.shape[0] > 3 or x.dtype == torch.half:\n        return",
    "int(x.shape[0]) + max(x.stride()) + len(x)",
    "if x.is_contiguous() and x.ndim > 3 and x.device.type == 'cpu':\n        return",
    "y = x.to(torch.float32).contiguous()",
    "y = torch.empty(3, device=x.device); z = torch.arange(3, device=x.device)",
    "y = torch.where(x > 0, x, 0.0)",
    "if readable(x) and bool(x.any()):\n        raise ValueError(int(x.sum()))",
    "if checks.readable(x):\n        x.item()",
    "if not readable(x) or x.numel() == 0:\n        return\n    x.item()",
    "if torch.cuda.is_available() or torch.is_grad_enabled():\n        return",
    "n = x.numel()\n    if n > 3:\n        return",
    "y = x[:, 0, None]",
    "x = 3\n    if x:\n        return",
    "names = {'a': x}\n    for name, y in names.items():\n        print(name)",
]


def reads_in(statement: str) -> list[str]:
    body = f"def f(x: Tensor, mask: Tensor | None) -> None:\n    {statement}\n"
    source = body + "def made() -> tuple[Tensor, int]: ...\n"
    return [line for lines in reads_of({"planted": source}).values() for line in lines]


@pytest.mark.parametrize("statement", PLANTED)
def test_planted_reads_are_caught(statement: str) -> None:
    assert reads_in(statement)


@pytest.mark.parametrize("statement", INNOCENT)
def test_what_the_host_knows_is_not_caught(statement: str) -> None:
    assert reads_in(statement) == []


def test_kernels_are_no_host_code() -> None:
    body = "def f(x: Tensor):\n    return x.item()\n"
    assert reads_of({"planted": f"@triton.jit\n{body}"}) == {}
    assert len(reads_of({"planted": f"@torch.no_grad()\n{body}"})) == 1
    method = "class A:\n    @staticmethod\n    def f(x: Tensor):\n        return x.item()\n"
    assert list(reads_of({"planted": method})) == [("planted", "A.f")]


# -- without values -------------------------------------------------------------------------------

_READING = {
    "_local_scalar_dense", "nonzero", "nonzero_static", "_unique2", "unique_dim",
    "unique_consecutive", "masked_select", "equal", "is_nonzero", "bincount", "lift_fresh",
    "_pin_memory",
}  # fmt: skip
"""Operators of ATen that read values on the host, or start from host data."""


class NoReads(TorchDispatchMode):
    """Within it operators raise that read values on the host or copy between devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__.partition(".")[0]
        if func.namespace == "cmpose":  # calls the implementation, whose operators are then seen
            with self:
                return library.IMPLEMENTATIONS[name][args[-1]](*args[:-1])
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        assert name not in _READING, f"{func} reads on the host"
        if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
            assert not masks, f"{func} with a mask reads on the host"
        assert name != "repeat_interleave" or "output_size" in kwargs, f"{func} reads"
        result = func(*args, **kwargs)
        devices = {leaf.device.type for leaf in tensors if leaf.ndim}
        devices |= {
            leaf.device.type for leaf in pytree.tree_leaves(result) if torch.is_tensor(leaf)
        }
        assert len(devices) <= 1, f"{func} copies between {sorted(devices)}"
        return result


@pytest.mark.parametrize("op", OPS)
def test_launchers_run_without_values(op: str) -> None:
    """Every case of the compile check, on the meta device, where reading raises of itself."""
    for arch in (80, 90):
        for name, call in cases_of(op).items():
            with launch.recording(arch) as launches, NoReads():
                call()
            assert launches, name


READING: dict[str, Callable[[Tensor], Any]] = {
    "item": Tensor.item,
    "bool": bool,
    "int": int,
    "nonzero": Tensor.nonzero,
    "unique": Tensor.unique,
    "mask": lambda x: x[x > 0],
    "mask to write": lambda x: x.index_put_((x > 0,), x),
    "masked_select": lambda x: x.masked_select(x > 0),
    "equal": lambda x: torch.equal(x, x),
    "tolist": Tensor.tolist,
    "numpy": Tensor.numpy,
    "cpu": Tensor.cpu,
    "to": lambda x: torch.ones(3).to(x.device),
    "copy_": lambda x: x.copy_(torch.ones(1)),
    "tensor": lambda x: torch.tensor([1.0], device=x.device),
    "new_tensor": lambda x: x.new_tensor(2.0),
}
SEEN = {
    # On the meta device no operator copies host data. The source shows it, and so does the CPU.
    "meta": [name for name in READING if name not in ("tensor", "new_tensor")],
    # There is nothing to copy on the CPU.
    "cpu": [name for name in READING if name not in ("tolist", "numpy", "cpu", "to", "copy_")],
}


@pytest.mark.parametrize(
    ("device", "read"), [(device, read) for device, names in SEEN.items() for read in names]
)
def test_planted_reads_raise(device: str, read: str) -> None:
    with pytest.raises((AssertionError, RuntimeError, TypeError)), NoReads():
        READING[read](torch.ones(1, device=device))


def arguments(case: OpCase, device: str) -> dict[str, Any]:
    kwargs = {n: v.to(device) for n, v in case.make(2, torch.float32, **case.kernel_sizes).items()}
    for name in case.gradients:
        kwargs[name].requires_grad_()
    return kwargs


@pytest.fixture
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Backend ``triton`` takes CPU tensors, also where nothing could run its kernels on them: what
    is recorded is not run."""
    monkeypatch.setitem(backends._WITHOUT, "triton", lambda device: None)


@pytest.mark.usefixtures("on_the_cpu")
@pytest.mark.parametrize("op", OPS)
def test_public_ops_read_nothing(op: str) -> None:
    """Forward and backward, from the public function to the launches, with the checks that run on a
    card: these look at no value."""
    case = CASES[op]
    kwargs = arguments(case, "cpu")
    with ops.without_value_checks(), launch.recording(89) as launches:
        result = case.call(**kwargs, backend="triton")
        grads = [torch.ones_like(out) for out in differentiable(result)]
        launches.clear()
        with NoReads():
            result = case.call(**kwargs, backend="triton")
            forward = len(launches)
            if case.gradients:
                inputs = [kwargs[name] for name in case.gradients]
                torch.autograd.grad(differentiable(result), inputs, grads)
    assert forward
    assert len(launches) > forward or not case.gradients


@pytest.mark.usefixtures("on_the_cpu")
def test_a_planted_read_in_an_op_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    implementations = library.IMPLEMENTATIONS["temporal_attention"]
    right = implementations["triton"]

    def reading(qkv: Tensor, *options: Any) -> Tensor:
        if qkv.isnan().any():
            raise ValueError
        return right(qkv, *options)

    monkeypatch.setitem(implementations, "triton", reading)
    with pytest.raises(AssertionError, match=r"_local_scalar_dense|is_nonzero"):
        test_public_ops_read_nothing("temporal_attention")


# -- on a card ------------------------------------------------------------------------------------

on_a_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class Captured:
    """An op's forward and backward in a CUDA graph, on inputs that stay where they are."""

    def __init__(self, case: OpCase) -> None:
        self.case = case
        self.kwargs = arguments(case, "cuda")
        self.grads = upstream(differentiable(self.call()), torch.float32)
        # Compile and allocate before the capture, on another stream than the default one.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self.run()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.results = self.run()

    def call(self) -> Any:
        return self.case.call(**self.kwargs, backend="triton")

    def run(self) -> list[Tensor]:
        """Outputs and gradients."""
        result = self.call()
        results = [leaf.detach() for leaf in leaves(result)]
        if self.case.gradients:
            inputs = [self.kwargs[name] for name in self.case.gradients]
            results += torch.autograd.grad(differentiable(result), inputs, self.grads)
        return results

    def replay(self) -> list[Tensor]:
        self.graph.replay()
        return [leaf.clone() for leaf in self.results]


@on_a_card
@pytest.mark.parametrize("op", OPS)
def test_capture_and_replay(op: str) -> None:
    """A replay gives the bits of an eager call, on the captured inputs and on others put there."""
    captured = Captured(CASES[op])
    first = captured.replay()
    assert_same_bits(first, captured.run(), "replay, ")
    with torch.no_grad():
        for name, value in captured.kwargs.items():
            if value.ndim > 1 and name != "matrices":
                value.copy_(value.flip(1).clone())
    second = captured.replay()
    assert_same_bits(second, captured.run(), "replay on other inputs, ")
    assert any(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


@on_a_card
def test_a_replay_draws_by_the_seed_tensor() -> None:
    captured = Captured(CASES["corrupt_tokens"])
    seed = captured.kwargs["seed"]
    draws = []
    for value in (1, 2, 1):
        seed.fill_(value)
        draws.append(captured.replay())
        assert_same_bits(draws[-1], captured.run(), f"seed {value}, ")
    assert_same_bits(draws[2], draws[0])
    assert not torch.equal(draws[0][1], draws[1][1]), "the masks of two seeds are equal"


@on_a_card
@pytest.mark.parametrize("op", OPS)
def test_nothing_synchronises(op: str) -> None:
    """torch's own check raises at every synchronisation, in graphs or not."""
    case = CASES[op]
    kwargs = arguments(case, "cuda")
    result = case.call(**kwargs, backend="triton")
    grads = upstream(differentiable(result), torch.float32)
    torch.cuda.set_sync_debug_mode("error")
    try:
        result = case.call(**kwargs, backend="triton")
        if case.gradients:
            inputs = [kwargs[name] for name in case.gradients]
            torch.autograd.grad(differentiable(result), inputs, grads)
    finally:
        torch.cuda.set_sync_debug_mode("default")
