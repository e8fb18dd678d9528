"""A command's help: in plain words, and of a screen or two."""

from __future__ import annotations

from argparse import SUPPRESS, Action
from collections.abc import Collection

from jsonargparse import ArgumentParser, DefaultHelpFormatter

HELP_ALL = "--help-all"


class HelpFormatter(DefaultHelpFormatter):
    """Help without Python's types, which names and choices tell, and without empty defaults."""

    def _get_help_string(self, action: Action) -> str:
        text = super()._get_help_string(action)
        for typed in ("type: %(type)s, ", ", type: %(type)s", " (type: %(type)s)"):
            text = text.replace(typed, "")
        return text

    def _expand_help(self, action: Action) -> str:
        text = super()._expand_help(action)
        for empty in (" (default: null)", " (default: )", " (default: False)"):
            text = text.removesuffix(empty)
        return text


def shorten(parser: ArgumentParser, common: Collection[str]) -> None:
    """Leaves a recipe's fields out of the help, but for ``common``, and says where they are."""
    fields = [action.dest for action in parser._actions if "." in action.dest]
    groups = {name.rpartition(".")[0] for name in fields}
    hidden = {*fields, *groups, "print_config"} - {*common}
    for action in parser._actions:
        if action.dest in hidden:
            action.help = SUPPRESS
    if fields:
        more = len(hidden.difference(groups) & {*fields})
        parser.epilog = f"{more} more fields of the recipe: {HELP_ALL}, docs/training.md"
