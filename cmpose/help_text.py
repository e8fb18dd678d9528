"""A command's help: in plain words, and of a screen."""

from __future__ import annotations

import re
from argparse import SUPPRESS, Action
from collections.abc import Collection
from typing import Any

from jsonargparse import ArgumentParser, DefaultHelpFormatter

HELP_ALL = "--help-all"


def hyphenated(text: str) -> str:
    """A text with its options as they are shown: ``--batch-size``.

    A recipe's fields, with a dot, keep the names that they have in files.
    """
    return re.sub(
        r"(?<![\w/.-])--[\w.]+", lambda o: o[0] if "." in o[0] else o[0].replace("_", "-"), text
    )


class HelpFormatter(DefaultHelpFormatter):
    """Help without Python's types, which names and choices tell, and without empty defaults."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"max_help_position": 34} | kwargs)

    def _format_action_invocation(self, action: Action) -> str:
        return hyphenated(super()._format_action_invocation(action))

    def _get_help_string(self, action: Action) -> str:
        text = super()._get_help_string(action)
        for typed in ("type: %(type)s, ", ", type: %(type)s", " (type: %(type)s)"):
            text = text.replace(typed, "")
        return text

    def _expand_help(self, action: Action) -> str:
        text = super()._expand_help(action)
        for empty in (" (default: null)", " (default: )", " (default: False)"):
            text = text.removesuffix(empty)
        return text.replace("``", "")


def shorten(parser: ArgumentParser, command: str, common: Collection[str]) -> None:
    """Leaves a recipe's fields out of the help, but for ``common``, and says where they are.

    Of these the first sentence is enough, and of the usage what must be given.

    Args:
        parser: of the command.
        command: its name.
        common: fields by their dotted names.
    """
    fields = [action.dest for action in parser._actions if "." in action.dest]
    groups = {name.rpartition(".")[0] for name in fields}
    hidden = {*fields, *groups, "print_config"} - {*common}
    needed = []
    for action in parser._actions:
        if action.dest in hidden:
            action.help = SUPPRESS
        elif action.dest in fields:
            default = " (default: %(default)s)"
            action.help = (action.help or "").partition(". ")[0].rstrip(".").removesuffix(default)
        elif not action.option_strings:
            needed.append(str(action.metavar or action.dest).upper())
        elif action.required:
            needed += [action.option_strings[-1], action.dest.upper()]
    parser.usage = " ".join(["cmpose", command, *needed, "[options]"])
    for group in parser._action_groups:
        group.title = (group.title or "").partition(". ")[0]
    if fields:
        more = len(hidden.difference(groups) & {*fields})
        parser.epilog = f"{more} more fields of the recipe: {HELP_ALL}, docs/training.md"
