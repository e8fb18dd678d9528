"""What an op's bench file holds, and the grid of cases that most of them share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

Shape = dict[str, int]
Arguments = dict[str, Any]

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward_backward"
BF16, FP32 = "bfloat16", "float32"
BRANCHES = 3
"""Clean, masked and noised copies, which the model runs as one batch."""

REFERENCE: Shape = {"B": 32, "T": 3, "N": 192, "K": 15, "H": 12, "d": 64}
"""DESIGN's reference shape; D = H·d."""

PERCENT = 45
"""Of a clip's tokens are masked, and as many noised."""

BATCHES = (32, 16, 64)
FRAMES = (3, 2, 8, 16)
HEADS = ((12, 64), (16, 64), (16, 80))
"""Heads and head dimension of ViT-B, L and H."""
TOKENS = (192, 64, 132, 576, 1024, 4096)
LONG = ((16384, 4), (65536, 1))
"""Tokens and clips of the streaming path."""


def element_size(dtype: str) -> int:
    """Bytes."""
    return getattr(torch, dtype).itemsize


@dataclass(frozen=True)
class Case:
    """One measurement: an op, a direction, a shape, a dtype."""

    op: str
    direction: str
    shape: Shape
    dtype: str

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.shape.items())
        return f"{self.op} {self.direction} {sizes} {self.dtype}"


@dataclass(frozen=True)
class Peer:
    """An alternative way to compute what an op computes.

    Attributes:
        build: () → function of the op's arguments; may compile, and may raise.
        ran: regular expression that one of the kernels' names must match, per device type; a peer
            of which none does has not run as it was asked to and is recorded as failed.
        tuned: whether ``build`` takes a setting, ``build(full)``: quick or full tuning.
        checked: whether its result is the op's, so that its error against float64 can be taken.
    """

    build: Callable[..., Callable[..., Any]]
    ran: Mapping[str, str] = field(default_factory=dict)
    tuned: bool = False
    checked: bool = True


@dataclass(frozen=True)
class OpBench:
    """How an op is measured.

    Attributes:
        op: its name.
        directions: which of forward, backward, forward_backward are measured.
        shapes: the full grid, the reference shape first.
        small: for a CPU.
        make: (shape, dtype, device, generator) → the op's arguments.
        call: the op: its arguments and a backend → result.
        bytes: (shape, element size, direction) → bytes that it must move: each input element that
            is needed read once, each output written once.
        flops: (shape, direction) → operations of its matrix products.
        peers: shape → name → peer.
        gradients: arguments that take a gradient.
        dtypes: that are measured.
        exact_shape: shape → shape at which errors against float64 are affordable.
    """

    op: str
    directions: tuple[str, ...]
    shapes: Callable[[], Sequence[Shape]]
    small: Shape
    make: Callable[[Shape, torch.dtype, str, torch.Generator], Arguments]
    call: Callable[..., Any]
    bytes: Callable[[Shape, int, str], int]
    flops: Callable[[Shape, str], int]
    peers: Callable[[Shape], dict[str, Peer]]
    gradients: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = (BF16, FP32)
    exact_shape: Callable[[Shape], Shape] = lambda shape: {**shape, "B": min(shape["B"], 2)}

    def cases(self, small: bool = False) -> Iterator[Case]:
        """Every case, those nearest to the reference shape first."""
        shapes = [self.small] if small else self.shapes()
        for shape in shapes:
            for dtype in self.dtypes:
                for direction in self.directions:
                    yield Case(self.op, direction, dict(shape), dtype)

    def arguments(self, case: Case, device: str, seed: int = 0) -> Arguments:
        """Random arguments, with gradients wanted where there are any."""
        generator = torch.Generator(device=device).manual_seed(seed)
        made = self.make(case.shape, getattr(torch, case.dtype), device, generator)
        for name in self.gradients:
            made[name].requires_grad_()
        return made


# -- grids ----------------------------------------------------------------------------------------


def grid(reference: Shape, axes: Iterable[Sequence[Shape]]) -> list[Shape]:
    """All combinations, ordered by how many axes differ from the reference shape.

    Args:
        reference: it comes first.
        axes: each a list of alternatives that set one or several sizes.
    """
    found = []
    for parts in itertools.product(*axes):
        shape = dict(reference)
        for part in parts:
            shape |= part
        if shape not in found:
            found.append(shape)

    def distance(shape: Shape) -> int:
        return sum(shape[name] != size for name, size in reference.items() if name != "d")

    return [reference, *sorted((s for s in found if s != reference), key=distance)]


def model_axes(frames: Sequence[int] = FRAMES) -> list[list[Shape]]:
    """Batch, frames and heads of the issue's grid."""
    return [
        [{"B": b} for b in BATCHES],
        [{"T": t} for t in frames],
        [{"H": h, "d": d} for h, d in HEADS],
    ]


# -- tensors --------------------------------------------------------------------------------------


def normal(*shape: int, dtype: torch.dtype, device: str, generator: torch.Generator) -> Tensor:
    """Standard normal numbers: a card runs faster on zeros than on data."""
    return torch.randn(*shape, dtype=dtype, device=device, generator=generator)


def uniform(*shape: int, device: str, generator: torch.Generator) -> Tensor:
    return torch.rand(*shape, device=device, generator=generator)


def tensors(value: Any) -> list[Tensor]:
    """The tensors of arguments or of a result."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def floating(value: Any) -> list[Tensor]:
    return [t for t in tensors(value) if t.is_floating_point()]


def differentiable(value: Any) -> list[Tensor]:
    return [t for t in tensors(value) if t.requires_grad]


def size_in_memory(tensor: Tensor) -> int:
    """Bytes, an expanded dimension counted once."""
    elements = 1
    for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= length if stride or not length else 1
    return elements * tensor.element_size()


def total_bytes(value: Any) -> int:
    """Bytes of all tensors of arguments or of a result."""
    return sum(map(size_in_memory, tensors(value)))
