"""``cmpose init``: a small commented recipe to begin with."""

from __future__ import annotations

import json
import os
import re
import shlex
from importlib.resources import files
from pathlib import Path

from cmpose import config
from cmpose.files import claim, write_text

RECIPE = "recipe.yaml"


def write_recipe(folder: str | Path, data: str | Path = "") -> Path:
    """Writes a recipe that ``cmpose train`` takes as it is.

    Args:
        folder: gets ``recipe.yaml``.
        data: the data set's folder, the recipe's ``data.root``; default ``data`` in ``folder``.

    Returns:
        The recipe's path.

    Raises:
        FileExistsError: there is such a file.
        InUse: another process writes it.
        OutputError: it cannot be written.
    """
    path = Path(folder) / RECIPE
    with claim(Path(folder), "init", "DIR"):
        if os.path.lexists(path):
            raise FileExistsError(f"{path}: is there already: move it, or give another folder")
        text = (files("cmpose.configs") / "start.yaml").read_text(encoding="utf-8")
        # JSON is YAML, whatever is in the path.
        root = json.dumps(str(data or Path(folder) / "data"), ensure_ascii=False)
        text = re.sub(r"^  root: .*$", lambda _: f"  root: {root}", text, flags=re.MULTILINE)
        write_text(path, text)
    config.load(path)
    return path


def next_steps(recipe: Path) -> str:
    """What to do with a recipe, as commands."""
    data = Path(config.load(recipe).data.root)
    root, file, run = (shlex.quote(str(path)) for path in (data, recipe, recipe.parent / "run"))
    lines = [f"{recipe}: a small recipe, with what its fields are for"]
    if not (data.expanduser() / "annotations").is_dir():
        lines += [
            f"no data in {data} yet: your own (docs/own_data.md), or rendered people:",
            f"  cmpose render {root} --videos 48 --frames 12 --split train",
            f"  cmpose render {root} --videos 12 --frames 12 --split val",
        ]
    lines += ["then:", f"  cmpose train --config {file} --output {run}", f"  cmpose report {run}"]
    return "\n".join(lines)
