"""Checks of the ops' arguments: one message per violated condition, naming the argument.

Shapes, dtypes and devices are always checked; that costs next to nothing and leaves no trace in
what ``torch.compile`` makes. The *values* of a tensor are read only where nothing has to wait for
them: on the CPU, outside ``torch.compile`` (:func:`readable`). Every op's docstring says what it
does with bad values elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INDEX = (torch.int64,)
BOOL = (torch.bool,)
UINT8 = (torch.uint8,)
NUMERIC = (*FLOATING, torch.int64, torch.int32)

Sizes = dict[str, int]

MAY_BE_EMPTY = ("B", "K", "C", "M")
"""Dimensions that may be 0: a batch, keypoints, causal tokens, and those that are left to be
merged."""


def _names(dtypes: Iterable[torch.dtype]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def tensor(
    name: str, value: Any, dims: str, sizes: Sizes, dtypes: tuple[torch.dtype, ...] = FLOATING
) -> None:
    """Checks that ``value`` is a tensor of shape ``dims`` and one of ``dtypes``.

    Args:
        name: the argument's name, for messages.
        value: what the caller passed.
        dims: one word per dimension. A number is that very size; a symbol is a size that all
            arguments of a call share, at least 1 unless it is one of :data:`MAY_BE_EMPTY`; a sum
            such as ``N+K`` adds symbols that are already bound.
        sizes: symbol → size, as bound so far; new symbols are added.
        dtypes: the dtypes that are allowed.

    Raises:
        TypeError: it is no tensor, or one of another dtype, or not dense.
        ValueError: it has another shape.
    """
    dense(name, value)
    if value.dtype not in dtypes:
        raise TypeError(f"{name} must be of dtype {_names(dtypes)}, got {_names([value.dtype])}")
    words = dims.split()
    shape = value.shape
    if len(words) != len(shape):
        raise ValueError(f"{name} must have shape [{', '.join(words)}], got {list(shape)}")
    for word, size in zip(words, shape, strict=True):
        if word.isdigit():
            expected = int(word)
        elif "+" in word:
            expected = sum(sizes[part] for part in word.split("+"))
        elif word in sizes:
            expected = sizes[word]
        else:
            if size < 1 and word not in MAY_BE_EMPTY:
                raise ValueError(
                    f"{name} must have {word} ≥ 1 in [{', '.join(words)}], got {list(shape)}"
                )
            sizes[word] = size
            continue
        if size != expected:
            reason = "" if word.isdigit() else f" with {word}={expected} as in the other arguments"
            raise ValueError(
                f"{name} must have shape [{', '.join(words)}]{reason}, got {list(shape)}"
            )


def dense(name: str, value: Any) -> None:
    """Checks that ``value`` is a tensor whose elements are all in memory, by strides.

    Raises:
        TypeError: it is no tensor, or a sparse, nested or otherwise packed one.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
    if value.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one; pad it and give lengths")
    if value.layout != torch.strided:
        layout = str(value.layout).removeprefix("torch.")
        raise TypeError(f"{name} must be a dense tensor, got layout {layout}; use .to_dense()")


def same_device(first: str, reference: Tensor, **others: Tensor | None) -> None:
    """Checks that every tensor is on ``reference``'s device; ``first`` is that one's name.

    Raises:
        ValueError: one is not.
    """
    for name, other in others.items():
        if other is not None and other.device != reference.device:
            raise ValueError(
                f"{name} must be on {first}'s device {reference.device}, got {other.device}"
            )


def same_dtype(first: str, reference: Tensor, **others: Tensor) -> None:
    """Checks that every tensor has ``reference``'s dtype; ``first`` is that one's name.

    Raises:
        TypeError: one does not.
    """
    for name, other in others.items():
        if other.dtype != reference.dtype:
            raise TypeError(
                f"{name} must have {first}'s dtype {_names([reference.dtype])}, "
                f"got {_names([other.dtype])}"
            )


def _shown(value: Any) -> str:
    """What a message shows of a value: of a long one its beginning."""
    try:
        text = repr(value)
    except ValueError:  # an integer of thousands of digits
        text = f"an integer of {value.bit_length()} bits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def several(name: str, value: Any, count: int) -> tuple[Any, ...]:
    """Checks that ``value`` is a tuple or list of ``count`` values, and returns them.

    Raises:
        TypeError: it is of another type.
        ValueError: it holds more or fewer.
    """
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{name} must be a tuple of {count} numbers, got {_shown(value)}")
    if len(value) != count:
        raise ValueError(f"{name} must hold {count} numbers, got {_shown(value)}")
    return tuple(value)


def choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Checks that ``value`` is one of ``choices``.

    Raises:
        ValueError: it is not.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {_shown(value)}")


