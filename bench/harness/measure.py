"""Measures one workload: the op on each backend, and every peer, in one race.

Errors are against exact results: the op's reference in float64 on the same inputs.
"""

from __future__ import annotations

import gc
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bench.harness import records, timing
from bench.harness.peers import Function, WrongResult, check_ran, kernel_names
from bench.harness.shapes import BACKWARD, BOTH, FORWARD
from bench.harness.workload import OpBench, Peer, Workload, tensors, total_bytes
from cmpose import ops, provenance

NOT_RUN = {"status": "not run", "tests": 0, "failed": 0, "command": "--no-gate"}

WRONG = 0.1
"""From this relative error on a result is a wrong one; bfloat16's is a hundredth of it."""

KERNELS_KEPT = 6
"""Names of kernels that a record holds of each entrant."""


class Lost(RuntimeError):
    """The card takes no more work in this process: an entrant's kernel has failed on it.

    Its arguments are the entrant's name and message.
    """


class Setting(NamedTuple):
    """How much is spent on a workload."""

    full: bool = False  # max-autotune for what torch.compile makes
    turns: int = 2  # of the race
    seconds: float = 0.05  # an entrant in a turn
    peers: bool = True
    compiled: bool = True  # False leaves out peers that torch.compile makes


def setting_of(options: Namespace, device: str) -> Setting:
    """For the record (``--full``), or for a first pass; on a CPU the least that runs."""
    turns, seconds = (2, 0.05) if device == "cuda" else (1, 0.005)
    if options.full or options.device == "cpu":
        turns, seconds = 3, 0.3 if options.full else 0.2
    compiled = options.full or device == "cuda"
    return Setting(options.full, turns, seconds, not options.no_peers, compiled)


@dataclass
class Run:
    """What all workloads of one run share."""

    rates: timing.Rates  # the card's, measured in this run
    setting: Setting
    clock: timing.Clock
    origin: dict[str, Any]  # provenance of the records
    # op → backend → outcome of its tests in this run; no speed-up without it
    op_tests: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    journal: records.Journal = field(default_factory=records.Journal)


def call_of(
    function: Function, arguments: dict[str, Any], bench: OpBench, direction: str
) -> timing.Call:
    """One call of the direction that is measured, on one input set."""
    if direction == FORWARD:
        return lambda: function(**arguments)
    inputs = [arguments[name] for name in bench.gradients]

    def run() -> list[Tensor]:
        return [t for t in tensors(function(**arguments)) if t.requires_grad]

    outputs = run()
    # 1 is what a loss gets from .backward(); other outputs get something to multiply by.
    upstream = [torch.ones_like(o) if o.ndim == 0 else torch.randn_like(o) for o in outputs]
    if direction == BOTH:
        return lambda: torch.autograd.grad(run(), inputs, upstream, allow_unused=True)
    return lambda: torch.autograd.grad(
        outputs, inputs, upstream, retain_graph=True, allow_unused=True
    )


def relative_error(result: list[Tensor], exact: list[Tensor]) -> float:
    """‖result − exact‖ / ‖exact‖ over all tensors together."""
    pairs = zip(result, exact, strict=True)
    difference = sum(float((a.double() - b).square().sum()) for a, b in pairs)
    size = sum(float(b.square().sum()) for b in exact)
    return (difference / size) ** 0.5 if size else difference**0.5


