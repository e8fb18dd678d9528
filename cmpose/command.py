"""What a command of the command line is; each package brings its own in ``command.py``.

Those modules are light: what a command does is imported when it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from jsonargparse import ArgumentParser, Namespace

from cmpose.config import Config


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        name: what is typed behind ``cmpose``.
        help: one line on what it does.
        add_arguments: adds the command's arguments to its parser.
        run: does the work; a failure whose message says all is a ``ValueError``, ``OSError`` or
            ``RuntimeError``.
        if_memory_runs_out: what to do then, for the message's end.
        default_recipe: from the arguments, the recipe that a command without ``--config`` departs
            from; None takes the fields' own defaults.
    """

    name: str
    help: str
    add_arguments: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], None]
    if_memory_runs_out: str = "free some, and run the same command again"
    default_recipe: Callable[[Namespace], Config | None] = lambda args: None
