"""``cmpose doctor``: what is installed, which backend runs each op, and what to do next."""

from __future__ import annotations

import glob
import importlib.metadata
import os
import platform
import re
import shutil
import sysconfig
from typing import Any

import torch

from cmpose import __version__, native
from cmpose.ops import backends

PACKAGES = {"torch": "torch", "triton": "triton", "numpy": "numpy", "av": "av"}
PACKAGES |= {"opencv": "opencv-python-headless"}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def facts() -> dict[str, Any]:
    """What ``cmpose doctor`` knows of this machine, as plain data; ``--json`` prints it.

    Returns:
        ``cmpose``, ``python`` and ``platform``; ``packages``: name → version or None;
        ``torch_cuda``: the CUDA that torch was built for, or None; ``torch_asks_for_triton``: the
        version of triton that torch was made for, or None; ``driver``: the newest CUDA that
        NVIDIA's driver serves, or None; ``nvcc``: its file, or None; ``core``: what the CUDA C++
        core was built for, or why there is none; ``cards``: name and capability of each, and why
        the core does not serve it; ``ops``: op → what ``auto`` runs, and for each backend None or
        the reason why it does not run; ``variables`` that choose backends; ``known_bad``: what
        does not work together; ``next``: what to do, that included.
    """
    driver = native.driver()
    cards = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    machine: dict[str, Any] = {
        "cmpose": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(package) for name, package in PACKAGES.items()},
        "torch_cuda": torch.version.cuda,
        "torch_asks_for_triton": _torch_asks_for_triton(),
        "driver": driver and f"{driver[0]}.{driver[1]}",
        "nvcc": _nvcc(),
        "core": _core(),
        "cards": [
            {
                "name": card.name,
                "capability": f"{card.major}.{card.minor}",
                "memory_gb": round(card.total_memory / 1e9, 1),
                "core_unavailable": native.unavailable()
                or native.card_unavailable(card.major, card.minor, card.name),
            }
            for card in cards
        ],
        "ops": {
            op: {"auto": backends.preferred(op), "backends": backends.available(op)}
            for op in backends.OPS
        },
        "variables": {name: v for name, v in sorted(os.environ.items()) if _chooses(name)},
    }
    return machine | {"known_bad": known_bad(machine), "next": next_steps(machine)}


