"""What is measured: an op's workloads, how their inputs are drawn, and the op's peers."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bench.harness.shapes import BF16, BOTH, FORWARD, FP32, THREADS, Shape
from cmpose.train.flops import counter
from cmpose.train.trace import size_in_memory

Arguments = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """One thing to time: an op, a direction, a shape, a dtype."""

    op: str
    direction: str
    shape: Shape
    dtype: str

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.shape.items())
        return f"{self.op} {self.direction} {sizes} {self.dtype}"


@dataclass(frozen=True)
class Peer:
    """An alternative way to compute what an op computes."""

    # (whether to tune as long as possible) → function of the op's arguments; may raise
    build: Callable[[bool], Callable[..., Any]]
    # Device type → regular expression that the name of one of its kernels must match; a peer that
    # ran none of them did not run as it was asked to, and is recorded as failed.
    ran: Mapping[str, str] = field(default_factory=dict)
    compiled: bool = False  # by torch.compile, which takes long on a CPU
    checked: bool = True  # its result is the op's, so its error against float64 can be taken


class Draw:
    """Draws random inputs, the same for the same seed; on ``meta`` tensors without numbers."""

    def __init__(self, dtype: torch.dtype, device: str, seed: int = 0) -> None:
        self.dtype, self.device = dtype, device
        self.generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(self, *sizes: int) -> Tensor:
        """Standard normal numbers: a card runs faster on zeros than on data."""
        return torch.randn(*sizes, dtype=self.dtype, device=self.device, generator=self.generator)

    def uniform(self, *sizes: int) -> Tensor:
        """Numbers of [0, 1) in float32."""
        return torch.rand(*sizes, device=self.device, generator=self.generator)

    def integers(self, end: int, *sizes: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """Whole numbers of [0, end)."""
        return torch.randint(end, sizes, dtype=dtype, device=self.device, generator=self.generator)


@dataclass(frozen=True)
class OpBench:
    """How an op is measured."""

    op: str
    directions: tuple[str, ...]  # that are measured
    shapes: Sequence[Shape]  # that are measured, the reference shape first
    small: Shape  # that a CPU measures
    make: Callable[[Shape, Draw], Arguments]
    call: Callable[..., Any]  # arguments and backend → result
    # (shape, element size, direction) → bytes that it must move: each input element that is needed
    # read once, each output written once
    bytes: Callable[[Shape, int, str], int]
    peers: dict[str, Peer]  # "eager" and "compile" among them
    flops: Callable[[Shape, str], int] = lambda shape, direction: 0  # of its matrix products
    gradients: tuple[str, ...] = ()  # arguments that take one
    # what bench.profile can count beside it: arguments → those that differ, with the option in use
    options: Mapping[str, Callable[[Arguments], Arguments]] = field(default_factory=dict)
    cpu: Sequence[Shape] = ()  # at which ratios are measured on a CPU, in float32
    # shape → shape at which errors against float64 are affordable
    exact_shape: Callable[[Shape], Shape] = lambda shape: {**shape, "B": min(shape["B"], 2)}

    def workloads(self, small: bool = False) -> Iterator[Workload]:
        """All of them, those nearest to the reference shape first."""
        shapes = [self.small] if small else self.shapes
        for shape, dtype, direction in itertools.product(shapes, (BF16, FP32), self.directions):
            yield Workload(self.op, direction, dict(shape), dtype)

    def on_cpu(self) -> Iterator[Workload]:
        """Those whose ratios to the peers are measured on a CPU, on each number of threads."""
        directions = (FORWARD, BOTH) if self.gradients else (FORWARD,)
        for shape, direction, threads in itertools.product(self.cpu, directions, THREADS):
            yield Workload(self.op, direction, {**shape, "threads": threads}, FP32)

    def arguments(self, workload: Workload, device: str, seed: int = 0) -> Arguments:
        """Random arguments, with gradients wanted where there are any."""
        draw = Draw(getattr(torch, workload.dtype), device, seed)
        arguments = self.make(workload.shape, draw)
        for name in self.gradients:
            arguments[name].requires_grad_()
        return arguments

    def bytes_of(self, workload: Workload) -> int:
        """Bytes that a workload must move."""
        element = getattr(torch, workload.dtype).itemsize
        return self.bytes(workload.shape, element, workload.direction)


def tensors(value: Any) -> list[Tensor]:
    """The tensors of arguments or of a result."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def total_bytes(value: Any) -> int:
    """Bytes of all tensors of arguments or of a result."""
    return sum(map(size_in_memory, tensors(value)))


def counted_flops(call: Callable[[], Any]) -> int:
    """What :func:`counter` counts of a call. On the meta device nothing is computed."""
    with counter() as operations:
        call()
    return operations.get_total_flops()
