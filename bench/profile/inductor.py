"""What torch.compile makes of a peer for a card that is not there.

Inductor asks torch for the card's properties and writes Triton kernels and a wrapper that launches
them. In a process of its own (:func:`plans`) torch answers as if there were the card, tensors have
no memory, and the wrapper's calls are noted in place of launches. What is kept is a :class:`Plan`:
plain data, from which :func:`run` makes the same calls again.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bench.harness.workload import Workload, tensors
from bench.profile.cards import BY_ARCH
from cmpose.kernels import launch
from tests.shared_data import PROJECT

FOLDER = PROJECT / "build" / "profile"
__path__ = [str(FOLDER)]
"""Generated kernels are modules below this one, so that every process can import them."""


@dataclass(frozen=True)
class View:
    """A tensor of a plan: which storage, and how it lies there; numbers of elements."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class Kernel:
    """The launch of a generated kernel.

    Attributes:
        module: in which it is.
        arguments: views and numbers.
        candidates: configurations that Inductor would race on the card, each with its grid.
    """

    module: str
    name: str
    arguments: tuple[Any, ...]
    candidates: tuple[tuple[launch.Config, tuple[int, ...]], ...]
    fp_fusion: bool


@dataclass(frozen=True)
class Library:
    """A call of torch's own operator, whose kernel is not Inductor's."""

    operator: str
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    results: tuple[View, ...]  # new ones


@dataclass
class Plan:
    """All calls of one direction, in order."""

    storages: list[int] = field(default_factory=list)  # bytes
    inputs: list[View] = field(default_factory=list)  # tensors of the op's arguments, in order
    outputs: list[View] = field(default_factory=list)
    steps: list[Kernel | Library] = field(default_factory=list)
    forward: int = 0  # of which so many are the forward pass's, which is not asked for


def plans(asked: Sequence[tuple[Workload, str]], arch: int) -> list[Plan | str]:
    """Of each workload and peer its plan, or why there is none.

    Raises:
        ValueError: no card stands for ``arch``.
    """
    if arch not in BY_ARCH:
        raise ValueError(f"arch must be one of {', '.join(map(str, BY_ARCH))}, got {arch}")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= _no_card()
    done = subprocess.run(
        [sys.executable, "-m", "bench.profile.pretend"],
        input=pickle.dumps((list(asked), arch)),
        stdout=subprocess.PIPE,
        cwd=PROJECT,
        env=environment,
        check=True,
    )
    return pickle.loads(done.stdout)


def _no_card() -> dict[str, str]:
    """What loads no_card.cpp, compiled for this torch, before torch looks for a card."""
    source = Path(__file__).with_name("no_card.cpp")
    key = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = FOLDER / f"no_card_{key}.so"
    if not library.is_file():
        FOLDER.mkdir(parents=True, exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        root = Path(torch.__file__).parent
        flags = (
            "-std=c++20",
            "-shared",
            "-fPIC",
            f"-I{root}/include",
            f"-L{root}/lib",
            f"-Wl,-rpath,{root}/lib",
        )
        command = ["g++", *flags, str(source), "-lc10", "-ltorch_cpu", "-o", str(made)]
        subprocess.run(command, check=True)
        made.rename(library)
    return {"LD_PRELOAD": str(library)}


def run(
    plan: Plan,
    arguments: Any,
    launched: Callable[[Kernel, Sequence[Any]], Any],
    called: Callable[[Library], bool] = lambda step: True,
) -> list[Tensor]:
    """Makes a plan's calls on the CPU.

    Args:
        arguments: the op's; its tensors are used as they are.
        launched: gets each kernel with its arguments.
        called: whether a library's call is to be made; its results are zeros if it is not.

    Returns:
        The outputs.
    """
    memory = [torch.empty(0)] * len(plan.storages)
    for view, given in zip(plan.inputs, tensors(arguments), strict=True):
        assert (tuple(given.shape), given.stride()) == (view.size, view.stride)
        memory[view.storage] = given.as_strided(
            (plan.storages[view.storage] // given.itemsize,), (1,)
        )
    for number, size in enumerate(plan.storages[len(plan.inputs) :], len(plan.inputs)):
        memory[number] = torch.zeros(size, dtype=torch.uint8)

    def real(value: Any) -> Any:
        if not isinstance(value, View):
            return value
        return (
            memory[value.storage]
            .view(value.dtype)
            .as_strided(value.size, value.stride, value.offset)
        )

    for step in plan.steps:
        values = pytree.tree_map(real, step.arguments)
        if isinstance(step, Kernel):
            launched(step, values)
        elif called(step):
            options = pytree.tree_map(real, step.options)
            made = tensors(operator(step.operator)(*values, **options))
            for view, result in zip(step.results, made, strict=bool(step.results)):
                real(view).copy_(result)
    return [real(view) for view in plan.outputs]


def launch_of(kernel: Kernel, arguments: Sequence[Any], candidate: int = 0) -> launch.Launch:
    """The launch with one of the candidates."""
    config, grid = kernel.candidates[candidate]
    function = getattr(importlib.import_module(kernel.module), kernel.name)
    return launch.Launch(function, grid, tuple(arguments), config.blocks, config, kernel.fp_fusion)


def operator(name: str) -> Any:
    space, function, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, space), function), overload)
