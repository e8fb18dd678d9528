"""Arguments that cannot be, said in one line: what, its value, what is expected, the nearest name.

jsonargparse says it in several, in the words of Python's types.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterable
from difflib import get_close_matches

_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "list": "a list",
    "tuple": "a list",
    "dict": "a mapping",
}


def nearest(name: str, names: Iterable[str]) -> str:
    """``; did you mean NAME?``, or nothing where no name is near."""
    near = get_close_matches(name, list(names), n=1, cutoff=0.7)
    return f"; did you mean {near[0]}?" if near else ""


def same_but_hyphens(words: Iterable[str], names: Collection[str]) -> list[str]:
    """Words of a command line, options as the parser spells them: ``--batch-size`` is taken too."""
    spelled = {name.replace("_", "-"): name for name in names}
    result = []
    for word in words:
        name, is_given, value = word.partition("=")
        option = name.startswith("--") and spelled.get(name.replace("_", "-"))
        result.append(f"{option}{is_given}{value}" if option else word)
    return result


def one_line(message: str, names: Collection[str], prefix: str = "--") -> str:
    """The parser's message as one line.

    Args:
        message: of an ``ArgumentError``.
        names: of all options, with ``prefix``.
        prefix: of an option; empty in a recipe, where options are fields.
    """
    kind = "option" if prefix else "field"
    if match := re.match(r"unrecognized arguments: (\S+)", message):
        name = match[1].partition("=")[0]
        if not name.startswith("-"):
            return f"{name}: one argument too many"
        return f"{name}: no such {kind}{nearest(name, names)}"
    if match := re.match(r"(Subcommand|Group) '([\w.]+)' does not accept option '(.+)'", message):
        name = prefix + (f"{match[2]}." if match[1] == "Group" else "") + match[3]
        return f"{name}: no such {kind}{nearest(name, names)}"
    if match := re.match(r"the following arguments are required: (.*)", message):
        missing = [each.rpartition(".")[2] for each in match[1].split(", ")]
        missing = [prefix + m if prefix + m in names else m.upper() for m in missing]
        return f"give {' and '.join(missing)}"
    if match := re.match(r"argument (\S+): expected one argument", message):
        return f"{match[1]}: needs a value"
    if match := re.match(r"argument (\S+): ignored explicit argument '?(.*?)'?$", message):
        return f"{match[1]} {match[2]}: takes no value"
    if match := re.match(r'Parser key "([\w.]+)":\s*(.*)', message, re.DOTALL):
        return _wrong_value(prefix + match[1], match[2])
    return " ".join(message.split())[:500]


def _wrong_value(name: str, why: str) -> str:
    """``--fps x: expected a number``."""
    value = re.search(r"(?:Got|Given) value: (.*)", why)
    shown = f" {value[1]:.60}" if value else ""
    if why.startswith("Unable to load config"):
        return f"{name}: is a group; give {name}.FIELD"
    if several := re.search(r"tuple with (\d+) elements", why):
        return f"{name}{shown}: expected {several[1]} values"
    choices = re.search(r"typing\.Literal(\[[^\]]*\])", why)
    if choices:
        return f"{name}{shown}: expected one of {', '.join(map(str, ast.literal_eval(choices[1])))}"
    kinds = [_KINDS[k] for k in re.findall(r"Expected a <class '(\w+)'>", why) if k in _KINDS]
    if kinds:
        return f"{name}{shown}: expected {' or '.join(dict.fromkeys(kinds))}"
    return f"{name}{shown}: {' '.join(why.split()):.500}"
