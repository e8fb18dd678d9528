"""Measures one case: the op on each backend, and every peer, in one race."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from bench import provenance, records, timing
from bench.accuracy import WRONG, exact_arguments, exact_outcome, outcome, relative_error
from bench.cases import (
    BACKWARD,
    BOTH,
    FORWARD,
    FP32,
    Case,
    OpBench,
    Peer,
    differentiable,
    element_size,
    total_bytes,
)
from bench.peers import WrongResult, check_ran, kernel_names
from bench.roofline import Rates, floor_seconds
from cmpose import ops

NOT_RUN = {"status": "not run", "tests": 0, "failed": 0, "command": "--no-gate"}

KERNELS_KEPT = 6
"""Names of kernels that a record holds of each entrant."""


class Lost(RuntimeError):
    """The card takes no more work in this process: an entrant's kernel has failed on it."""

    def __init__(self, case: Case, entrant: str, message: str) -> None:
        super().__init__(f"{case}, {entrant}: {message}")
        self.case, self.entrant, self.message = case, entrant, message


class Journal(Protocol):
    """Told what is about to run and what failed, so that another process can go on."""

    def began(self, case: Case, entrant: str) -> None: ...

    def failures(self, case: Case) -> dict[str, str]: ...


class NoJournal:
    """Keeps nothing."""

    def began(self, case: Case, entrant: str) -> None:
        pass

    def failures(self, case: Case) -> dict[str, str]:
        return {}


@dataclass
class Setting:
    """How much is spent on a case.

    Attributes:
        full: max-autotune for what can be tuned.
        turns: of the race.
        seconds: an entrant in a turn.
        peers: False leaves the peers out.
        left_out: (case, peer's name, peer) → why it is not measured, or None.
    """

    full: bool = False
    turns: int = 2
    seconds: float = 0.05
    peers: bool = True
    left_out: Callable[[Case, str, Peer], str | None] = lambda case, name, peer: None


def _slow_on_a_cpu(case: Case, name: str, peer: Peer) -> str | None:
    """C++ compilation takes seconds a graph: ``compile`` is run once an op."""
    if peer.tuned and (name != "compile" or (case.direction, case.dtype) != (FORWARD, FP32)):
        return "on a CPU, where compiling takes long, --full measures it"
    return None


def quick(device: str) -> Setting:
    """For a first pass; on a CPU the least that runs everything."""
    if device == "cuda":
        return Setting()
    return Setting(turns=1, seconds=0.005, left_out=_slow_on_a_cpu)


def full() -> Setting:
    """For the record."""
    return Setting(full=True, turns=3, seconds=0.3)


def message(error: BaseException) -> str:
    """A failure as a record holds it."""
    text = " ".join(str(error).split()) or "no message"
    return f"error: {type(error).__name__}: {text}"[:300]


# -- calls ----------------------------------------------------------------------------------------


def calls_of(
    function: Callable[..., Any], sets: list[dict[str, Any]], bench: OpBench, direction: str
) -> list[timing.Call]:
    """One call an input set, of the direction that is measured."""
    return [_call(function, arguments, bench, direction) for arguments in sets]


def _call(
    function: Callable[..., Any], arguments: dict[str, Any], bench: OpBench, direction: str
) -> timing.Call:
    if direction == FORWARD:
        return lambda: function(**arguments)
    inputs = [arguments[name] for name in bench.gradients]

    def run() -> list[Tensor]:
        return differentiable(function(**arguments))

    outputs = run()
    # 1 is what a loss gets from .backward(); other outputs get something to multiply by.
    upstream = [torch.ones_like(o) if o.ndim == 0 else torch.randn_like(o) for o in outputs]
    if direction == BOTH:
        return lambda: torch.autograd.grad(run(), inputs, upstream, allow_unused=True)
    return lambda: torch.autograd.grad(
        outputs, inputs, upstream, retain_graph=True, allow_unused=True
    )


# -- a case ---------------------------------------------------------------------------------------


def backends_for(bench: OpBench, device: str, asked: str | None) -> list[str]:
    """The op's kernels that can run on a card; without any ``auto``, which is then the reference.

    On a CPU kernels run in an interpreter or an emulation, if at all, whose time says nothing.
    """
    if asked:
        return [asked]
    if device == "cpu":
        return ["auto"]
    found = [
        name
        for name, reason in ops.available(bench.op, device).items()
        if name != "reference" and reason is None
    ]
    return found or ["auto"]


