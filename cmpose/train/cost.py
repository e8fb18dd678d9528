"""From the operators of a step to its time on a card: an estimate, by part of the step.

A product takes the longer of its operations at the rate that the card sustains and its bytes; an op
of cmpose the time of its compiled kernel, as a multiple of that of its bytes; every other operator
that of its bytes. Compiled, operators between two products are taken as fused: what they only hand
on to one another is not in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from cmpose.train.cards import Card
from cmpose.train.trace import Call

COPY_SHARE = 0.9
"""Of the datasheet's rate of a card's memory, what a copy reaches."""

LAUNCH = 1e-6
"""Seconds from one kernel to the next in a CUDA graph."""

COUNTED = ("RTX 4090", "H200 SXM")
"""The cards that cmpose's kernels are counted for."""

OVER_MEMORY: dict[str, tuple[float, float]] = {
    "spatial_attention": (1.17, 2.67),
    "spatial_attention_backward": (1.33, 5.88),
    "temporal_attention": (1.11, 1.14),
    "temporal_attention_backward": (1.11, 1.2),
    "corrupt_tokens": (1.12, 1.38),
    "corrupt_tokens_backward": (1.14, 1.38),
    "dpc_knn": (3.17, 17.3),
    "merge_clusters": (1.11, 2.57),
    "merge_clusters_backward": (1.11, 2.57),
    "reconstruction_loss": (1.11, 1.77),
    "heatmap_loss": (1.23, 7.23),
    "select_tokens": (18.4, 118.0),
}
"""Op → how many times longer its kernels are estimated to take at the reference shape than its
bytes at the full rate of the memory, on each of ``COUNTED``: bench/results/profile/targets.json
(``python -m bench.profile --targets``). Ops that are not here take as long as a copy."""

_APART = (
    *("scatter", "index_put", "index_add", "sort", "topk", "batch_norm", "upsample", "convol"),
    "vector_norm",
)
"""What is in the name of operators that fuse with nothing. A norm of a whole tensor is fp8's: it
must be known before the first number is scaled by it."""


def _fuses(call: Call) -> bool:
    return not (call.ours or call.flops or any(word in call.name for word in _APART))


class _Groups:
    """Which operators a compiler makes one kernel of.

    An operator's level is the number of products (and other operators that fuse with nothing) that
    have come before it, on the longest way. Operators of one level of which one reads what the
    other reads or writes are a group. The backward pass begins at a level of its own.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        self._parent = list(range(len(calls)))
        level: dict[int, int] = {}
        touched: dict[tuple[int, int], int] = {}  # (value, level) → an operator that has it
        top, base, backward = 0, 0, False
        for index, call in enumerate(calls):
            if call.backward and not backward:
                base, backward = top + 1, True
            own = max([base, *(level.get(value, 0) for value in call.reads)])
            alone = not _fuses(call)
            for value in call.reads:
                if not alone:
                    self._join(index, touched.setdefault((value, own), index))
            for value in call.writes:
                level[value] = own + alone
                if not alone:
                    touched[(value, own)] = index
            top = max(top, own + alone)

    def _join(self, one: int, other: int) -> None:
        self._parent[self.of(one)] = self.of(other)

    def of(self, index: int) -> int:
        """The group of an operator."""
        while self._parent[index] != index:
            self._parent[index] = self._parent[self._parent[index]]
            index = self._parent[index]
        return index


def _without_wider_copies(calls: Sequence[Call]) -> list[Call]:
    """The calls as they are when each reader that fuses widens a tensor anew, as it reads it.

    A copy in a wider format, such as a bfloat16 tensor's in float32, is not written to memory for
    the sake of kernels that can read the tensor itself.
    """
    source: dict[int, tuple[int, int]] = {}  # copy → the tensor that it is of, and its bytes
    kept_for: set[int] = set()  # copies that something else than such kernels reads
    for call in calls:
        if call.name == "_to_copy" and len(call.reads) == len(call.writes) == 1:
            (original, size), (copy, wider) = *call.reads.items(), *call.writes.items()
            if wider > size:
                source[copy] = source.get(original, (original, size))
        elif not _fuses(call):
            kept_for.update(call.reads)
    read = {value for call in calls for value in call.reads}
    result = []
    for call in calls:
        copied = source.keys() & call.writes.keys() & read
        if copied and not copied & kept_for:
            continue
        if _fuses(call):
            reads = dict(source.get(value, (value, size)) for value, size in call.reads.items())
            call = replace(call, reads=reads)
        result.append(call)
    return result


def fused(calls: Sequence[Call]) -> list[Call]:
    """The calls with what they move once neighbours are one kernel.

    Bytes stand at the first operator of the group that reads them and at the one that writes them;
    operators that move nothing any more are left out. What nobody reads is a gradient if it is of
    the backward pass, and is not computed if it is of the forward pass.
    """
    calls = _without_wider_copies(calls)
    groups = _Groups(calls)
    readers: dict[int, set[int]] = {}
    for index, call in enumerate(calls):
        for value in call.reads:
            readers.setdefault(value, set()).add(groups.of(index))
    writer_of: dict[int, int] = {}  # value → group that writes it
    have: dict[int, set[int]] = {}  # group → what it has read
    result = []
    for index, call in enumerate(calls):
        group = groups.of(index)
        if _fuses(call):
            already_read = have.setdefault(group, set())
            reads = {
                v: n
                for v, n in call.reads.items()
                if writer_of.get(v) != group and v not in already_read
            }
            already_read.update(call.reads)
            writes = {
                v: n
                for v, n in call.writes.items()
                if readers.get(v, {-1} if call.backward else set()) - {group}
            }
        else:
            reads, writes = call.reads, call.writes
        writer_of.update(dict.fromkeys(call.writes, group))
        if reads or writes:
            result.append(replace(call, reads=reads, writes=writes))
    return result


def rate_of(call: Call, card: Card, *, float16_sums: bool = False) -> float:
    """FLOP/s that a card's datasheet has for an operator's products.

    ``float16_sums``: whether matrix products of 16 bits are summed in float16; convolutions and
    attention never are.
    """
    product = not (call.ours or "convol" in call.name)
    sums = card.flops_16_accumulate if float16_sums and product else card.flops_16
    return {8: card.flops_8 or sums, 16: sums}.get(call.bits, card.flops_32)


def kernel_seconds(call: Call, card: Card, *, float16_sums: bool = False) -> float:
    """One operator's time on a card, without its launch; ``float16_sums`` as in :func:`rate_of`."""
    copied = call.moved / card.bandwidth
    over_memory = OVER_MEMORY.get(call.name) if call.ours else None
    memory = copied * (over_memory[COUNTED.index(card.kernels)] if over_memory else 1 / COPY_SHARE)
    rate = rate_of(call, card, float16_sums=float16_sums)
    return max(memory, call.flops / (rate * card.sustained))


def kind_of(call: Call) -> str:
    """What an operator is, as far as its time goes."""
    if call.ours:
        return "cmpose's ops"
    return "products" if call.flops else "between products"


def seconds_by(
    key: Callable[[Call], str], calls: Iterable[Call], card: Card, *, float16_sums: bool = False
) -> dict[str, float]:
    """What ``key`` says of operators → seconds of these on a card, in order, launches included."""
    seconds: dict[str, float] = {}
    for call in calls:
        duration = kernel_seconds(call, card, float16_sums=float16_sums) + LAUNCH
        seconds[key(call)] = seconds.get(key(call), 0.0) + duration
    return seconds
