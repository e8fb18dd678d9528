"""Ways to force one implementation, and to see afterwards that it is the one that ran."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.harness import timing
from bench.harness.workload import Peer

Function = Callable[..., Any]


class WrongResult(RuntimeError):
    """A peer computes something else than the op."""


class NotWhatRan(RuntimeError):
    """The profiler saw none of the kernels that the peer asked for."""


# Where Inductor recognises attention it calls one of SDPA's kernels.
_COMPILED = {"cuda": r"triton_|flash_(fwd|bwd)|fmha_cutlass|cudnn", "cpu": r"Compiled"}


def compile_for(function: Function, full: bool) -> Function:
    """torch.compile for fixed sizes, in one graph; ``full`` tunes as long as possible on a card.

    On a CPU tuning takes half a minute a product to choose the library's, which is the default.
    """
    # The backward pass is timed on a graph that is kept.
    torch._functorch.config.donated_buffer = False
    # Without CUDA graphs of its own: the clock makes one.
    mode = "max-autotune-no-cudagraphs" if full and torch.cuda.is_available() else "default"
    return torch.compile(function, mode=mode, fullgraph=True, dynamic=False)


def eager(function: Function, **options: Any) -> Peer:
    """Plain PyTorch."""
    return Peer(lambda full: function, **options)


def compiled(function: Function, **options: Any) -> Peer:
    """What torch.compile makes of plain PyTorch."""
    return Peer(lambda full: compile_for(function, full), ran=_COMPILED, compiled=True, **options)


def eager_and_compiled(function: Function, **options: Any) -> dict[str, Peer]:
    """The two that every op has."""
    return {"eager": eager(function, **options), "compile": compiled(function, **options)}


Arrange = Callable[[Tensor], tuple[Tensor, ...]]
Restore = Callable[[Tensor, Tensor], Tensor]

_SDPA = {
    "sdpa_flash": (
        SDPBackend.FLASH_ATTENTION,
        {"cuda": r"pytorch_flash|flash_(fwd|bwd)", "cpu": r"flash_attention_for_cpu"},
    ),
    "sdpa_efficient": (
        SDPBackend.EFFICIENT_ATTENTION,
        {"cuda": r"fmha_cutlass|mem_eff", "cpu": r"efficient_attention"},
    ),
    "sdpa_cudnn": (SDPBackend.CUDNN_ATTENTION, {"cuda": r"cudnn", "cpu": r"cudnn"}),
    "sdpa_math": (SDPBackend.MATH, {"cuda": r"(?i)softmax", "cpu": r"attention_math|softmax"}),
}


def sdpa_peers(arrange: Arrange, restore: Restore) -> dict[str, Peer]:
    """scaled_dot_product_attention, each of its backends forced alone."""

    def call(qkv: Tensor, backend: SDPBackend) -> Tensor:
        q, k, v = arrange(qkv)
        with sdpa_kernel([backend]):
            return restore(scaled_dot_product_attention(q, k, v), qkv)

    return {n: eager(partial(call, backend=b), ran=ran) for n, (b, ran) in _SDPA.items()}


def flex_peer(arrange: Arrange, restore: Restore) -> Peer:
    """FlexAttention, compiled, which is the only way it is meant to run."""

    def build(full: bool) -> Function:
        from torch.nn.attention.flex_attention import flex_attention

        attend = compile_for(flex_attention, full)
        return lambda qkv: restore(attend(*arrange(qkv)), qkv)

    # A template of Inductor; its name holds the operator's in some versions only.
    ran = {"cuda": r"flex_attention|triton_tem", "cpu": r"flex_attention|Compiled"}
    return Peer(build, ran=ran, compiled=True)


def kernel_names(call: Callable[[], Any], device: str) -> list[str]:
    """The kernels of a call on a card, the operators of one on a CPU, each name once."""
    profiled = timing.profile(call, device)
    device_type = DeviceType.CUDA if device == "cuda" else DeviceType.CPU
    names = [e.name for e in profiled.events() if e.device_type == device_type]
    return list(dict.fromkeys(names))


def check_ran(peer: Peer, names: list[str], device: str) -> None:
    """Raises NotWhatRan unless one of the kernels is the peer's."""
    pattern = peer.ran.get(device)
    if pattern and not any(re.search(pattern, name) for name in names):
        shown = ", ".join(names[:4]) or "nothing"
        raise NotWhatRan(f"no kernel matches {pattern!r}; what ran: {shown}")