def _build(peer: Peer, setting: Setting) -> Callable[..., Any]:
    return peer.build(setting.full) if peer.tuned else peer.build()


def measure(
    case: Case,
    bench: OpBench,
    backends: list[str],
    rates: Rates,
    setting: Setting,
    *,
    gates: dict[str, dict[str, Any]] | None = None,
    journal: Journal | None = None,
    clock: timing.Clock | None = None,
    origin: dict[str, Any] | None = None,
) -> tuple[list[records.Record], dict[str, str]]:
    """One record a backend; peers are measured once, beside all of them.

    Args:
        case: what is measured.
        bench: the op's.
        backends: of ours.
        rates: the card's, of this run.
        setting: how much is spent.
        gates: backend → outcome of the op's tests in this run; without it no speed-up is recorded.
        journal: what to tell another process.
        clock: times calls; None is the device's.
        origin: provenance; None is this process's.

    Returns:
        The records, and for each backend of ours that failed why.

    Raises:
        Lost: after an entrant whose failure leaves the card unusable.
    """
    device = provenance.device()
    clock = clock or timing.clock_for(device)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
    with clock.context():
        return _measure(
            case,
            bench,
            backends,
            rates,
            setting,
            gates=gates or {},
            journal=journal or NoJournal(),
            clock=clock,
            origin=origin or provenance.provenance(),
            device=device,
        )


def _measure(
    case: Case,
    bench: OpBench,
    backends: list[str],
    rates: Rates,
    setting: Setting,
    *,
    gates: dict[str, dict[str, Any]],
    journal: Journal,
    clock: timing.Clock,
    origin: dict[str, Any],
    device: str,
) -> tuple[list[records.Record], dict[str, str]]:
    cache = timing.l2_bytes(device)
    first = bench.arguments(case, device)
    one = total_bytes(first)
    count = timing.input_sets(one, cache, timing.free_bytes(device))
    sets = [first, *(bench.arguments(case, device, seed) for seed in range(1, count))]

    functions: dict[str, Callable[..., Any]] = {}
    peers: dict[str, Any] = {}
    ours = {f"ours:{name}": name for name in backends}

    def lose(entrant: str, error: BaseException) -> None:
        """Notes a failure; raises Lost if the card is gone with it."""
        text = message(error)
        functions.pop(entrant, None)
        peers[entrant] = text
        # Whatever the failed call holds through its traceback would count as memory in use.
        error.__traceback__ = None
        gc.collect()
        if device == "cuda":
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except Exception:
                raise Lost(case, entrant, text) from None

    for entrant, name in ours.items():
        functions[entrant] = lambda name=name, **kw: bench.call(**kw, backend=name)
    candidates = bench.peers(case.shape) if setting.peers else {}
    for name, peer in candidates.items():
        reason = setting.left_out(case, name, peer)
        if reason is not None:
            peers[name] = f"error: left out: {reason}"
    known = journal.failures(case)
    peers |= {name: text for name, text in known.items()}

    torch._dynamo.reset()
    small, exact_inputs = exact_arguments(case, bench, device)
    exact = exact_outcome(small, bench, exact_inputs)
    kernels: dict[str, list[str]] = {}
    walls: dict[str, float] = {}
    memory: dict[str, int] = {}
    errors: dict[str, float] = {}

    def inspect(entrant: str, rival: Peer | None) -> None:
        """What is found out of an entrant before the race; its memory is free afterwards."""
        if rival is not None:
            functions[entrant] = _build(rival, setting)
        function = functions[entrant]
        call = _call(function, first, bench, case.direction)
        call()
        names = kernel_names(call, device)
        if rival is not None:
            check_ran(rival, names, device)
        kernels[entrant] = [n[:120] for n in names if not n.startswith("Mem")][:KERNELS_KEPT]
        # What backward needs includes what forward keeps for it.
        whole = BOTH if case.direction == BACKWARD else case.direction
        memory[entrant] = timing.peak_bytes(_call(function, first, bench, whole), device)
        walls[entrant] = timing.wall_microseconds(call, clock, setting.seconds)
        if rival is None or (rival.checked and not rival.tuned):
            found = outcome(function, exact_inputs, bench, case.direction)
            errors[entrant] = relative_error(found, exact)
            if not errors[entrant] < WRONG:
                raise WrongResult(f"its result is off by {errors[entrant]:.3g} of the exact one")

    for entrant in [*ours, *candidates]:
        if entrant in peers:
            functions.pop(entrant, None)
            continue
        try:
            journal.began(case, entrant)
            inspect(entrant, candidates.get(entrant))
        except Exception as error:
            lose(entrant, error)

    def entrant_calls(name: str) -> Callable[[], list[timing.Call]]:
        return lambda: calls_of(functions[name], sets, bench, case.direction)

    results = timing.race(
        {name: entrant_calls(name) for name in functions},
        clock,
        turns=setting.turns,
        seconds=setting.seconds,
        failed=lose,
        began=lambda name: journal.began(case, name),
    )
    times = {name: timing.quantiles(samples) for name, (samples, _) in results.items()}
    timers = {name: timer for name, (_, timer) in results.items()}
    found_records = []
    for entrant, name in ours.items():
        if entrant not in times:
            continue
        others = {
            n: times[n]["p50"] if n in times else peers[n]
            for n in candidates
            if n in times or n in peers
        }
        ran = [n for n in others if n in times]
        found_records.append(
            _record(
                case,
                bench,
                name,
                us=times[entrant],
                wall=walls[entrant],
                timer=timers[entrant],
                sets=count,
                cold=timing.is_cold(count, one, cache),
                peak=memory[entrant],
                peers=others,
                peers_wall={n: walls[n] for n in ran},
                peers_peak={n: memory[n] for n in ran},
                peers_timer={n: timers[n] for n in ran},
                error=errors.get(entrant),
                peers_error={n: errors[n] for n in ran if n in errors},
                kernels={("ours" if n == entrant else n): kernels[n] for n in [entrant, *ran]},
                gate=gates.get(name, NOT_RUN),
                full=setting.full,
                rates=rates,
                origin=origin,
            )
        )
    return found_records, {name: peers[e] for e, name in ours.items() if e in peers}