def boolean(name: str, value: Any) -> None:
    """Checks that ``value`` is True or False.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {_shown(value)}")


def integer(name: str, value: Any) -> None:
    """Checks that ``value`` is a whole number.

    Raises:
        TypeError: it is of another type.
    """
    if isinstance(value, bool) or not isinstance(value, (torch.SymInt, Integral)):
        raise TypeError(f"{name} must be an integer, got {_shown(value)}")


def _number(name: str, value: Any) -> None:
    symbols = (torch.SymInt, torch.SymFloat)  # in a graph that torch.compile makes
    if isinstance(value, bool) or not isinstance(value, (Real, *symbols)):
        raise TypeError(f"{name} must be a number, got {_shown(value)}")


def number(name: str, value: Any, dtype: torch.dtype) -> None:
    """Checks that ``value`` is a number that is neither NaN nor infinite, in ``dtype`` too.

    Raises:
        TypeError: it is of another type.
        ValueError: it is NaN, infinite, or more than ``dtype`` holds.
    """
    _number(name, value)
    largest = torch.finfo(dtype).max
    if not -largest <= value <= largest:
        raise ValueError(f"{name} must be finite in {_names([dtype])}, got {_shown(value)}")


def between(name: str, value: Any, low: float, high: float, why: str = "") -> None:
    """Checks that ``value`` is a number and ``low`` ≤ ``value`` ≤ ``high``.

    It must be an integer where the bounds are.

    Raises:
        TypeError: it is of another type.
        ValueError: it is not between them (or is NaN).
    """
    if isinstance(low, int):
        integer(name, value)
    else:
        _number(name, value)
    if not low <= value <= high:
        because = f" ({why})" if why else ""
        raise ValueError(f"{name} must be between {low} and {high}{because}, got {_shown(value)}")


def seed(value: Any, reference: Tensor) -> Tensor:
    """A seed as an int64 tensor of one element on ``reference``'s device; an integer becomes one.

    Raises:
        TypeError: it is neither a tensor nor an integer, or a tensor that is not int64.
        ValueError: it has not one element, is on another device, or an integer beyond 64 bits.
    """
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (torch.SymInt, Integral)):
            raise TypeError(
                f"seed must be an int64 tensor of one element or an integer, got {_shown(value)}"
            )
        between("seed", value, -(2**63), 2**63 - 1)
        # Filled on the device: nothing is copied there that the host would have to wait for.
        return torch.full((), value, dtype=torch.int64, device=reference.device)
    dense("seed", value)
    if value.dtype != torch.int64:
        raise TypeError(f"seed must be of dtype int64, got {_names([value.dtype])}")
    if value.numel() != 1:
        raise ValueError(f"seed must hold one element, got shape {list(value.shape)}")
    same_device("tokens", reference, seed=value)
    return value


def normalizer(value: Any, reference: Tensor) -> None:
    """Checks a loss's normalizer: a tensor of one element on ``reference``'s device.

    Raises:
        TypeError: it is no tensor.
        ValueError: it has not one element, or is on another device.
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"normalizer must be a tensor of one element or None, got {type(value).__name__}"
        )
    dense("normalizer", value)
    if value.dtype not in NUMERIC:
        raise TypeError(
            f"normalizer must be of dtype {_names(NUMERIC)}, got {_names([value.dtype])}"
        )
    if value.numel() != 1:
        raise ValueError(f"normalizer must hold one element, got shape {list(value.shape)}")
    same_device("pred", reference, normalizer=value)


_values_are_checked = True


@contextmanager
def without_value_checks() -> Iterator[None]:
    """Within it the ops do not check tensors' values on the CPU either, as on a GPU.

    It is for callers that look for NaN themselves. Training does: it looks at the loss, and names
    the term that is not finite. Shapes, dtypes and devices are still checked.
    """
    global _values_are_checked
    before, _values_are_checked = _values_are_checked, False
    try:
        yield
    finally:
        _values_are_checked = before


def readable(value: Tensor) -> bool:
    """Whether the values of ``value`` may be read: nothing waits for them, and checks are on."""
    if torch.compiler.is_compiling() or _batched(value):
        return False
    return _values_are_checked and value.device.type == "cpu"


def _batched(value: Tensor) -> bool:
    """Whether ``torch.func.vmap`` is at work, which lets nobody read values."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            return True
        value = functorch.get_unwrapped(value)
    return False


def finite(name: str, value: Tensor) -> None:
    """Checks that ``value`` holds no NaN or infinity, where values may be read.

    Raises:
        ValueError: it does.
    """
    # A finite sum has no NaN or infinity in it, and takes one fast pass.
    if readable(value) and not (bool(value.sum().isfinite()) or bool(value.isfinite().all())):
        raise ValueError(f"{name} must be finite, got {int((~value.isfinite()).sum())} NaN or inf")


def indices(name: str, value: Tensor, limit: int, unit: str) -> None:
    """Checks that 0 ≤ ``value`` < ``limit``, where values may be read.

    Raises:
        ValueError: an index lies outside.
    """
    if not readable(value) or value.numel() == 0:
        return
    low, high = (int(bound) for bound in value.aminmax())
    if low < 0 or high >= limit:
        raise ValueError(f"{name} must lie in 0..{limit - 1} ({unit}), got {low}..{high}")


def _has_autocast(kind: str) -> bool:
    return torch.amp.is_autocast_available(kind)


# torch.compile takes it as a constant: dynamo of torch 2.11 cannot trace it.
_has_autocast._dynamo_marked_constant = True  # type: ignore[attr-defined]


def without_autocast(value: Tensor) -> AbstractContextManager[Any]:
    """Within it autocast is off on ``value``'s device: products keep the dtype of their factors."""
    kind = value.device.type
    return torch.autocast(kind, enabled=False) if _has_autocast(kind) else nullcontext()


def accumulator(*values: Tensor) -> torch.dtype:
    """The dtype of sums over ``values``: float64 if any of them is float64, else float32."""
    return torch.float64 if any(v.dtype == torch.float64 for v in values) else torch.float32
