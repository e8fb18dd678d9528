"""The house's measures: no drawer too full, no function too long, none with too many parameters."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator

from tests.shared_data import PROJECT, project_files

FILES, LINES, FUNCTION, PARAMETERS = 20, 900, 80, 8
"""At most: Python files in a folder, lines in a file, lines and parameters of a function."""


def _comments_above(lines: list[str], row: int) -> Iterator[str]:
    for line in reversed(lines[:row]):
        if not line.strip().startswith("#"):
            return
        yield line.strip()


def too_large(source: str) -> Iterator[str]:
    """Functions over the limits for which no comment right above them gives a reason."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef):
            continue
        # A reason stands right above the def or above its decorators.
        first = min([node.lineno, *(d.lineno for d in node.decorator_list)]) - 1
        reasons = [*_comments_above(lines, first), *_comments_above(lines, node.lineno - 1)]
        names = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        parameters = [name for name in names if name not in ("self", "cls")]
        kernel = any("jit" in ast.unparse(d) for d in node.decorator_list)  # it gets raw pointers
        length = (node.end_lineno or 0) - first
        if length > FUNCTION and not any(r.startswith("# Long:") for r in reasons):
            yield f"{node.name}: {length} lines"
        many = len(parameters) > PARAMETERS and not kernel
        if many and not any(r.startswith("# Many parameters:") for r in reasons):
            yield f"{node.name}: {len(parameters)} parameters"


def test_no_folder_is_a_flat_drawer():
    folders = Counter(path.parent for path in project_files("*.py") if path.name != "__init__.py")
    assert {str(f): n for f, n in folders.items() if n > FILES} == {}


def test_no_file_is_too_long():
    lengths = {path: len(path.read_text().splitlines()) for path in project_files("*.py")}
    assert {str(path): n for path, n in lengths.items() if n > LINES} == {}


def test_no_function_is_too_large_without_a_reason():
    problems = [
        f"{path.relative_to(PROJECT)}: {line}"
        for path in project_files("*.py")
        for line in too_large(path.read_text())
    ]
    assert problems == []


def test_planted_functions_are_caught():
    long = "def f():\n" + "    x = 1\n" * FUNCTION
    wide = f"def g(self, {', '.join(f'a{i}' for i in range(PARAMETERS + 1))}): ...\n"
    assert list(too_large(long)) == [f"f: {FUNCTION + 1} lines"]
    assert list(too_large(wide)) == [f"g: {PARAMETERS + 1} parameters"]
    assert list(too_large("# Long: a table.\n" + long)) == []
    assert list(too_large("# Many parameters: the paper's symbols.\n@cached\n" + wide)) == []
    assert list(too_large("@cached\n# Many parameters: the paper's symbols.\n" + wide)) == []
    assert list(too_large("@triton.jit\n" + wide)) == []
