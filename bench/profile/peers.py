"""An op's stock choices, profiled as its own kernels are: bound and estimate, never measured.

What torch.compile writes for a peer of ``bench/OP.py`` (:mod:`bench.profile.inductor`), with
FlexAttention's template, is compiled for the card and counted. Of the configurations that Inductor
would race on the card the one with the least estimate is taken. A call of a library's kernel (a
product of cuBLAS, a sort) can't be counted: it stands at its bound, the time to read its inputs and
write its results once, or to multiply at the tensor cores' full rate. That favours the peer.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils import _pytree as pytree

from bench.harness.records import Record
from bench.harness.targets import bench_of
from bench.harness.workload import Draw, Workload
from bench.profile import inductor, model
from bench.profile.cards import Card
from bench.profile.counts import Counts, Unmatched, count
from bench.profile.sass import UnknownOpcode
from bench.report.tables import table
from cmpose import provenance
from cmpose.files import write_json
from tests.ptx_on_cpu.machine import Fault
from tests.ptx_on_cpu.parse import Unknown

REFUSED = (Unknown, UnknownOpcode, Unmatched, Fault, ArithmeticError, ValueError)
"""Why a kernel may not be counted."""

SAMPLES = 24
"""Blocks of a large launch that run: those of a generated kernel are alike."""

UNMATCHED = 0.4
"""Share of a kernel's loads and stores that its SASS may lack: ptxas merges some that Inductor
writes. Sectors are counted in the PTX all the same; instructions are then roughly right."""

TINY = 1 << 16
"""Elements up to which a library's call is run, for what kernels after it read."""

LIBRARY = "its kernels are a library's, which torch for CPUs does not have"
"""Why the peers that torch does not compile have no figure."""


@dataclass(frozen=True)
class PeerProfile:
    """What one peer takes on a card, or why that is not known.

    Attributes:
        kernels: counted, each with its estimate in microseconds.
        calls: of libraries, each with its bound.
        refused: empty if all was counted.
    """

    name: str
    kernels: list[tuple[str, float]]
    calls: dict[str, float]
    bound_us: float
    estimate_us: float
    refused: str = ""


def peers_of(workload: Workload, card: Card) -> list[PeerProfile]:
    """Every peer of a workload on a card, those of torch.compile with their figures."""
    peers = bench_of(workload.op).peers
    compiled = [name for name, peer in peers.items() if peer.compiled]
    plans = inductor.plans([(workload, name) for name in compiled], card.arch)
    found = [
        _profiled(name, plan, workload, card) for name, plan in zip(compiled, plans, strict=True)
    ]
    return found + [_refused(name, LIBRARY) for name in peers if name not in compiled]


def _refused(name: str, reason: str) -> PeerProfile:
    return PeerProfile(name, [], {}, 0.0, 0.0, reason)


class _Zeros(Draw):
    """Large tensors are zeros, of which the system gives only the pages that are touched."""

    def normal(self, *sizes: int) -> torch.Tensor:
        return torch.zeros(*sizes, dtype=self.dtype)


def _profiled(name: str, plan: inductor.Plan | str, workload: Workload, card: Card) -> PeerProfile:
    if isinstance(plan, str):
        return _refused(name, plan)
    kept: list[Counts] = []
    calls: dict[str, float] = {}
    asked = {id(step) for step in plan.steps[plan.forward :]}
    in_l2 = sum(plan.storages) <= card.l2_mb * 1e6

    def estimate(counts: list[Counts]) -> float:
        return model.profile(counts, card, workload.dtype, 0).estimate_us

    def launched(step: inductor.Kernel, arguments: Sequence[Any]) -> None:
        if id(step) not in asked and max(math.prod(grid) for _, grid in step.candidates) > 1:
            return  # what it computes is not looked at
        every: list[list[Counts]] = [
            count(
                [inductor.launch_of(step, arguments, at)],
                card.arch,
                samples=SAMPLES,
                unmatched=UNMATCHED,
            )
            for at in range(len(step.candidates))
        ]
        if id(step) in asked:
            best: list[Counts] = min(every, key=estimate)
            kept.extend(best)

    def called(step: inductor.Library) -> bool:
        if id(step) in asked:
            calls[f"{len(calls)} {step.operator}"] = _call_us(step, card, workload.dtype, in_l2)
        return max(map(_elements, _views(step)), default=0) <= TINY

    arguments = bench_of(workload.op).make(
        workload.shape, _Zeros(getattr(torch, workload.dtype), "cpu")
    )
    try:
        inductor.run(plan, arguments, launched, called)
        profile = model.profile(kept, card, workload.dtype, 0)
    except REFUSED as error:
        return _refused(name, f"{type(error).__name__}: {error}".splitlines()[0])
    launches = sum(max(us, card.launch_us) for us in calls.values())
    return PeerProfile(
        name,
        [(one.counts.kernel, one.estimate_us) for one in profile.launches],
        calls,
        profile.bound_us + sum(calls.values()),
        profile.estimate_us + launches,
    )


def _views(step: inductor.Library) -> list[inductor.View]:
    every = pytree.tree_leaves((step.arguments, step.options, step.results))
    return [leaf for leaf in every if isinstance(leaf, inductor.View)]


def _elements(view: inductor.View) -> int:
    return math.prod(n for n, stride in zip(view.size, view.stride, strict=True) if stride)


def _call_us(step: inductor.Library, card: Card, dtype: str, in_l2: bool) -> float:
    """The least time of a library's call."""
    moved = sum(_elements(view) * view.dtype.itemsize for view in _views(step))
    rate = card.l2_bytes * card.sms * card.clock_ghz if in_l2 else card.dram_gb_s
    least = moved / (rate * 1e3)
    if step.operator.startswith(("aten.bmm", "aten.mm")):
        a, b = (view.size for view in _views(step)[:2])
        clocks = 2 * math.prod(a) * b[-1] / card.tensor[dtype] / card.sms
        least = max(least, clocks / (card.clock_ghz * 1e3))
    return least


def shown(workload: Workload, card: Card, ours_us: float, found: Sequence[PeerProfile]) -> str:
    """A table, fastest first, with each peer's time over ours; then why others are not in it."""
    known = sorted((p for p in found if not p.refused), key=lambda p: p.estimate_us)
    rows = [
        [peer.name, str(len(peer.kernels)), str(len(peer.calls)), f"{peer.bound_us:,.1f}",
         f"{peer.estimate_us:,.1f}", f"{peer.estimate_us / ours_us:.2f}×"]
        for peer in known
    ]  # fmt: skip
    head = ["peer", "kernels", "library calls at their bound", "bound", "estimate", "over ours"]
    lines = [f"{workload} on {card.name}: ours {ours_us:,.1f} µs (estimate)", "", table(head, rows)]
    lines += ["", *(f"{peer.name}: not profiled: {peer.refused}" for peer in found if peer.refused)]
    return "\n".join(lines)


def record(workload: Workload, card: Card, ours_us: float, found: Sequence[PeerProfile]) -> Record:
    """As ``--json`` writes it."""
    return {
        **asdict(workload),
        "card": card.name,
        "estimate_us": ours_us,
        "peers": [asdict(peer) for peer in found],
        "provenance": provenance.provenance(),
    }


def save(path: Path, found: Sequence[Record]) -> None:
    """Writes records of peers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, {"schema": 1, "peers": list(found)})
