"""docs/ops.md: a section an op, the signatures as they are, and examples that run."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from cmpose import ops
from cmpose.ops.backends import OPS

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "ops.md").read_text(encoding="utf-8")
SECTIONS = {part.split("\n", 1)[0]: part for part in re.split(r"^## ", TEXT, flags=re.M)}


def test_a_section_an_op() -> None:
    assert tuple(SECTIONS)[1:] == (*OPS, "In a TimeSformer-style block")


@pytest.mark.parametrize("name", OPS[:6])
def test_limits_are_stated(name: str) -> None:
    assert "Limits of the kernel" in SECTIONS[name]


@pytest.mark.parametrize("title", SECTIONS)
def test_example(title: str) -> None:
    (example,) = re.findall(r"^```python\n(.*?)^```", SECTIONS[title], flags=re.M | re.S)
    exec(compile(example, f"docs/ops.md: {title}", "exec"), {})


@pytest.mark.parametrize("name", OPS)
def test_signature(name: str) -> None:
    documented = re.search(rf"`{name}\(([^)]*)\)`", SECTIONS[name])
    assert documented is not None
    found = [part.split("=") for part in re.split(r",\s+", documented[1])]
    parameters = inspect.signature(getattr(ops, name)).parameters.values()
    first_keyword = next(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    star = found.index(["*"])
    assert found[star + 1][0] == first_keyword
    del found[star]
    assert [part[0] for part in found] == [p.name for p in parameters]
    for part, parameter in zip(found, parameters, strict=True):
        default = part[1].replace("'", '"') if len(part) > 1 else None
        if default is None:
            assert parameter.default is parameter.empty
        elif default != "…":
            assert default == repr(parameter.default).replace("'", '"')