def _record(
    case: Case,
    bench: OpBench,
    backend: str,
    *,
    us: dict[str, float],
    wall: float,
    timer: str,
    sets: int,
    cold: bool,
    peak: int,
    peers: dict[str, Any],
    peers_wall: dict[str, float],
    peers_peak: dict[str, int],
    peers_timer: dict[str, str],
    error: float | None,
    peers_error: dict[str, float],
    kernels: dict[str, list[str]],
    gate: dict[str, Any],
    full: bool,
    rates: Rates,
    origin: dict[str, Any],
) -> records.Record:
    moved = bench.bytes(case.shape, element_size(case.dtype), case.direction)
    products = bench.flops(case.shape, case.direction)
    floor = floor_seconds(moved, products, case.dtype, rates) * 1e6
    copied = moved / rates.copy_bytes_per_s * 1e6
    alike = {n: t for n, t in peers.items() if peers_timer.get(n) == timer}
    best = min(alike, key=alike.__getitem__, default=None)
    proven = gate["status"] == "passed" and origin["gpu"] is not None
    record = {
        "op": case.op,
        "direction": case.direction,
        "shape": dict(case.shape),
        "dtype": case.dtype,
        "backend": backend,
        "us": us,
        "wall_us": wall,
        "timer": timer,
        "input_sets": sets,
        "cold": cold,
        "peak_bytes": peak,
        "bytes": moved,
        "flops": products,
        "measured_bytes": None,
        "floor_us": round(floor, 4),
        "percent_of_floor": round(100 * floor / us["p50"], 2) or 0.01,
        "percent_of_copy": round(100 * copied / us["p50"], 2) or 0.01,
        "peers": peers,
        "peers_wall_us": peers_wall,
        "peers_peak_bytes": peers_peak,
        "peers_timer": peers_timer,
        "best_peer": best,
        "speedup_vs_best_peer": round(alike[best] / us["p50"], 4) if best and proven else None,
        "error_vs_fp64": error,
        "peers_error_vs_fp64": peers_error,
        "kernels": kernels,
        "gate": gate,
        "setting": "full" if full else "quick",
        "rates": rates.as_dict(),
        "note": None if origin["gpu"] else provenance.NOT_A_RESULT,
        "provenance": origin,
    }
    records.check_record(record)
    return record
