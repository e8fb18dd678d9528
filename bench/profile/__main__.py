"""Bounds and estimates of an op's compiled kernels, without a card; see docs/profile.md.

    python -m bench.profile OP [--arch 89 ...] [--direction D] [--shape NAME=SIZE ...]
        [--dtype float32] [--backend triton] [--json FILE]
    python -m bench.profile OP --options NAME[+NAME ...] ... [...]    # what its options add
    python -m bench.profile OP --peers [...]    # its stock choices beside it
    python -m bench.profile --validate    # the model beside published times
    python -m bench.profile [OP] --targets [--arch ...] [--backend B]
        # hot spots of docs/performance.md: all, or an op's, or those that backend B has

Nothing here is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from bench.harness.records import Record
from bench.harness.shapes import BF16, FP32
from bench.harness.targets import TARGETS, bench_of
from bench.harness.workload import OpBench, Workload
from bench.profile import model, peers, results, tables
from bench.profile.cards import BY_ARCH, FP16, H200, RTX_4090, Card
from bench.profile.counts import backends_of, counts_of_call, counts_of_op, is_cuda
from bench.profile.published import ROWS
from bench.report.tables import table
from cmpose.ops.backends import OPS
from csrc.build import BuildError


class Uncountable(RuntimeError):
    """A workload cannot be counted here; the message names it and says why."""


def profiled(
    workload: Workload, card: Card, backend: str | None = None, options: Sequence[str] = ()
) -> model.Profile:
    """Counts a workload for a card.

    Args:
        backend: ``triton`` or ``cuda``; None: ``cuda`` if there is ``csrc/OP.cu``.
        options: in use, of the op's benchmark.

    Raises:
        ValueError: the op refuses the shape.
        Uncountable: a program is missing, the compiled code has something unknown, or the clip is
            too large to run.
    """
    direction, dtype = workload.direction, workload.dtype
    try:
        counts = counts_of_op(
            workload.op, card.arch, workload.shape, direction, False, backend, dtype, options
        )
    except (RuntimeError, ArithmeticError, BuildError) as error:
        raise Uncountable(f"{workload} for sm_{card.arch}: {error}") from error
    return model.profile(counts, card, workload.dtype, bench_of(workload.op).bytes_of(workload))


def _profile(backend: str | None, workload: Workload, card: Card) -> Record:
    profile = profiled(workload, card, backend)
    us = [(one.h200_us, one.rtx_4090_us) for one in TARGETS if one.workload == workload]
    target = dict(zip((H200.name, RTX_4090.name), us[0] if us else (), strict=False)).get(card.name)
    of = {"arch": card.arch, "floor_us": profile.floor_us, "target_us": target}
    ran = "cuda" if is_cuda(workload.op, backend) else "triton"
    return results.record(profile, **asdict(workload), **of, backend=ran)


def _peers(backend: str | None, workload: Workload, card: Card) -> Record:
    return peers.record(workload, card, profiled(workload, card, backend).estimate_us)


def _each(
    kind: str,
    record_of: Callable[[Workload, Card], Record],
    workloads: Sequence[Workload],
    cards: Sequence[Card],
    path: Path | None,
) -> None:
    """Prints, and writes into ``path``, what can be counted; then raises what could not be."""
    shown = {"profiles": tables.profile, "peers": tables.peer}[kind]
    refused: list[Uncountable] = []
    for workload, card in [(workload, card) for workload in workloads for card in cards]:
        record = None
        try:
            record = record_of(workload, card)
            print(shown(record), flush=True)
        except Uncountable as error:
            refused.append(error)
        if path:
            results.put(path, kind, workload, card.name, record)
    if refused:
        raise Uncountable("; ".join(map(str, refused)))


def _validate(path: Path) -> None:
    profiles: list[Record] = []
    for row in ROWS:
        profile = model.profile(counts_of_call(row.call, row.card.arch), row.card, FP16, 0)
        of = {"kernel": row.kernel, "figure": float(row.figure), "unit": row.unit}
        of |= {"source": row.source, "published_us": row.us}
        profiles.append(results.record(profile, **of, error=profile.estimate_us / row.us - 1))
        print(tables.published(profiles[-1:]), flush=True)
    results.save(path, "published", profiles)


def _options(
    workload: Workload, cards: Sequence[Card], backend: str | None, asked: Sequence[str]
) -> None:
    """Prints what options add, used one at a time or several together, over none of them."""
    known = bench_of(workload.op).options
    for name in "+".join(asked).split("+"):
        if name not in known:
            raise ValueError(
                f"--options {name}: {workload.op} has {', '.join(known) or 'no options'}"
            )
    for card in cards:
        rows = []
        plain: dict[str, float] = {}
        for names in ("none", *asked):
            used = () if names == "none" else names.split("+")
            profile = profiled(workload, card, backend, used)
            counts = [launch.counts for launch in profile.launches]
            now: dict[str, float] = {
                "instructions": sum(sum(one.instructions.values()) for one in counts),
                "sectors": sum(one.sectors_read + one.sectors_written for one in counts),
                "estimate": profile.estimate_us,
            }
            plain = plain or now
            over = [f"{100 * (value / plain[what] - 1):+.2f} %" for what, value in now.items()]
            rows.append([names, *over, ", ".join(f"{one.registers}" for one in counts)])
        head = ["options", "instructions", "sectors asked for", "estimate", "registers"]
        print(f"{workload} on {card.name}, over no options\n\n{table(head, rows)}\n", flush=True)


def _sizes(given: Sequence[str], bench: OpBench) -> dict[str, int]:
    """``M=1024`` … in place of the reference shape's.

    Raises:
        ValueError: not of that form, or a size that the op does not have.
    """
    shape = dict(bench.shapes[0])
    for text in given:
        name, _, size = text.partition("=")
        if name not in shape:
            raise ValueError(f"--shape {text}: {bench.op} has the sizes {', '.join(shape)}")
        if not size.isdecimal():
            raise ValueError(f"--shape {text}: expected {name}=SIZE with a whole number")
        shape[name] = int(size)
    return shape


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("op", nargs="?", help=f"of {', '.join(OPS)}")
    parser.add_argument("--arch", type=int, nargs="+", default=[89, 90], choices=BY_ARCH)
    parser.add_argument("--direction", help="default: the op's first")
    parser.add_argument("--shape", nargs="+", default=[], metavar="NAME=SIZE")
    parser.add_argument("--dtype", default=BF16, choices=(BF16, FP16, FP32))
    parser.add_argument(
        "--backend", choices=("triton", "cuda"), help="default: cuda, for an op that has it"
    )
    parser.add_argument("--json", type=Path, help="write the profiles as records")
    parser.add_argument(
        "--options", nargs="+", metavar="NAME[+NAME ...]", help="what these options of the op add"
    )
    parser.add_argument("--peers", action="store_true", help="the op's stock choices beside it")
    parser.add_argument("--validate", action="store_true", help="the model beside published times")
    parser.add_argument("--targets", action="store_true", help="every hot spot")
    options = parser.parse_args(arguments)
    asked = options.op is not None or options.targets
    if asked == options.validate:
        parser.error("give an op, --targets or --validate")
    if options.peers and (options.op is None or options.targets):
        parser.error("--peers: give an op, without --targets")
    if options.options and (options.op is None or options.targets or options.peers or options.json):
        parser.error("--options: give an op, without --targets, --peers and --json")
    if options.backend and options.validate:
        parser.error(f"--backend {options.backend}: give an op or --targets")
    cards = [BY_ARCH[arch] for arch in options.arch]
    try:
        if options.validate:
            _validate(options.json or results.PUBLISHED)
        elif options.targets:
            path = options.json or results.TARGETS
            ops = [bench_of(options.op).op] if options.op else OPS
            spots = [
                target.workload
                for target in TARGETS
                if target.op in ops and options.backend in (None, *backends_of(target.op))
            ]
            _each("profiles", partial(_profile, options.backend), spots, cards, path)
        else:
            bench = bench_of(options.op)
            direction = options.direction or bench.directions[0]
            if direction not in bench.directions:
                raise ValueError(
                    f"--direction {direction}: {bench.op} has {', '.join(bench.directions)}"
                )
            shape = _sizes(options.shape, bench)
            workload = Workload(bench.op, direction, shape, options.dtype)
            if options.options:
                _options(workload, cards, options.backend, options.options)
            else:
                kind, of = ("peers", _peers) if options.peers else ("profiles", _profile)
                _each(kind, partial(of, options.backend), [workload], cards, options.json)
    except (ValueError, Uncountable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
