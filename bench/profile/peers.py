"""An op's stock choices, profiled as its own kernels are: bound and estimate, never measured.

What torch.compile writes for a peer of ``bench/OP.py`` is compiled for the card and counted
(:mod:`bench.profile.inductor`). A call of a library's kernel (a product of cuBLAS, a sort) can't be
counted: it stands at its bound, the time to read its inputs and write its results once, or to
multiply at the tensor cores' full rate. That favours the peer.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch

from bench.harness.records import Record
from bench.harness.targets import bench_of
from bench.harness.workload import Workload
from bench.profile import inductor
from bench.profile.cards import Card
from cmpose import provenance
from tests.ptx_on_cpu.machine import built

LIBRARY = "error: its kernels are a library's, which torch for CPUs does not have"
"""Why the peers that torch does not compile have no figure."""


def compiled(workload: Workload, names: Sequence[str], card: Card) -> list[inductor.Answer]:
    """What torch.compile makes of some peers for a card, each counted."""
    root, source = Path(torch.__file__).parent, Path(__file__).with_name("no_card.cpp")
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{root}/include", f"-L{root}/lib"]
    command = ["g++", *flags, f"-Wl,-rpath,{root}/lib", str(source), "-lc10", "-ltorch_cpu"]
    library = built(inductor.FOLDER / "no_card.so", command, [source], torch.__version__)
    spawn = multiprocessing.get_context("spawn")
    with patch.dict(os.environ, LD_PRELOAD=str(library)):
        os.environ.pop("TRITON_INTERPRET", None)
        with ProcessPoolExecutor(1, spawn, inductor.pretend, (card,)) as process:
            return list(process.map(partial(inductor.answer, workload, card), names))


def record(workload: Workload, card: Card, ours_us: float) -> Record:
    """Every peer of a workload on a card beside our estimate, as a record holds it."""
    peers = bench_of(workload.op).peers
    names = [name for name, peer in peers.items() if peer.compiled]
    answers = compiled(workload, names, card)
    known = {name: answer for name, (answer, _) in zip(names, answers, strict=True)}
    return {
        **asdict(workload),
        "card": card.name,
        "estimate_us": ours_us,
        "peers": known | {name: LIBRARY for name in peers if name not in known},
        "provenance": provenance.provenance(),
    }
