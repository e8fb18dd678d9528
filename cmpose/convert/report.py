"""The report of a conversion: errors stop it, warnings and omissions are counted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cmpose.data.sequence import AnnotationError

EXAMPLES = 5
"""How many examples of each kind are named."""


@dataclass
class ConvertReport:
    """Counts, each with a few examples.

    Attributes:
        on_error: ``raise`` stops at the first error; ``skip`` counts it and leaves out what has it.
        facts: what was written.
        warnings: kind → where in the source, one entry for each case.
        left_out: likewise.
        files: what the conversion wrote, relative to the data set's root.
    """

    on_error: Literal["raise", "skip"] = "raise"
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)

    def warn(self, kind: str, where: str) -> None:
        """Counts something to look at, which is converted nevertheless."""
        self.warnings.setdefault(kind, []).append(where)

    def leave_out(self, kind: str, where: str) -> None:
        """Counts something that does not get into the data set."""
        self.left_out.setdefault(kind, []).append(where)

    def error(self, kind: str, message: str) -> None:
        """Raises AnnotationError, or with ``skip`` counts what the caller then leaves out."""
        if self.on_error == "raise":
            raise AnnotationError(f"{message}; --on_error skip leaves it out")
        self.leave_out(kind, message)

    def to_json(self) -> dict[str, Any]:
        """Facts, of each kind ``count`` and ``examples``, and the files."""

        def counted(kinds: Mapping[str, list[str]]) -> dict[str, Any]:
            return {
                kind: {"count": len(cases), "examples": cases[:EXAMPLES]}
                for kind, cases in sorted(kinds.items())
            }

        return self.facts | {
            "warnings": counted(self.warnings),
            "left_out": counted(self.left_out),
            "files": self.files,
        }

    def reasons(self) -> str:
        """What was left out, in one line with the first case of each kind."""
        kinds = sorted(self.left_out.items())
        return "left out: " + (
            "; ".join(f"{len(cases)} × {kind}, e.g. {cases[0]}" for kind, cases in kinds)
            or "nothing: it lists no people"
        )

    def text(self) -> str:
        """The same as text for people to read."""
        lines = [
            f"{key.replace('_', ' ')}: {value if isinstance(value, str) else json.dumps(value)}"
            for key, value in self.facts.items()
        ]
        for title, kinds in (("warning", self.warnings), ("left out", self.left_out)):
            for kind, cases in sorted(kinds.items()):
                lines.append(f"{title}: {len(cases)} × {kind}")
                lines += [f"    {case}" for case in cases[:EXAMPLES]]
                if len(cases) > EXAMPLES:
                    lines.append(f"    and {len(cases) - EXAMPLES} more")
        return "\n".join(lines) + "\n"
