"""Bounds and estimates of an op's compiled kernels, without a card; see docs/profile.md.

    python -m bench.profile OP [--arch 89 ...] [--direction D] [--shape NAME=SIZE ...]
        [--dtype float32] [--backend triton] [--options NAME ...] [--peers] [--json FILE]
    python -m bench.profile [OP] --targets [--arch ...] [--backend B] [--peers]
        # hot spots of docs/performance.md: all, or an op's, or those that backend B has
    python -m bench.profile --validate    # the model beside published times

Nothing here is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.harness.records import Record
from bench.harness.shapes import BF16, FP32
from bench.harness.targets import TARGETS, bench_of
from bench.harness.workload import OpBench, Workload
from bench.profile import model, peers, results, tables
from bench.profile.cards import BY_ARCH, FP16, H200, RTX_4090, Card
from bench.profile.counts import backend_of, backends_of, counts_of_call, counts_of_op
from bench.profile.published import ROWS
from cmpose.ops.backends import OPS
from csrc.build import BuildError


class Uncountable(RuntimeError):
    """A workload cannot be counted here; the message names it and says why."""


def profiled(workload: Workload, card: Card, options: argparse.Namespace) -> Record:
    """Counts a workload for a card: its record, or its peers' with ``--peers``.

    Raises:
        ValueError: the op refuses the shape.
        Uncountable: a program is missing, the compiled code has something unknown, or the clip is
            too large to run.
    """
    op, backend, dtype = workload.op, options.backend, workload.dtype
    of = workload.shape, workload.direction, False, backend, dtype, options.options
    try:
        counts = counts_of_op(op, card.arch, *of)
    except (RuntimeError, ArithmeticError, BuildError) as error:
        raise Uncountable(f"{workload} for sm_{card.arch}: {error}") from error
    profile = model.profile(counts, card, dtype, bench_of(op).bytes_of(workload))
    if options.peers:
        return peers.record(workload, card, profile.estimate_us)
    targets = [one for one in TARGETS if one.workload == workload]
    us = [{H200.name: one.h200_us, RTX_4090.name: one.rtx_4090_us} for one in targets]
    target = us[0].get(card.name) if us else None
    more = {"target_us": target, "backend": backend_of(op, backend)}
    return results.record(profile, **asdict(workload), **more)


def _each(workloads: Sequence[Workload], options: argparse.Namespace) -> None:
    """Prints, and writes into a file, what can be counted; then raises what could not be."""
    kind = "peers" if options.peers else "profiles"
    path = options.json
    if options.targets and path is None:
        path = results.PEERS if options.peers else results.TARGETS
    if options.options:
        print(f"With {', '.join(options.options)}:")
    refused: list[Uncountable] = []
    for workload, arch in [(workload, arch) for workload in workloads for arch in options.arch]:
        record = None
        try:
            record = profiled(workload, BY_ARCH[arch], options)
            print(tables.peers([record]) if options.peers else tables.profile(record), flush=True)
        except Uncountable as error:
            refused.append(error)
        if path:
            names = asdict(workload) | {"card": BY_ARCH[arch].name}
            if not options.peers:
                names["backend"] = backend_of(workload.op, options.backend)
            results.put(path, kind, names, record)
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


def _workload(bench: OpBench, options: argparse.Namespace) -> Workload:
    """What is asked for; sizes ``M=1024`` … stand in place of the reference shape's.

    Raises:
        ValueError: a size not of that form, or a size, a direction or an option that the op does
            not have.
    """
    direction, shape = options.direction or bench.directions[0], dict(bench.shapes[0])
    if direction not in bench.directions:
        raise ValueError(f"--direction {direction}: {bench.op} has {', '.join(bench.directions)}")
    for name in options.options:
        if name not in bench.options:
            known = ", ".join(bench.options) or "no options"
            raise ValueError(f"--options {name}: {bench.op} has {known}")
    for text in options.shape:
        name, _, size = text.partition("=")
        if name not in shape:
            raise ValueError(f"--shape {text}: {bench.op} has the sizes {', '.join(shape)}")
        if not size.isdecimal():
            raise ValueError(f"--shape {text}: expected {name}=SIZE with a whole number")
        shape[name] = int(size)
    return Workload(bench.op, direction, shape, options.dtype)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.profile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("op", nargs="?", help=f"of {', '.join(OPS)}")
    add("--arch", type=int, nargs="+", default=[89, 90], choices=BY_ARCH)
    add("--direction", help="default: the op's first")
    add("--shape", nargs="+", default=[], metavar="NAME=SIZE")
    add("--dtype", default=BF16, choices=(BF16, FP16, FP32))
    add("--backend", choices=("triton", "cuda"), help="default: cuda, for an op that has it")
    add("--options", nargs="+", default=[], metavar="NAME", help="of the op, in use together")
    add("--json", type=Path, help="write the profiles as records")
    add("--peers", action="store_true", help="the op's stock choices beside it")
    add("--validate", action="store_true", help="the model beside published times")
    add("--targets", action="store_true", help="every hot spot")
    options = parser.parse_args(arguments)
    asked = options.op is not None or options.targets
    if asked == options.validate:
        parser.error("give an op, --targets or --validate")
    if options.validate and (options.backend or options.peers or options.options):
        parser.error("--backend, --peers, --options: give an op or --targets")
    if options.options and (options.targets or options.peers or options.json):
        parser.error("--options: give an op, without --targets, --peers and --json")
    try:
        if options.validate:
            _validate(options.json or results.PUBLISHED)
        elif options.targets:
            ops = [bench_of(options.op).op] if options.op else OPS
            spots = [
                target.workload
                for target in TARGETS
                if target.op in ops and options.backend in (None, *backends_of(target.op))
            ]
            _each(spots, options)
        else:
            _each([_workload(bench_of(options.op), options)], options)
    except (ValueError, Uncountable) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
