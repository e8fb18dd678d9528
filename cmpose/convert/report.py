"""What a conversion found: errors that stop it, warnings and omissions that are counted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cmpose.data.sequence import AnnotationError

EXAMPLES = 5
"""Places named for each kind."""


@dataclass
class Report:
    """Counts, each with a few examples.

    Attributes:
        on_error: ``raise`` stops at the first error; ``skip`` counts it and leaves out what has it.
        facts: what was written.
        warnings: kind → places.
        left_out: kind → places.
    """

    on_error: Literal["raise", "skip"] = "raise"
    facts: dict[str, Any] = field(default_factory=dict)
    warnings: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    def warn(self, kind: str, place: str) -> None:
        """Something to look at, which is converted nevertheless."""
        self.warnings.setdefault(kind, []).append(place)

    def leave_out(self, kind: str, place: str) -> None:
        """Something that has no place in the data set."""
        self.left_out.setdefault(kind, []).append(place)

    def error(self, kind: str, message: str) -> None:
        """Raises AnnotationError, or with ``skip`` counts what the caller then leaves out."""
        if self.on_error == "raise":
            raise AnnotationError(f"{message}; --on_error skip leaves it out")
        self.leave_out(kind, message)

    def to_json(self) -> dict[str, Any]:
        """Facts, and of each kind ``count`` and ``examples``."""

        def counted(kinds: Mapping[str, list[str]]) -> dict[str, Any]:
            return {
                kind: {"count": len(places), "examples": places[:EXAMPLES]}
                for kind, places in sorted(kinds.items())
            }

        return self.facts | {
            "warnings": counted(self.warnings),
            "left_out": counted(self.left_out),
        }

    def text(self) -> str:
        """The same for people."""
        lines = [
            f"{key.replace('_', ' ')}: {value if isinstance(value, str) else json.dumps(value)}"
            for key, value in self.facts.items()
        ]
        for title, kinds in (("warning", self.warnings), ("left out", self.left_out)):
            for kind, places in sorted(kinds.items()):
                lines.append(f"{title}: {len(places)} × {kind}")
                lines += [f"    {place}" for place in places[:EXAMPLES]]
                if len(places) > EXAMPLES:
                    lines.append(f"    and {len(places) - EXAMPLES} more")
        return "\n".join(lines) + "\n"
