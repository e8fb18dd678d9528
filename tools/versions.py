"""Tries cmpose with other versions of torch, each in a fresh environment, and tables what it found.

    python -m tools.versions 2.9.1 2.11.0@3.12 2.13.0+cpu [--output docs/versions.md]

``VERSION@PYTHON`` is a torch and the Python to take (``python3.12`` on ``PATH``, or a path). A
pinned triton or numpy follows with commas: ``2.11.0@3.12,numpy==2.4.6``. What is tried is the
commit that is checked out, installed as a user would: a wheel without the CUDA core, and what pip
finds for it. An environment of a torch for CUDA takes 7 GB while it is tried, then it is deleted.
pip's own variables (``PIP_INDEX_URL``, ``PIP_CONSTRAINT``) hold.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from cmpose import files, provenance
from cmpose.provenance import PROJECT

TOOLS = ("pytest>=8", "pytest-timeout", "expecttest", "hypothesis>=6.150", "pybind11>=2.13")
"""What the tests need beside cmpose."""

CONTRACT = "temporal_attention or heatmap_loss or merge_clusters"
PARTS = "test_value or (test_opcheck and compact) or test_bitwise"
GATE = "heatmap_loss"
STEPS = 10

RECIPE = """\
model: {backbone: tiny, depth: 1, image_size: [128, 96], mlp_ratio: 1.25, head_channels: 8,
        tokens_per_keypoint: 1, num_clusters: 12}
data: {root: data, num_workers: 2}
train: {epochs: 2, batch_size: 4, lr: 1.0e-3, schedule: steps, warmup_steps: 0, precision: fp32,
        device: cpu, log_every: 1, pictures_every: 0, evaluate_every: 0}
"""

HEADINGS = ("torch", "CUDA", "triton", "numpy", "Python", "import", "doctor", "op contract",
            "compile gate", "ten steps", "commit", "date")  # fmt: skip


class Wanted(NamedTuple):
    """One line of the table."""

    torch: str
    python: str
    pins: tuple[str, ...]


def wanted(text: str) -> Wanted:
    """``2.11.0@3.12,numpy==2.4.6`` → a :class:`Wanted`.

    Raises:
        ValueError: it is not of that form.
    """
    match = re.fullmatch(
        r"(\d+\.\d+[\w.+]*)(?:@([^,]+))?((?:,[A-Za-z][\w-]*[=<>!~]=?[\w.*+]+)*)", text
    )
    if match is None:
        raise ValueError(f"{text}: must be VERSION[@PYTHON][,PACKAGE==VERSION], as 2.11.0@3.12")
    python = match[2] or "{}.{}".format(*sys.version_info[:2])
    if re.fullmatch(r"\d+\.\d+", python):
        python = f"python{python}"
    return Wanted(match[1], python, tuple(filter(None, match[3].split(","))))


class Environment:
    """A fresh environment, and the commit's sources beside it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = folder / "cmpose"
        self.python = folder / "venv" / "bin" / "python"

    def run(self, *words: str | Path, where: Path | None = None, limit: float = 1800) -> str:
        """What a command prints.

        Raises:
            RuntimeError: it fails or takes longer than ``limit`` seconds; the end of its output.
        """
        variables = {n: v for n, v in os.environ.items() if not n.startswith(("CMPOSE_", "PYTHON"))}
        # Nor are the CUDA sources compiled for the CPU, which takes minutes.
        variables |= {"CMPOSE_BUILD_CUDA": "0", "CMPOSE_CUDA_ON_CPU": ""}
        try:
            done = subprocess.run(
                [str(word) for word in words],
                cwd=where or self.folder,
                env=variables,
                capture_output=True,
                text=True,
                timeout=limit,
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"not done after {limit:.0f} s") from None
        except OSError as error:
            raise RuntimeError(f"{words[0]}: {error.strerror}") from None
        if done.returncode:
            raise RuntimeError((done.stdout + done.stderr)[-6000:])
        return done.stdout

    def install(self, line: Wanted) -> None:
        archive = self.folder / "cmpose.tar"
        self.run("git", "archive", "-o", archive, "HEAD", where=PROJECT)
        self.source.mkdir()
        self.run("tar", "-xf", archive, "-C", self.source)
        self.run(line.python, "-m", "venv", self.folder / "venv")
        pip: list[str | Path] = [
            self.python,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-cache-dir",
            "--prefer-binary",
        ]
        self.run(*pip, "--upgrade", "pip")
        triton = [] if any(p.startswith("triton") for p in line.pins) else ["triton"]
        self.run(
            *pip, "--no-compile", f"torch=={line.torch}", *triton, *line.pins, *TOOLS,
            *self.requirements(), limit=3600,
        )  # fmt: skip
        self.run(*pip, "--no-deps", self.source)

    def requirements(self) -> list[str]:
        """cmpose's own, as its wheel will name them, but for torch."""
        text = (self.source / "pyproject.toml").read_text()
        block = re.search(r"^dependencies = \[\n(.*?)^\]", text, flags=re.MULTILINE | re.DOTALL)
        assert block is not None
        return [r for r in re.findall(r'^ +"(.+?)",', block[1], re.MULTILINE) if "torch" not in r]


