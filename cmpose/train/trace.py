"""What a step runs: each operator, the bytes that it moves, its operations and its part."""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cmpose.train.flops import counter


@dataclass(frozen=True)
class Call:
    """One operator that moved data.

    Attributes:
        name: without its namespace: ``addmm``, ``spatial_attention``.
        ours: whether it is an op of cmpose.
        part: of the model that it belongs to.
        backward: whether it is of the backward pass.
        reads: value → bytes. A tensor that is written in place is another value afterwards.
        writes: value → bytes.
        flops: operations, where torch counts them (products, convolutions), and attention's.
        bits: of the narrowest input.
    """

    name: str
    ours: bool
    part: str
    backward: bool
    reads: dict[int, int]
    writes: dict[int, int]
    flops: int
    bits: int

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return sum(self.reads.values()) + sum(self.writes.values())


def size_in_memory(tensor: Tensor) -> int:
    """Bytes that a tensor's elements take; an expanded dimension counts once."""
    number = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        number *= size if stride or not size else 1
    return number * tensor.element_size()


class Parts:
    """Which part of a model runs now.

    A backward pass runs in no part: autograd's number of a node tells during which part's forward
    pass it was made.
    """

    def __init__(self, otherwise: str) -> None:
        self._open, self._names, self._numbers = [otherwise], [otherwise], [0]

    def _mark(self) -> None:
        self._names.append(self._open[-1])
        self._numbers.append(torch.autograd._get_sequence_nr())

    def enter(self, name: str) -> None:
        self._open.append(name)
        self._mark()

    def leave(self) -> None:
        self._open.pop()
        self._mark()

    def now(self) -> tuple[str, bool]:
        """The part, and whether its backward pass runs."""
        node = torch._C._current_autograd_node()
        if node is None:
            return self._open[-1], False
        return self._names[bisect.bisect_right(self._numbers, node._sequence_nr()) - 1], True


class Trace(TorchDispatchMode):
    """Notes every operator that is not a view and not a tensor without values.

    Attributes:
        calls: in order.
        parts: is asked what runs.
    """

    def __init__(self, otherwise: str = "") -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.parts = Parts(otherwise)
        self._formulas = counter().flop_registry
        self._values: dict[int, int] = {}
        self._next = 0

    @property
    def moved(self) -> int:
        """Bytes that all of them read and write."""
        return sum(call.moved for call in self.calls)

    def _value(self, tensor: Tensor, *, new: bool) -> int:
        key = tensor.untyped_storage()._cdata
        if new or key not in self._values:
            self._values[key] = self._next
            self._next += 1
        return self._values[key]

    def _sizes(self, tensors: Iterable[Tensor], *, new: bool) -> dict[int, int]:
        sizes: dict[int, int] = {}
        for tensor in tensors:
            value, size = self._value(tensor, new=new), size_in_memory(tensor)
            sizes[value] = size + sizes.get(value, 0)
        return sizes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        returns = func._schema.returns
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        space, name = func._schema.name.split("::")
        if is_view or name == "detach":
            return result
        inputs = list({id(t): t for t in _tensors((args, kwargs))}.values())
        reads = self._sizes(inputs, new=False)
        outputs = _tensors(result)
        writes = self._sizes(outputs, new=True)
        if "empty" in name or not (reads or writes):
            return result
        formula = self._formulas.get(func._overloadpacket)
        flops = int(formula(*args, **kwargs, out_val=result)) if formula else 0
        bits = min((8 * t.element_size() for t in inputs if t.is_floating_point()), default=32)
        part, backward = self.parts.now()
        ours = space == "cmpose"
        self.calls.append(Call(name, ours, part, backward, reads, writes, flops, bits))
        return result


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
