"""Which implementation of an op runs, and why the others do not.

A backend is asked for in five ways; the first that says one wins: the argument ``backend=``,
``with ops.backend(...)``, ``CMPOSE_<OP>_BACKEND`` (for example ``CMPOSE_DPC_KNN_BACKEND``),
``CMPOSE_BACKEND``, and ``auto``. ``auto`` takes the best backend that can run the call, and says
so where that is the reference only (:class:`FallbackWarning`); :func:`explain` tells which one, and
why not the others. Any other choice either runs or raises :class:`BackendUnavailable`: no op
silently runs on a backend other than the one asked for.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import inspect
import os
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cmpose import native

OPS = (
    "spatial_attention",
    "temporal_attention",
    "corrupt_tokens",
    "reconstruction_loss",
    "heatmap_loss",
    "warp_clips",
    "select_tokens",
    "dpc_knn",
    "merge_clusters",
    "unmerge_tokens",
    "knn",
)
BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")

PLAIN = "plain"
"""The reference as ordinary PyTorch, which has derivatives of any order and which Inductor can
compile. An explicit ``reference`` means this; ``auto`` runs the reference as a registered op."""

MIN_CAPABILITY = (8, 0)

_ORDER = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}  # device → what auto tries, in this order
_HAS_TRITON = importlib.util.find_spec("triton") is not None


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot run this call here; the message says why."""


class FallbackWarning(UserWarning):
    """``auto`` runs a reference on a device for which the op has something faster.

    It is given once per op and reason, and never with ``CMPOSE_FALLBACK_WARNINGS=0``.
    """


class _Entry(NamedTuple):
    function: Callable[..., Any]  # the public one, for its signature
    tensor: str  # the argument on whose device it runs
    limits: dict[str, Callable[..., str | None] | None]  # backend → what it refuses, if anything


_ENTRIES: dict[str, _Entry] = {}


def entry(
    function: Callable[..., Any], tensor: str, **limits: Callable[..., str | None] | None
) -> None:
    """Makes a public op known to :func:`choose` and :func:`explain`.

    Args:
        function: the public function.
        tensor: the name of the argument on whose device it runs.
        limits: for each backend beside the reference, a function of some of the op's arguments,
            which it names as the op does; all backends' functions take the same ones. It returns
            the reason why the backend does not take them, or None. None in place of a function:
            the backend takes whatever the op takes.
    """
    _ENTRIES[function.__name__] = _Entry(function, tensor, limits)


def dtype_refusal(**tensors: Tensor | None) -> str | None:
    """Why kernels do not take tensors of these dtypes, or None. No kernel computes in float64."""
    for name, value in tensors.items():
        if value is not None and value.dtype == torch.float64:
            return f"{name} is float64; the kernels take float32, float16 and bfloat16"
    return None


def interpreter_refusal(
    *, dtype: torch.dtype | None = None, **tensors: Tensor | None
) -> str | None:
    """Why Triton's interpreter does not take ``dtype`` or tensors of their dtypes, or None.

    It computes bfloat16 wrongly and in silence; on a GPU the kernels take it.
    """
    dtypes = {"dtype": dtype} | {n: t.dtype for n, t in tensors.items() if t is not None}
    for name, tensor_dtype in dtypes.items() if _interpreted() else ():
        if tensor_dtype == torch.bfloat16:
            return f"{name} is bfloat16, which Triton's interpreter computes wrongly"
    return None


# -- what the machine can do ----------------------------------------------------------------------

_capabilities: dict[int, tuple[str, int, int]] = {}


def _card(index: int) -> tuple[str, int, int]:
    """Name and compute capability of a GPU."""
    if index not in _capabilities:
        card = torch.cuda.get_device_properties(index)
        _capabilities[index] = card.name, card.major, card.minor
    return _capabilities[index]


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on")


@functools.cache
def _interpreter_fails() -> str | None:
    """Why Triton's interpreter cannot run: before 3.7 it makes numbers of arrays of one element in
    a way that numpy 2.4 refuses."""
    try:
        triton, numpy = (importlib.metadata.version(name) for name in ("triton", "numpy"))
    except importlib.metadata.PackageNotFoundError:
        return None
    if _release(triton) >= (3, 7) or _release(numpy) < (2, 4):
        return None
    return (
        f"the interpreter of triton {triton} fails with numpy {numpy}; "
        "pip install 'triton>=3.7' or 'numpy<2.4'"
    )


def _release(version: str) -> tuple[int, ...]:
    """``3.7.1+git`` → (3, 7)"""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def _card_of(device: torch.device) -> tuple[str, int, int]:
    return _card(torch.cuda.current_device() if device.index is None else device.index)


def _too_old(name: str, major: int, minor: int) -> str | None:
    if (major, minor) >= MIN_CAPABILITY:
        return None
    needed = ".".join(map(str, MIN_CAPABILITY))
    return f"{name} has compute capability {major}.{minor}; the kernels need {needed} or more"