# -- what is tried --------------------------------------------------------------------------------


IMPORTS = """
import triton
from pathlib import Path
import numpy as np
from cmpose import ops
from cmpose.data.video import open_video
from cmpose.data.video_writer import video_writer

path = Path("video.mp4")
with video_writer(path, (64, 48), 25) as writer:
    for shade in (0, 100, 200):
        writer.write(np.full((48, 64, 3), shade, np.uint8))
with open_video(path) as video:
    assert len(list(video.frames())) == 3
"""


def imports(at: Environment) -> str:
    """A video is written and read too: PyAV has no upper bound, and its interface changes."""
    at.run(at.python, "-c", IMPORTS)
    return "yes"


def doctor(at: Environment) -> str:
    """The known-bad pairs that doctor names."""
    facts = json.loads(at.run(at.python, "-m", "cmpose", "doctor", "--json"))
    return "; ".join(facts["known_bad"]) or "nothing amiss"


def _tested(printed: str) -> str:
    counts = re.findall(r"(\d+) (passed|failed|error)", printed.strip().splitlines()[-1])
    return ", ".join(f"{number} {outcome}" for number, outcome in counts)


def contract(at: Environment) -> str:
    words = ("-m", "pytest", "-q", "-p", "no:benchmark", "tests/ops/test_contract.py")
    chosen = f"({CONTRACT}) and ({PARTS})"
    return _tested(at.run(at.python, *words, "-k", chosen, where=at.source))


def gate(at: Environment) -> str:
    """For sm_80, 89, 90 and 120: it compiles, fits the card, and spills nothing."""
    test = "tests/kernels/test_compile_check.py::test_compiles_and_fits"
    words = ("-m", "pytest", "-q", "-p", "no:benchmark", test, "-k", GATE)
    return _tested(at.run(at.python, *words, where=at.source))


def train(at: Environment) -> str:
    """The first and the tenth step's loss."""
    cmpose: list[str | Path] = [at.python, "-m", "cmpose"]
    for split, videos in (("train", "2"), ("val", "1")):
        at.run(*cmpose, "render", "data", "--split", split, "--videos", videos, "--frames", "6")
    (at.folder / "recipe.yaml").write_text(RECIPE)
    at.run(*cmpose, "train", "--config", "recipe.yaml", "--output", "run")
    lines = [
        json.loads(line) for line in (at.folder / "run" / "log.jsonl").read_text().splitlines()
    ]
    losses = [line["loss"] for line in lines if "loss" in line][:STEPS]
    if len(losses) < STEPS or not all(math.isfinite(loss) for loss in losses):
        raise RuntimeError(f"losses of the first steps: {losses}")
    return f"{losses[0]:.3g} → {losses[-1]:.3g}"


