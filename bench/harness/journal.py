"""What a run of ``python -m bench`` is doing and has done, so that another process can go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.harness.workload import Workload
from cmpose.files import write_json


class Journal:
    """Kept in a file, which a process that is lost leaves to the one that follows it.

    Args:
        path: None keeps nothing on disk.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.state: dict[str, Any] = {"running": None, "died": {}, "failed": {}, "done": []}
        if path is not None and path.is_file():
            self.state = json.loads(path.read_text())
        if self.state["running"] is not None:
            # The process before this one did not get past it; once can have been lack of time.
            workload, entrant = self.state["running"]
            times = self.state["died"].setdefault(workload, {})
            times[entrant] = times.get(entrant, 0) + 1
            if times[entrant] > 1:
                text = "error: the process died or was stopped twice while it ran"
                self.fail(workload, entrant, text)
            self._save(running=None)

    def _save(self, **changes: Any) -> None:
        self.state |= changes
        if self.path is not None:
            write_json(self.path, self.state)

    def began(self, workload: Workload, entrant: str) -> None:
        self._save(running=[str(workload), entrant])

    def fail(self, workload: str, entrant: str, message: str) -> None:
        self.state["failed"].setdefault(workload, {})[entrant] = message
        self._save(running=None)

    def failures(self, workload: Workload) -> dict[str, str]:
        """Entrant → why it failed in a process before this one."""
        return dict(self.state["failed"].get(str(workload), {}))

    def finish(self, workload: Workload) -> None:
        self._save(running=None, done=[*self.state["done"], str(workload)])

    def is_done(self, workload: Workload) -> bool:
        return str(workload) in self.state["done"]
