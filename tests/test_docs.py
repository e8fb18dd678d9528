"""What the documents say of the code is there."""

from __future__ import annotations

import ast
import re

import pytest

from cmpose import config
from cmpose.cli import build_parser
from tests.shared_data import PROJECT

ERROR_ROWS = [
    line
    for line in (PROJECT / "docs" / "errors.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith(("| what", "|---"))
]


def functions_in(path) -> set[str]:
    return {n.name for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.FunctionDef)}


def test_every_error_in_the_table_names_a_test_that_exists():
    assert len(ERROR_ROWS) > 80
    for row in ERROR_ROWS:
        references = re.findall(r"`?(tests/[\w/]+\.py)::(\w+)", row)
        assert references, f"no test named: {row}"
        for file, name in references:
            assert (PROJECT / file).is_file(), row
            assert name in functions_in(PROJECT / file), row


@pytest.mark.parametrize("path", sorted((PROJECT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_loads(path):
    recipe = config.load(path)
    assert config.from_dict(config.to_dict(recipe)) == recipe


def markdown_files():
    return [*PROJECT.glob("*.md"), *(PROJECT / "docs").glob("*.md")]


@pytest.mark.parametrize("path", markdown_files(), ids=lambda p: p.name)
def test_links_between_documents_lead_somewhere(path):
    prose = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", prose):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_commands_in_the_documents_exist():
    parser = build_parser("")
    commands = set(parser._subcommands_action.choices)  # type: ignore[union-attr]
    used = set()
    for path in markdown_files():
        used |= set(re.findall(r"^(?:\$ )?cmpose (\w+)", path.read_text(), re.MULTILINE))
    assert used <= commands, used - commands
    assert {"train", "evaluate", "predict", "score", "render", "frames", "convert"} <= used
