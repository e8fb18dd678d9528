"""The table of versions (``python -m tools.versions``), and that what is declared was tried."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.shared_data import PROJECT, needs_git
from tools import versions
from tools.versions import BEGIN, END, HEADINGS, Environment, Wanted

PAGE = (PROJECT / "docs" / "versions.md").read_text()
HERE = "python{}.{}".format(*sys.version_info[:2])


def row(torch: str, python: str = "3.12.1", **cells: str) -> dict[str, str]:
    return dict.fromkeys(HEADINGS, "-") | {"torch": torch, "Python": python} | cells


def cells(page: str) -> list[dict[str, str]]:
    lines = page.split(BEGIN)[1].split(END)[0].splitlines()[2:]
    split = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(HEADINGS, line, strict=True)) for line in split]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("2.9.1", Wanted("2.9.1", HERE, ())),
        ("2.13.0+cpu@3.12", Wanted("2.13.0+cpu", "python3.12", ())),
        ("2.9.1@/opt/python", Wanted("2.9.1", "/opt/python", ())),
        ("2.9.1,numpy==2.4.6,triton<3.7", Wanted("2.9.1", HERE, ("numpy==2.4.6", "triton<3.7"))),
    ],
)
def test_a_line_is_asked_for(text: str, line: Wanted) -> None:
    assert versions.wanted(text) == line


def test_what_is_no_version_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("newest", "2.9.1,numpy", "2.9.1@", ""):
        with pytest.raises(ValueError, match=r"must be VERSION\[@PYTHON\]"):
            versions.wanted(text)
    with pytest.raises(SystemExit):
        versions.main(["newest"])
    assert "newest" in capsys.readouterr().err


def test_a_row_replaces_that_of_the_same_versions() -> None:
    page = f"before\n{BEGIN}{END}after\n"
    page = versions.merged(page, [row("2.13.0"), row("2.9.1", gate="a")])
    assert [c["torch"] for c in cells(page)] == ["2.9.1", "2.13.0"]
    page = versions.merged(page, [row("2.13.0", doctor="new"), row("2.13.0", "3.10.13")])
    rows = [(c["torch"], c["Python"], c["doctor"]) for c in cells(page)]
    assert rows == [
        ("2.9.1", "3.12.1", "-"),
        ("2.13.0", "3.10.13", "-"),
        ("2.13.0", "3.12.1", "new"),
    ]
    assert page.startswith("before\n")
    assert page.endswith("after\n")
    with pytest.raises(ValueError, match="the page must have"):
        versions.merged("no markers", [row("2.9.1")])


def test_what_cannot_be_installed_is_a_row_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_git()
    page = tmp_path / "page.md"
    page.write_text(BEGIN + END)
    monkeypatch.setattr(versions.tempfile, "mkdtemp", lambda **_: str(folder))
    (folder := tmp_path / "environment").mkdir()
    assert versions.main(["2.9.1@/nowhere/python", "--output", str(page)]) == 1
    [row] = cells(page.read_text())
    assert row["import"] == "not installed: /nowhere/python: No such file or directory"
    assert not folder.exists()


def test_a_check_that_fails_says_why_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stand(Environment):
        def install(self, line: Wanted) -> None:
            pass

        def run(self, *words: Any, **_: Any) -> str:
            if "doctor" in words:
                return '{"known_bad": ["a with b."]}'
            if "pytest" in words:
                raise RuntimeError("E  wrong | here\n=== 2 failed, 3 passed in 1.0s ===\n")
            if "render" in words or "train" in words:
                raise RuntimeError("Traceback\nValueError: x")
            return '{"triton": "3.5.1"}' if "json" in str(words) else ""

    monkeypatch.setattr(versions, "Environment", Stand)
    row = versions.tried(Wanted("2.9.1", "python", ()), tmp_path)
    assert row["triton"] == "3.5.1"
    assert (row["import"], row["doctor"]) == ("yes", "a with b.")
    assert row["op contract"] == "**fails**: 2 failed, 3 passed in 1.0s"
    assert row["ten steps"] == "**fails**: ValueError: x"
    assert set(row) == set(HEADINGS)


def test_the_requirements_are_those_of_the_package(tmp_path: Path) -> None:
    at = Environment(tmp_path)
    at.source.mkdir()
    (at.source / "pyproject.toml").write_text((PROJECT / "pyproject.toml").read_text())
    requirements = at.requirements()
    assert {"numpy", "av>=15", "opencv-python-headless>=4.8,<5"} <= set(requirements)
    assert not any(name.startswith("torch") for name in requirements)


# -- the page -------------------------------------------------------------------------------------


def least(package: str) -> tuple[int, ...]:
    """The least version that pyproject.toml declares."""
    text = (PROJECT / "pyproject.toml").read_text()
    match = re.search(rf'{package}"?(?: = ")?>=([\d.]+)', text)
    assert match is not None
    return tuple(map(int, match[1].split(".")))


def test_the_least_versions_that_are_declared_were_tried() -> None:
    rows = cells(PAGE)
    for heading, package in (
        ("torch", "torch"),
        ("triton", "triton"),
        ("Python", "requires-python"),
    ):
        tried = [tuple(map(int, re.findall(r"\d+", r[heading])[:2])) for r in rows]
        assert min(tried) == least(package), heading
    assert {".".join(r["torch"].split(".")[:2]) for r in rows} >= {"2.9", "2.13", "2.15"}
    assert all(r["import"] == "yes" for r in rows)