CHECKS: tuple[Callable[[Environment], str], ...] = (imports, doctor, contract, gate, train)


def tried(line: Wanted, folder: Path) -> dict[str, str]:
    """A line of the table: heading → cell."""
    at = Environment(folder)
    row = dict.fromkeys(HEADINGS, "") | {"torch": line.torch}
    row |= {"commit": provenance.commit()[0][:9], "date": f"{datetime.date.today()}"}
    start = time.monotonic()
    try:
        at.install(line)
    except RuntimeError as error:
        print(f"{line.torch}: not installed\n{error}", file=sys.stderr)
        return row | {"import": f"not installed: {reason(error)}"}
    print(f"{line.torch}: installed in {time.monotonic() - start:.0f} s", flush=True)
    row |= versions(at)
    for heading, check in zip(HEADINGS[5:10], CHECKS, strict=True):
        start = time.monotonic()
        try:
            row[heading] = check(at)
        except RuntimeError as error:
            print(f"{line.torch}, {heading}:\n{error}", file=sys.stderr)
            row[heading] = f"**fails**: {reason(error)}"
        print(
            f"{line.torch}, {heading}: {row[heading]} ({time.monotonic() - start:.0f} s)",
            flush=True,
        )
    return row


def reason(error: Exception) -> str:
    """The last line that says something, short enough for a cell."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    counts = [line for line in lines if re.search(r"\d+ failed", line)]
    return (counts or lines or ["no output"])[-1].replace("|", "\\|").strip("= ")[:150]


def versions(at: Environment) -> dict[str, str]:
    code = (
        "import json, platform, torch; from importlib.metadata import version as v;"
        "print(json.dumps({'torch': torch.__version__, 'CUDA': torch.version.cuda or 'none',"
        "'triton': v('triton'), 'numpy': v('numpy'), 'Python': platform.python_version()}))"
    )
    try:
        installed: dict[str, str] = json.loads(at.run(at.python, "-c", code))
    except RuntimeError:
        return {}
    return installed


# -- the table ------------------------------------------------------------------------------------

BEGIN, END = "<!-- generated: versions -->\n", "<!-- end: versions -->\n"


def merged(page: str, rows: list[dict[str, str]]) -> str:
    """The page with its table renewed: a row replaces one of the same four versions.

    Raises:
        ValueError: the page has no place for a table.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1:
        raise ValueError(f"the page must have {BEGIN.strip()!r} and {END.strip()!r} once each")
    before, rest = page.split(BEGIN)
    table, after = rest.split(END)
    cells = [[c.strip() for c in re.split(r"(?<!\\)\|", t)[1:-1]] for t in table.splitlines()]
    old = [
        c for c in cells if len(c) == len(HEADINGS) and c[0] not in ("torch", "") and c[0][0] != "-"
    ]
    new = [[row[heading] for heading in HEADINGS] for row in rows]
    others = [c for c in old if c[:5] not in [n[:5] for n in new]]
    lines = [[*HEADINGS], ["---"] * len(HEADINGS), *sorted(others + new, key=_order)]
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return before + BEGIN + text + END + after


def _order(cells: list[str]) -> tuple[Any, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", cells[0])[:3]), cells[4], cells[3]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.versions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("versions", nargs="+", type=wanted, metavar="VERSION[@PYTHON][,PIN]")
    parser.add_argument("--output", type=Path, default=PROJECT / "docs" / "versions.md")
    parser.add_argument("--folder", type=Path, help="of the environments; else the system's")
    options = parser.parse_args(arguments)
    failed = False
    for line in options.versions:
        folder = Path(tempfile.mkdtemp(prefix="versions-", dir=options.folder))
        try:
            row = tried(line, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        failed |= any("fails" in cell or "not installed" in cell for cell in row.values())
        files.write_text(options.output, merged(options.output.read_text(), [row]))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
