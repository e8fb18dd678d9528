"""An op's stock choices, profiled as its own kernels are: bound and estimate, never measured.

What torch.compile writes for a peer of ``bench/OP.py`` is compiled for the card and counted
(:mod:`bench.profile.inductor`). A call of a library's kernel (a product of cuBLAS, a sort) can't be
counted: it stands at its bound, the time to read its inputs and write its results once, or to
multiply at the tensor cores' full rate. That favours the peer.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from bench.harness.records import Record
from bench.harness.targets import bench_of
from bench.harness.workload import Workload
from bench.profile.cards import Card
from cmpose import provenance
from tests.ptx_on_cpu.machine import built
from tests.shared_data import PROJECT

FOLDER = PROJECT / "build" / "profile"

LIBRARY = "error: its kernels are a library's, which torch for CPUs does not have"
"""Why the peers that torch does not compile have no figure."""

Answer: TypeAlias = tuple[Record | str, list[Tensor]]
"""A peer's record, or why there is none; its results, if they are small."""


def compiled(workload: Workload, names: Sequence[str], card: Card) -> list[Answer]:
    """What torch.compile makes of some peers for a card, each counted."""
    root, source = Path(torch.__file__).parent, Path(__file__).with_name("no_card.cpp")
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{root}/include", f"-L{root}/lib"]
    command = ["g++", *flags, f"-Wl,-rpath,{root}/lib", str(source), "-lc10", "-ltorch_cpu"]
    library = built(FOLDER / "no_card.so", command, [source], torch.__version__)
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "bench.profile.inductor"],
        input=pickle.dumps((workload, list(names), card)),
        stdout=subprocess.PIPE,
        cwd=PROJECT,
        env={**kept, "LD_PRELOAD": str(library)},
        check=True,
    )
    return pickle.loads(done.stdout)


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