def _ungated(name: str, major: int, minor: int) -> str | None:
    """Why cards of compute capability 10.x and 11.x have no Triton kernels."""
    if major not in (10, 11):
        return None
    return (
        f"{name} has compute capability {major}.{minor}, for which the Triton kernels are not "
        "checked, and triton 3.6.0 is known to compute wrong products there "
        "(triton-lang/triton#9871); use backend='reference'"
    )


def _without_triton(device: torch.device) -> str | None:
    """Why no Triton kernel can run on ``device``."""
    if not _HAS_TRITON:
        return "triton is not installed (pip install triton)"
    if device.type == "cpu":
        if _interpreted():
            return _interpreter_fails()
        return (
            "on the CPU; Triton kernels need CUDA tensors (TRITON_INTERPRET=1, set before Python "
            "starts, runs them in Triton's slow interpreter, for tests)"
        )
    if device.type != "cuda":
        return f"on {device.type}; Triton kernels need CUDA tensors"
    card = _card_of(device)
    return _too_old(*card) or _ungated(*card)


def _without_cuda(device: torch.device) -> str | None:
    """Why no CUDA C++ kernel can run on ``device``."""
    reason = native.unavailable()
    if reason is not None:
        return reason
    if native.on_cpu():
        if device.type == "cpu":
            return None
        return f"on {device.type}; {native.ON_CPU} is set, whose kernels need CPU tensors"
    if device.type == "cpu":
        return "on the CPU; CUDA kernels need CUDA tensors"
    if device.type != "cuda":
        return f"on {device.type}; CUDA kernels need CUDA tensors"
    name, major, minor = _card_of(device)
    return _too_old(name, major, minor) or native.card_unavailable(major, minor, name)


def _without_cpu(device: torch.device) -> str | None:
    """Why the library calls for CPUs cannot run on ``device``."""
    return None if device.type == "cpu" else f"on {device.type}; the CPU path needs CPU tensors"


_WITHOUT = {"cpu": _without_cpu, "triton": _without_triton, "cuda": _without_cuda}
"""Every backend that an op may have beside the reference → why it cannot run on a device."""


def _unavailable(op: str, backend: str, device: torch.device) -> str | None:
    """Why ``backend`` cannot run ``op`` on ``device`` at all."""
    if backend not in _ENTRIES[op].limits:
        implementation = "CPU path" if backend == "cpu" else f"{backend} kernel"
        return f"it has no {implementation} in this version"
    return _WITHOUT[backend](device)


# torch.compile takes what the machine has as a constant and does not trace the function. This is
# what torch.compiler.assume_constant_result does; that would import torch._dynamo, which takes a
# second.
_unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def available(op: str, device: torch.device | str | None = None) -> dict[str, str | None]:
    """The backends of ``op`` on a device: name → None when it can run, else the reason why not.

    What a backend refuses because of a call's arguments, :func:`explain` tells.

    Args:
        op: one of :data:`OPS`.
        device: where the tensors are; None is the current CUDA device, or the CPU without one.

    Raises:
        ValueError: ``op`` is not one of :data:`OPS`.
    """
    _check_op(op)
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    return {"reference": None} | {b: _unavailable(op, b, device) for b in _WITHOUT}


def preferred(op: str, device: torch.device | str | None = None) -> str:
    """What ``auto`` runs on a device when the arguments are within its backends' limits."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return _best(torch.device(device), available(op, device))


def _best(device: torch.device, reasons: dict[str, str | None]) -> str:
    """What ``auto`` takes: the device's first backend that nothing speaks against (``reasons``)."""
    return next((b for b in _ORDER.get(device.type, ()) if reasons[b] is None), "reference")


def _check_op(op: str) -> None:
    if op not in OPS:
        raise ValueError(f"op must be one of {', '.join(OPS)}, got {op!r}")


# -- what is asked for ----------------------------------------------------------------------------

_ALL = "all"
_forced: dict[str, str] = {}


def _check_name(source: str, backend: str) -> None:
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {backend!r}")


@contextmanager
def backend(name: str | None = None, /, **per_op: str) -> Iterator[None]:
    """Within it ops run on the backends named: ``with ops.backend("reference"):``.

    Args:
        name: for every op; None changes nothing.
        per_op: for single ops, ``with ops.backend(dpc_knn="reference"):``; wins over ``name``.

    It holds for the whole process. A call's own ``backend=``, unless ``auto``, wins over it.

    Raises:
        ValueError: no such op or backend.
    """
    for op in per_op:
        _check_op(op)
    forced = ({_ALL: name} if name is not None else {}) | per_op
    for value in forced.values():
        _check_name("backend", value)
    before = dict(_forced)
    _forced.update(forced)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)


