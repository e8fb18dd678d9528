"""Registration of the ops with torch: one path for autograd, torch.compile and tests.

Every op is a ``torch.library`` op ``cmpose::<name>`` whose last argument names the backend.
``torch.compile`` does not look inside; the op's fake says what it returns. Gradients come from a
``torch.autograd.Function`` that calls the op, and whose backward calls ``cmpose::<name>_backward``;
a gradient registered with the op itself would cost more per call. The PyTorch reference is one of
the backends on every device, so a machine without a GPU runs the same path. An eager call of
backend ``cpu`` that nothing in torch is to see goes to the function at once.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from cmpose.ops import checks

NAMESPACE = "cmpose"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {}
"""Registered op → backend → function; looked up at every call."""


def triton_kernel(op: str, function: str) -> Callable[..., Any]:
    """``cmpose.kernels.<op>.<function>``, imported (and with it Triton) at the first call."""
    loaded: list[Callable[..., Any]] = []

    def call(*arguments: Any) -> Any:
        if not loaded:
            loaded.append(
                getattr(importlib.import_module(f"..kernels.{op}", __package__), function)
            )
        return loaded[0](*arguments)

    return call


def on_device(implementations: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """A function that runs the implementation that its last argument names.

    While it runs, the device of the first argument is the current one: Triton launches on the
    current device, which may be another than the tensors'.
    """

    def run(first: Tensor, *rest: Any) -> Any:
        implementation = implementations[rest[-1]]
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return implementation(first, *rest[:-1])
        return implementation(first, *rest[:-1])

    return run


def register(
    schema: str, fake: Callable[..., Any], **implementations: Callable[..., Any]
) -> Callable[..., Any]:
    """Defines ``cmpose::<schema>`` and returns its overload.

    Args:
        schema: torch's schema without the namespace. The first argument must be a tensor, on
            whose device the op runs, and the last one ``str backend``.
        fake: takes the same arguments and returns empty results of the right shapes, dtypes and
            strides.
        implementations: for each backend a function of the arguments before ``backend``.
    """
    name = schema.partition("(")[0]
    IMPLEMENTATIONS[name] = implementations
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    _LIBRARY.impl(name, on_device(implementations), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    registered = getattr(getattr(torch.ops, NAMESPACE), name).default

    def call(*arguments: Any) -> Any:
        if at_once(arguments):
            return implementations["cpu"](*arguments[:-1])
        return registered(*arguments)

    return call


def at_once(arguments: tuple[Any, ...]) -> bool:
    """Whether a registered op's call, its last argument the backend, goes to the function of
    backend ``cpu`` at once."""
    return arguments[-1] == "cpu" and not _watched(arguments)


def _watched(arguments: tuple[Any, ...]) -> bool:
    """Whether somebody is to see the call of a registered op: a graph's maker, a mode, a transform,
    the profiler or a subclass of Tensor. Where nobody is, a tenth of a small op's time is saved."""
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
        or torch._C._autograd._profiler_enabled()
        or any(isinstance(a, Tensor) and type(a) not in _PLAIN for a in arguments)
    )


_PLAIN = (Tensor, torch.nn.Parameter)


def wants_gradient(op: str, *tensors: Tensor | None) -> bool:
    """Whether autograd is to record a call of ``op`` on these tensors.

    Raises:
        RuntimeError: forward-mode differentiation, of which the registered op would silently make
            a constant, or a gradient within ``torch.func``.
    """
    requires_grad = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in tensors
    )
    if not torch.compiler.is_compiling():
        if requires_grad and torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"{op}: its kernels have no gradient within torch.func (grad, vjp, jacrev, vmap); "
                "backend='reference' has"
            )
        _refuse_tangents(op, tensors)
    return requires_grad


def _refuse_tangents(op: str, arguments: tuple[Any, ...]) -> None:
    if forward_ad._current_level < 0:  # no dual_level, jvp or jacfwd is entered
        return
    for value in arguments:
        while isinstance(value, Tensor) and torch._C._functorch.is_batchedtensor(value):
            value = torch._C._functorch.get_unwrapped(value)
        if isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None:
            raise RuntimeError(
                f"{op}: its kernels have no forward-mode derivative (jvp, jacfwd, dual_level); "
                "backend='reference' has"
            )


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, function: Callable[..., Any], *arguments: Any) -> Any:
        ctx.op = op
        return function(*arguments)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{ctx.op}: its kernels have no second derivative; backend='reference' has"
        )


def first_order(op: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """``function(*arguments)`` in a backward pass; a derivative of its result raises an error.

    Without this a second derivative would be silently wrong: autograd would take it for a constant.
    """
    if not torch.compiler.is_compiling():
        _refuse_tangents(op, arguments)
    if torch.is_grad_enabled():
        return _FirstOrder.apply(op, function, *arguments)
    return function(*arguments)


# -- losses whose gradients are written in the forward pass ---------------------------------------


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a loss's gradient is kept between the forward and the backward pass.

    For float16 it is float32: a mean over millions of elements has gradients below float16's range
    until, in the backward pass, the upstream gradient of a loss scaler makes them larger.
    """
    return torch.float32 if dtype == torch.float16 else dtype


def scaled(
    gradient: Tensor,
    upstream: Tensor,
    dtype: torch.dtype,
    scale: Callable[..., None],
    rows: Tensor,
    backend: str,
) -> Tensor:
    """``gradient`` times the scalar ``upstream``, in ``dtype``; the result may be ``gradient``.

    In a compiled graph this is a plain product, which Inductor fuses into what reads it. Elsewhere
    the op ``scale`` multiplies in place; it skips rows whose entry in ``rows`` is zero, and does
    nothing at all if upstream is 1.
    """
    if torch.compiler.is_compiling() or gradient.dtype != dtype:
        return (gradient * upstream).to(dtype)
    scale(gradient, rows, upstream, backend)
    return gradient


def scale_reference(gradient: Tensor, rows: Tensor, upstream: Tensor) -> None:
    """gradient ← gradient · upstream, in place."""
    gradient.mul_(upstream)


def scale_cpu(gradient: Tensor, rows: Tensor, upstream: Tensor) -> None:
    """The same, but nothing at all for an upstream of 1, which a CPU can look at."""
    if checks.readable(upstream) and upstream.item() == 1:
        return
    gradient.mul_(upstream)
