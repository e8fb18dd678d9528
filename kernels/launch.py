"""How every Triton kernel is launched: one function, with a pinned configuration.

While :func:`recording`, launches are noted and not run. The compile check and the test of the
launch path use this on a machine without a GPU: they call a kernel's launcher with tensors on the
meta device and look at what would have been launched. While :func:`handing_over`, something else
runs them: the tests run what is compiled on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

INTERPRETED = triton.knobs.runtime.interpret
"""Whether Triton runs kernels on the CPU, in its interpreter (TRITON_INTERPRET=1)."""

INTERPRETER_ARCH = 89
"""The interpreter uses this card's configurations, so that tests run shipped block sizes."""


class Config(NamedTuple):
    """How a kernel is compiled: its block sizes by name, and warps and pipeline stages."""

    blocks: dict[str, int]
    num_warps: int = 4
    num_stages: int = 1


@dataclass(frozen=True)
class Launch:
    """A launch that was recorded.

    Attributes:
        kernel: the ``@triton.jit`` function.
        grid: programs along x (and y, z).
        arguments: tensors and numbers, in the order of the kernel's parameters.
        constants: its ``tl.constexpr`` parameters, block sizes included.
        config: warps and stages.
        fp_fusion: whether a·b + c may be contracted.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    config: Config
    fp_fusion: bool


_taker: Callable[[Launch], Any] | None = None
_taker_arch = INTERPRETER_ARCH
_archs: dict[int, int] = {}


@contextmanager
def handing_over(taker: Callable[[Launch], Any], arch: int) -> Iterator[None]:
    """Within it ``taker`` gets each launch, made as for a card of compute capability ``arch``."""
    global _taker, _taker_arch
    before = _taker, _taker_arch
    _taker, _taker_arch = taker, arch
    try:
        yield
    finally:
        _taker, _taker_arch = before


@contextmanager
def recording(arch: int) -> Iterator[list[Launch]]:
    """Within it launches are noted, as for a card of compute capability ``arch`` (89 is 8.9)."""
    recorded: list[Launch] = []
    with handing_over(recorded.append, arch):
        yield recorded


def arch_of(tensor: Tensor) -> int:
    """The compute capability that ``tensor``'s kernels run on: 80, 89, 90, 120, ..."""
    if _taker is not None:
        return _taker_arch
    if tensor.device.type != "cuda":
        return INTERPRETER_ARCH
    index = tensor.device.index
    if index not in _archs:
        card = torch.cuda.get_device_properties(index)
        _archs[index] = card.major * 10 + card.minor
    return _archs[index]


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    config: Config,
    fp_fusion: bool = True,
    **constants: Any,
) -> None:
    """Runs ``kernel`` on the current stream of the current device.

    Args:
        kernel: a ``@triton.jit`` function.
        grid: programs along x; y and z hold 65,535 at most, so a batch never goes there. A grid
            without programs is not launched.
        arguments: tensors and numbers, in the order of the kernel's parameters.
        config: block sizes, warps and stages.
        fp_fusion: False keeps the compiler from contracting a·b + c.
        constants: further ``tl.constexpr`` parameters.
    """
    if 0 in grid:
        return
    if _taker is not None:
        constants = {**config.blocks, **constants}
        _taker(Launch(kernel, grid, arguments, constants, config, fp_fusion))
        return
    kernel[grid](
        *arguments,
        **config.blocks,
        **constants,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=fp_fusion,
    )