def _requested(op: str, backend: str) -> tuple[str, str]:
    """The backend that is asked for, and what asks for it (empty for ``auto``)."""
    if not isinstance(backend, str) or backend != "auto":
        _check_name("backend", backend)
        return backend, "the argument"
    for key in (op, _ALL) if _forced else ():
        if _forced.get(key, "auto") != "auto":
            return _forced[key], "ops.backend"
    for variable in (_VARIABLES[op], "CMPOSE_BACKEND"):
        value = os.environ.get(variable)
        if value:
            _check_name(variable, value)
            if value != "auto":
                return value, variable
    return "auto", ""


_VARIABLES = {op: f"CMPOSE_{op.upper()}_BACKEND" for op in OPS}


def _warn_of_unknown_variables() -> None:
    """Names the variables that would choose an op's backend if there were such an op."""
    variables = "CMPOSE_BACKEND", *_VARIABLES.values()
    for name in os.environ:
        if name.startswith("CMPOSE_") and name.endswith("_BACKEND") and name not in variables:
            ops = ", ".join(OPS)
            warnings.warn(f"{name} is ignored: no such op; the ops are {ops}", stacklevel=2)


_warn_of_unknown_variables()  # once, when the ops are imported


# -- what runs ------------------------------------------------------------------------------------


def choose(op: str, backend: str, device: torch.device, *arguments: Any) -> str:
    """The implementation that runs a call: ``plain`` or one of :data:`BACKENDS` but ``auto``.

    Args:
        op: the op's name.
        backend: the call's argument.
        device: where its tensors are.
        arguments: what the op's limits take, in their order.

    Raises:
        ValueError: there is no such backend.
        BackendUnavailable: the backend asked for cannot run this call.
    """
    requested, source = _requested(op, backend)
    if requested == "reference":
        return PLAIN
    limits = _ENTRIES[op].limits
    if requested == "auto":
        reasons = []
        for other in _ORDER.get(device.type, ()):
            if other in limits:
                if (reason := _refusal(op, other, device, arguments)) is None:
                    return other
                reasons.append(f"{other}: {reason}")
        if reasons:
            _tell(op, "; ".join(reasons))
        return "reference"
    reason = _refusal(op, requested, device, arguments)
    if reason is not None:
        raise BackendUnavailable(
            f"{op} cannot run on backend {requested!r} (from {source}): {reason}; "
            "use backend='auto' or 'reference'"
        )
    return requested


def _refusal(op: str, other: str, device: torch.device, arguments: tuple[Any, ...]) -> str | None:
    if (reason := _unavailable(op, other, device)) is not None:
        return reason
    limit = _ENTRIES[op].limits[other]
    return None if limit is None else limit(*arguments)


_told: set[tuple[str, str]] = set()


def _tell(op: str, reason: str) -> None:
    """Warns, once per op and reason, that ``auto`` falls back on the reference."""
    if (op, reason) in _told or os.environ.get("CMPOSE_FALLBACK_WARNINGS") == "0":
        return
    _told.add((op, reason))
    warnings.warn(
        f"{op} runs its reference, which is slow: {reason}. Silence this with "
        "CMPOSE_FALLBACK_WARNINGS=0, or ask for backend='reference'.",
        FallbackWarning,
        stacklevel=4,  # where the op is called
    )


# As of _unavailable: torch.compile calls it while it traces, and does not trace it.
_tell._dynamo_marked_constant = True  # type: ignore[attr-defined]


class Explanation(NamedTuple):
    """Result of :func:`explain`; printing it gives text."""

    op: str
    backend: str
    """The backend that would run the call. If the one asked for cannot, still that one."""
    asked: str
    """What was asked for, and what asked for it."""
    reasons: dict[str, str | None]
    """Backend → None if it could run the call, else the reason why not."""

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend} ({self.asked})"]
        lines += [f"  {name}: {reason or 'can run'}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def explain(op: str, *arguments: Any, **keywords: Any) -> Explanation:
    """Which backend would run ``op`` with these arguments, and why the others would not.

    >>> print(ops.explain("temporal_attention", qkv))

    Args:
        op: one of :data:`OPS`.
        arguments: the call's positional arguments.
        keywords: the call's keyword arguments, ``backend=`` among them.

    Raises:
        ValueError: no such op or backend.
        TypeError: arguments that the op does not take.
    """
    _check_op(op)
    public = _ENTRIES[op]
    bound = inspect.signature(public.function).bind(*arguments, **keywords)
    bound.apply_defaults()
    values = bound.arguments
    tensor = values[public.tensor]
    if isinstance(tensor, (tuple, list)) and tensor:
        tensor = tensor[0]
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{public.tensor} must be a torch.Tensor, got {type(tensor).__name__}")
    reasons: dict[str, str | None] = {"reference": None}
    for other in _WITHOUT:
        reasons[other] = _unavailable(op, other, tensor.device)
        if reasons[other] is None and (limit := public.limits[other]) is not None:
            reasons[other] = limit(**{n: values[n] for n in inspect.signature(limit).parameters})
    requested, source = _requested(op, values["backend"])
    runs = _best(tensor.device, reasons) if requested == "auto" else requested
    return Explanation(op, runs, f"{requested}, from {source}" if source else "auto", reasons)
