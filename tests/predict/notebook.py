"""Runs a notebook from top to bottom, in one process and without Jupyter.

``python -m tests.predict.notebook FILE`` writes the outputs into the file.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

PARAMETERS = "parameters"
"""The tag of the cell whose values a caller may replace, as papermill has it."""


def cells(notebook: Path) -> list[dict[str, Any]]:
    """The code cells of a notebook, in order."""
    document = json.loads(notebook.read_text(encoding="utf-8"))
    return [cell for cell in document["cells"] if cell["cell_type"] == "code"]


def run(notebook: Path, **parameters: Any) -> list[list[dict[str, Any]]]:
    """Runs all code cells in the current folder.

    Args:
        notebook: the file.
        parameters: take the places of those names in the cell tagged ``parameters``.

    Returns:
        The outputs of each cell, as the notebook format has them.

    Raises:
        Whatever a cell raises.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    outputs = []
    for number, cell in enumerate(cells(notebook), start=1):
        source = "".join(cell["source"])
        outputs.append(_outputs(source, f"{notebook.name}, code cell {number}", names, number))
        if PARAMETERS in cell["metadata"].get("tags", ()):
            unknown = parameters.keys() - names.keys()
            assert not unknown, f"{notebook}: the parameters' cell has no {', '.join(unknown)}"
            names |= parameters
    return outputs


def _outputs(source: str, where: str, names: dict[str, Any], number: int) -> list[dict[str, Any]]:
    """Runs a cell; its last expression is shown."""
    tree = ast.parse(source, where)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    printed = io.StringIO()
    with redirect_stdout(printed):
        exec(compile(tree, where, "exec"), names)
        value = None
        if last is not None:
            assert isinstance(last, ast.Expr)
            value = eval(compile(ast.Expression(last.value), where, "eval"), names)
    outputs: list[dict[str, Any]] = []
    if text := printed.getvalue():
        lines = text.splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    if value is not None:
        data: dict[str, Any] = {"text/plain": repr(value).splitlines(keepends=True)}
        if hasattr(value, "_repr_jpeg_"):  # a picture of Pillow's
            data = {"image/jpeg": base64.b64encode(value._repr_jpeg_()).decode(), **data}
            data["text/plain"] = [f"<{type(value).__name__} {value.size[0]}×{value.size[1]}>"]
        shown = {"data": data, "execution_count": number, "metadata": {}}
        outputs.append(shown | {"output_type": "execute_result"})
    return outputs


def main(notebook: Path) -> None:
    """Runs a notebook and writes its outputs into it."""
    document = json.loads(notebook.read_text(encoding="utf-8"))
    code = [cell for cell in document["cells"] if cell["cell_type"] == "code"]
    for number, (cell, outputs) in enumerate(zip(code, run(notebook), strict=True), start=1):
        cell |= {"execution_count": number, "outputs": outputs}
    notebook.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