def _nvcc() -> str | None:
    """The nvcc that an installation would build the core with, as csrc/toolkit.py looks for it."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        return shutil.which("nvcc", path=os.path.join(home, "bin"))
    packages = os.path.join(sysconfig.get_paths()["purelib"], "nvidia")
    homes = [
        os.environ.get("CONDA_PREFIX", ""),
        *sorted(glob.glob(os.path.join(packages, "cu[0-9]*")), reverse=True),
        os.path.join(packages, "cuda_nvcc"),
        "/usr/local/cuda",
    ]
    path = os.pathsep.join(os.path.join(home, "bin") for home in homes if home)
    return shutil.which("nvcc") or shutil.which("nvcc", path=path)


def known_bad(machine: dict[str, Any]) -> list[str]:
    """What is known not to work together, from :func:`facts`; a sentence each."""
    pairs = []
    torch, triton, numpy = (
        machine["packages"][name] or "" for name in ("torch", "triton", "numpy")
    )
    if triton and native.version_of(triton) < (3, 7) and native.version_of(numpy) >= (2, 4):
        pairs.append(
            f"The interpreter of triton {triton} fails with numpy {numpy}, and so do tests of "
            "Triton kernels on a CPU: pip install 'triton>=3.7' or 'numpy<2.4'."
        )
    required = machine.get("torch_asks_for_triton")
    if triton and required and triton.partition("+")[0] != required:
        pairs.append(
            f"torch {torch} was made for triton {required}, and torch.compile may fail with the "
            f"{triton} that is installed: pip install triton=={required}."
        )
    pairs += [
        f"triton 3.6.0 computes wrong products on {card['name']} (compute capability "
        f"{card['capability']}, triton-lang/triton#9871): pip install 'triton>=3.7'."
        for card in machine["cards"]
        if triton.startswith("3.6.0") and card["capability"].split(".")[0] in ("10", "11")
    ]
    return list(dict.fromkeys(pairs))


def _torch_asks_for_triton() -> str | None:
    """The one version of triton that this torch asks for; a build for CPUs asks for none."""
    for requirement in importlib.metadata.requires("torch") or ():
        if match := re.match(r"triton *== *([\w.]+)", requirement):
            return match[1]
    return None


def next_steps(machine: dict[str, Any]) -> list[str]:
    """What would make more of this machine, from :func:`facts`; a sentence each."""
    steps = [_for_a_card(machine)] if not machine["cards"] else _for_kernels(machine)
    return steps + known_bad(machine)


def _for_a_card(machine: dict[str, Any]) -> str:
    """Why torch sees no card, and what to do about it."""
    driver, built = machine["driver"], machine["torch_cuda"]
    if driver is None:
        return "There is no NVIDIA driver, so that the ops run on the CPU. A card needs it first."
    remedy = f"install torch built for CUDA {driver} or older (https://pytorch.org/get-started)"
    if built is None:
        torch_version = machine["packages"]["torch"]
        return f"torch {torch_version} was built without CUDA, and there is a driver: {remedy}."
    if native.version_of(driver)[0] < native.version_of(built)[0]:
        return (
            f"NVIDIA's driver serves CUDA {driver}, torch was built for {built}: install a newer "
            f"driver, or {remedy}."
        )
    return (
        f"torch sees no card, though NVIDIA's driver is there (CUDA {driver}): see whether "
        "nvidia-smi lists one, and CUDA_VISIBLE_DEVICES."
    )


def _for_kernels(machine: dict[str, Any]) -> list[str]:
    """What keeps kernels from running on the cards that torch sees."""
    steps = []
    triton = machine["packages"]["triton"]
    if triton is None or native.version_of(triton) < (3, 5):
        steps.append(f"triton is {triton or 'not installed'}: pip install 'triton>=3.5'.")
    for reason in dict.fromkeys(card["core_unavailable"] for card in machine["cards"]):
        if reason is None:
            continue
        if machine["nvcc"] is None:
            reason += (
                f". There is no nvcc either: install NVIDIA's CUDA toolkit {machine['torch_cuda']}"
            )
        steps.append(f"Backend cuda does not run: {reason}.")
    return steps


def report(machine: dict[str, Any]) -> str:
    """What ``cmpose doctor`` prints of its :func:`facts`."""
    versions = {name: version or "not installed" for name, version in machine["packages"].items()}
    versions["torch"] += f" (CUDA {machine['torch_cuda'] or 'not built in'})"
    rows = [
        ("cmpose", machine["cmpose"]),
        ("python", f"{machine['python']} on {machine['platform']}"),
        *versions.items(),
        ("_C", machine["core"]),
        ("driver", f"serves CUDA {machine['driver']}" if machine["driver"] else "no NVIDIA driver"),
        ("nvcc", machine["nvcc"] or "not found"),
    ]
    for i, card in enumerate(machine["cards"]):
        capability = card["capability"].replace(".", "")
        rows.append((f"GPU {i}", f"{card['name']}, sm_{capability}, {card['memory_gb']} GB"))
    if not machine["cards"]:
        rows.append(("GPU", "none that torch sees; the ops run on the CPU"))
    lines = [f"{name:7} {value}" for name, value in rows]
    lines += ["", *_ops(machine["ops"])]
    lines += [f"{name}={value} is set" for name, value in machine["variables"].items()]
    steps = machine["next"] or ["Nothing: every backend that these cards can have is there."]
    return "\n".join([*lines, "", "What to do next:", *(f"- {step}" for step in steps)])


def _core() -> str:
    """What the CUDA C++ core was built for, or why it cannot be used."""
    reason = native.unavailable()
    if reason is not None:
        return reason
    built = native.info()
    if built["on_cpu"]:
        return f"compiled for the CPU, for tests ({native.ON_CPU})"
    ptx = f" + PTX {built['ptx']}" if built["ptx"] else ""
    return f"for {built['archs']}{ptx}, built with nvcc {built['nvcc']}"


def _ops(ops: dict[str, dict[str, Any]]) -> list[str]:
    """A table of which backends run each op on this machine, and below it why the others do not."""
    reasons: list[str] = []
    lines = [f"{'op':22} {'auto runs':11} {'cpu':8} {'triton':8} cuda"]
    for op, row in ops.items():
        cells = {}
        for name in ("cpu", "triton", "cuda"):
            reason = row["backends"][name]
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            cells[name] = "yes" if reason is None else f"no [{reasons.index(reason) + 1}]"
        lines.append(
            f"{op:22} {row['auto']:11} {cells['cpu']:8} {cells['triton']:8} {cells['cuda']}"
        )
    return lines + [f"[{i}] {reason}" for i, reason in enumerate(reasons, 1)]


def _chooses(variable: str) -> bool:
    """Whether an environment variable picks backends or how kernels run."""
    picks = variable.startswith("CMPOSE_") and variable.endswith("BACKEND")
    return picks or variable in ("CMPOSE_CONFIGS", native.ON_CPU, "TRITON_INTERPRET")