def outcome(
    function: Callable[..., Any], arguments: dict[str, Any], bench: OpBench, direction: str
) -> list[Tensor]:
    """What the error is taken of: floating results; the gradients too unless only forward."""
    result = function(**arguments)
    values = [t.detach() for t in tensors(result) if t.is_floating_point()]
    if direction == FORWARD:
        return values
    outputs = [t for t in tensors(result) if t.requires_grad]
    inputs = [arguments[name] for name in bench.gradients]
    spread = (torch.linspace(-1, 2, o.numel(), device=o.device).view(o.shape) for o in outputs)
    # By way of bfloat16, so the same numbers in every dtype.
    upstream = [s.bfloat16().to(o.dtype) for s, o in zip(spread, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, inputs, upstream)
    return list(gradients) if direction == BACKWARD else [*values, *gradients]


def exact_outcome(arguments: dict[str, Any], bench: OpBench, direction: str) -> list[Tensor]:
    """The reference's in float64 on the same, already rounded inputs."""

    def exact(value: Tensor) -> Tensor:
        if not value.is_floating_point():
            return value
        return value.detach().double().requires_grad_(value.requires_grad)

    double = pytree.tree_map_only(Tensor, exact, arguments)
    return outcome(lambda **kw: bench.call(**kw, backend="reference"), double, bench, direction)


def rotated_inputs(
    workload: Workload, bench: OpBench, device: str
) -> tuple[list[dict[str, Any]], bool]:
    """Input sets that do not fit the L2 cache together, and whether they really are cold."""
    first = bench.arguments(workload, device)
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size if device == "cuda" else 0
    count, cold = timing.input_sets(total_bytes(first), l2_bytes, timing.free_bytes(device))
    return [first, *(bench.arguments(workload, device, n) for n in range(1, count))], cold


def backends_for(op: str, device: str, requested: str | None) -> list[str]:
    """The op's kernels that can run on a card; without any ``auto``, which is then a CPU's path.

    On a CPU kernels run in an interpreter or an emulation, if at all, whose time says nothing.
    """
    if requested:
        return [requested]
    reasons = ops.available(op, device) if device == "cuda" else {}
    return [n for n, why in reasons.items() if n != "reference" and why is None] or ["auto"]


def message(error: BaseException) -> str:
    """A failure as a record holds it."""
    text = " ".join(str(error).split()) or "no message"
    return f"error: {type(error).__name__}: {text}"[:300]


@dataclass
class Entrant:
    """One that takes part: a backend of ours or a peer, and what is known of it."""

    name: str
    build: Callable[[], Function]
    peer: Peer | None = None  # None for a backend of ours
    failure: str | None = None  # why it has no time
    function: Function | None = None  # what build gave
    kernels: list[str] = field(default_factory=list)  # that the profiler saw
    wall_us: float = 0.0  # of a call between two synchronisations
    peak_bytes: int = 0  # that a call holds at once beside its inputs
    error: float | None = None  # relative, against float64; None if it is not taken
    seconds: list[float] = field(default_factory=list)  # of a call, a sample each
    timer: str = ""

    @property
    def us(self) -> dict[str, float]:
        return timing.quantiles(self.seconds)


def entrants_of(bench: OpBench, backends: list[str], setting: Setting) -> list[Entrant]:
    """Ours, then the peers; those that are not to run have their failure already."""
    entrants = [Entrant(f"ours:{b}", partial(partial, bench.call, backend=b)) for b in backends]
    for name, peer in bench.peers.items() if setting.peers else ():
        left_out = peer.compiled and not setting.compiled
        failure = "error: left out: compiling takes long on a CPU" if left_out else None
        entrants.append(Entrant(name, partial(peer.build, setting.full), peer, failure))
    return entrants


def in_turn(entrants: list[Entrant], turn: int) -> list[Entrant]:
    """The order of a turn: forwards, then backwards, then both from one further on."""
    start = turn // 2 % len(entrants)
    order = [*entrants[start:], *entrants[:start]]
    return order[::-1] if turn % 2 else order


class _Measurement:
    """One workload's inputs, and the steps that fill its entrants."""

    def __init__(self, workload: Workload, bench: OpBench, run: Run) -> None:
        self.workload, self.bench, self.run = workload, bench, run
        self.device = provenance.device()
        self.sets, self.cold = rotated_inputs(workload, bench, self.device)
        torch._dynamo.reset()
        small = replace(workload, shape=bench.exact_shape(workload.shape))
        self.exact_inputs = bench.arguments(small, self.device, seed=1)
        self.exact = exact_outcome(self.exact_inputs, bench, workload.direction)

    def race(self, entrants: list[Entrant]) -> None:
        """Inspects every entrant, then times those that did not fail, in turns."""
        failures = self.run.journal.failures(self.workload)
        for entrant in entrants:
            entrant.failure = failures.get(entrant.name, entrant.failure)
            self.attempt(self.inspect, entrant)
        for turn in range(self.run.setting.turns):
            for entrant in in_turn(entrants, turn):
                self.attempt(self.time, entrant)

    def attempt(self, step: Callable[[Entrant], None], entrant: Entrant) -> None:
        """A step of one that has not failed yet; raises Lost if the card is gone with it."""
        if entrant.failure is not None:
            return
        try:
            self.run.journal.began(self.workload, entrant.name)
            step(entrant)
        except Exception as error:
            entrant.failure, entrant.function = message(error), None
            # Whatever the failed call holds through its traceback would count as memory in use.
            error.__traceback__ = None
            gc.collect()
            if self.device == "cuda":
                try:
                    torch.cuda.synchronize()
                    torch.cuda.empty_cache()
                except Exception:
                    raise Lost(entrant.name, entrant.failure) from None

    def inspect(self, entrant: Entrant) -> None:
        """What is found out before the race; the memory that it takes is free afterwards."""
        direction, peer = self.workload.direction, entrant.peer
        function = entrant.function = entrant.build()
        call = call_of(function, self.sets[0], self.bench, direction)
        call()
        names = kernel_names(call, self.device)
        if peer is not None:
            check_ran(peer, names, self.device)
        entrant.kernels = [n[:120] for n in names if not n.startswith("Mem")][:KERNELS_KEPT]
        # What backward needs includes what forward keeps for it.
        whole = BOTH if direction == BACKWARD else direction
        entrant.peak_bytes = timing.peak_bytes(
            call_of(function, self.sets[0], self.bench, whole), self.device
        )
        clock, seconds = self.run.clock, self.run.setting.seconds
        walls = timing.sampled(partial(clock.wall, call), clock, seconds)
        entrant.wall_us = timing.quantiles(walls)["p50"]
        # Compiling for the small shape too would take long; what a compiled peer computes is
        # checked through its eager formulation.
        if peer is None or (peer.checked and not peer.compiled):
            result = outcome(function, self.exact_inputs, self.bench, direction)
            entrant.error = relative_error(result, self.exact)
            if not entrant.error < WRONG:
                raise WrongResult(f"its result is off by {entrant.error:.3g} of the exact one")

    def time(self, entrant: Entrant) -> None:
        """A turn of the race; its calls are set up anew, so that one entrant's are in memory."""
        function = entrant.function
        assert function is not None

        def setup() -> list[timing.Call]:
            return [call_of(function, s, self.bench, self.workload.direction) for s in self.sets]

        seconds, timer = timing.passes(self.run.clock, setup, self.run.setting.seconds)
        if entrant.timer not in ("", timer):
            raise RuntimeError(f"was timed by {entrant.timer}, then by {timer}")
        entrant.timer = timer
        entrant.seconds += seconds

    def record(self, ours: Entrant, peers: list[Entrant]) -> records.Record:
        """The record of one backend."""
        backend = ours.name.removeprefix("ours:")
        rates, origin, us = self.run.rates, self.run.origin, ours.us
        moved = self.bench.bytes_of(self.workload)
        flops = self.bench.flops(self.workload.shape, self.workload.direction)
        bound = rates.bound_us(moved, flops, self.workload.dtype)
        copied = rates.bound_us(moved, 0, self.workload.dtype)
        op_tests = self.run.op_tests.get(self.bench.op, {}).get(backend, NOT_RUN)
        ran = {p.name: p for p in peers if p.failure is None}
        is_ratio = "threads" in self.workload.shape  # to the peers, on a CPU
        record = asdict(self.workload) | {
            "backend": backend,
            **{name: getattr(ours, name) for name in ("us", "wall_us", "timer", "peak_bytes")},
            "input_sets": len(self.sets),
            "cold": self.cold,
            "bytes": moved,
            "flops": flops,
            "bound_us": round(bound, 4),
            "percent_of_bound": round(100 * bound / us["p50"], 2) or 0.01,
            "percent_of_copy": round(100 * copied / us["p50"], 2) or 0.01,
            "peers": {p.name: p.failure or p.us["p50"] for p in peers},
            **{
                f"peers_{name}": {n: getattr(p, name) for n, p in ran.items()}
                for name in ("wall_us", "peak_bytes", "timer")
            },
            "error_vs_fp64": ours.error,
            "peers_error_vs_fp64": {n: p.error for n, p in ran.items() if p.error is not None},
            "kernels": {"ours": ours.kernels} | {n: p.kernels for n, p in ran.items()},
            "op_tests": op_tests,
            "setting": "full" if self.run.setting.full else "quick",
            "rates": asdict(rates),
            "note": None if origin["gpu"] or is_ratio else records.NOT_A_RESULT,
            "provenance": origin,
        }
        best, fastest = next(iter(records.comparable(record).items()), (None, 0.0))
        proven = best and op_tests["status"] == "passed" and origin["gpu"] is not None
        record["best_peer"] = best
        record["speedup_vs_best_peer"] = round(fastest / us["p50"], 4) if proven else None
        records.check(record, records.OpRecord, "record")
        return record


def measure(
    workload: Workload, bench: OpBench, backends: list[str], run: Run
) -> tuple[list[records.Record], dict[str, str]]:
    """One record a backend; peers are measured once, beside all of them.

    Returns:
        The records, and for each backend of ours that failed why.

    Raises:
        Lost: after an entrant whose failure leaves the card unusable.
    """
    gc.collect()
    if provenance.device() == "cuda":
        torch.cuda.empty_cache()
    with run.clock.context():
        measurement = _Measurement(workload, bench, run)
        entrants = entrants_of(bench, backends, run.setting)
        measurement.race(entrants)
    ours, peers = ([e for e in entrants if (e.peer is None) == own] for own in (True, False))
    return (
        [measurement.record(e, peers) for e in ours if e.failure is None],
        {e.name.removeprefix("ours:"): e.failure for e in ours if e.failure is not None},
    )
