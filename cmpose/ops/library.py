"""Registration of the ops with torch, so that autograd, torch.compile and tests see them alike.

Every op is a ``torch.library`` op ``cmpose::<name>`` whose last argument names the backend. It is
opaque to ``torch.compile``; its fake says what it returns. Gradients come from a
``torch.autograd.Function`` outside of it, whose backward calls ``cmpose::<name>_backward``; that
order costs the least per call. The PyTorch reference is one of the backends, on every device, so
the very same path runs on a machine without a GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NAMESPACE = "cmpose"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {}
"""Registered op → backend → function; looked up at every call."""


def triton_kernel(op: str, function: str) -> Callable[..., Any]:
    """``cmpose.kernels.<op>.<function>``, imported (and with it Triton) at the first call."""
    loaded: list[Callable[..., Any]] = []

    def call(*arguments: Any) -> Any:
        if not loaded:
            loaded.append(getattr(importlib.import_module(f"cmpose.kernels.{op}"), function))
        return loaded[0](*arguments)

    return call


def on_device(implementations: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """The backend named by the last argument, run with the first one's device as the current one.

    Triton launches on the current device, which need not be the tensors'.
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
        schema: torch's schema without the namespace; the last argument must be ``str backend``
            and the first a tensor, on whose device the op runs.
        fake: the same arguments → empty results with the right shapes, dtypes and strides.
        implementations: backend → function of the arguments before ``backend``.
    """
    name = schema.partition("(")[0]
    IMPLEMENTATIONS[name] = implementations
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    _LIBRARY.impl(name, on_device(implementations), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


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
    """``function(*arguments)`` for use in a backward: differentiating the result raises.

    Without it a second derivative would be silently wrong, since autograd sees a constant.
    """
    if torch.is_grad_enabled():
        return _FirstOrder.apply(op, function, *arguments)
    return function(*arguments)


# -- losses whose gradients are written in the forward pass ---------------------------------------


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a loss's gradient is kept in between the forward and the backward pass.

    A mean over millions of elements has gradients below float16's range, until a loss scaler's
    upstream gradient lifts them in the backward pass; so float16's are kept in float32.
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

    In a compiled graph a plain product, which Inductor fuses into whatever reads it; else in place
    by the op ``scale``, which skips ``rows`` that are zero, and everything if upstream is 1.
    """
    if torch.compiler.is_compiling() or gradient.dtype != dtype:
        return (gradient * upstream).to(dtype)
    scale(gradient, rows, upstream, backend)
    return gradient


def scale_reference(gradient: Tensor, rows: Tensor, upstream: Tensor) -> None:
    """gradient ← gradient · upstream, in place."""
    gradient.mul_(upstream)
