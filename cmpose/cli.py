"""The command line: ``cmpose COMMAND`` or ``python -m cmpose COMMAND``; ``--help`` on each."""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentError
from contextlib import nullcontext, redirect_stdout, suppress
from itertools import pairwise

from jsonargparse import ArgumentParser, Namespace

from cmpose import _version, config, help_text, memory, usage
from cmpose.command import Command
from cmpose.convert.command import CONVERT, FRAMES
from cmpose.data.cache.command import CACHE
from cmpose.evaluation.command import EVALUATE, SCORE
from cmpose.files import STOPPED, Interrupted, OutputError, Printed, in_words
from cmpose.models.command import EXPORT
from cmpose.predict.command import PREDICT
from cmpose.render.command import RENDER
from cmpose.report.command import REPORT
from cmpose.study.command import ABLATE
from cmpose.train.command import TRAIN

# Failures whose message says all: shown without a traceback. Anything else is a bug and shows one.
_EXPLAINED = (ValueError, OSError, RuntimeError)


def _demo(subparser: ArgumentParser) -> None:
    subparser.add_argument(
        "--output", default="runs/demo", help="folder of data, run, pictures and pages"
    )
    subparser.add_argument(
        "--config", default="", help="a recipe in YAML; default: configs/demo.yaml"
    )


def _run_demo(args: Namespace) -> None:
    from cmpose.demo import demo

    demo(args.output, args.config or None)


def _init(subparser: ArgumentParser) -> None:
    subparser.add_argument("dir", metavar="DIR", help="gets recipe.yaml; a file there is kept")
    subparser.add_argument(
        "--data", default="", help="folder of images/ and annotations/; default: DIR/data"
    )


def _run_init(args: Namespace) -> None:
    from cmpose.starter import next_steps, write_recipe

    print(next_steps(write_recipe(args.dir, args.data)))


def _doctor(subparser: ArgumentParser) -> None:
    subparser.add_argument("--json", action="store_true", help="the same as JSON, for a bug report")


def _run_doctor(args: Namespace) -> None:
    from cmpose.doctor import facts, report

    machine = facts()
    print(json.dumps(machine, indent=2) if args.json else report(machine))


DEMO = Command("demo", "render, train, evaluate and predict, small", _demo, _run_demo)
INIT = Command("init", "a small commented recipe to begin with", _init, _run_init)
DOCTOR = Command(
    "doctor",
    "versions, device, which backend runs each op, and what to do next",
    _doctor,
    _run_doctor,
)
COMMANDS = {
    command.name: command
    for command in (
        *(INIT, TRAIN, CACHE, EVALUATE, PREDICT, EXPORT, RENDER, FRAMES, CONVERT, SCORE, REPORT),
        *(ABLATE, DEMO, DOCTOR),
    )
}


def build_parser(command: str, recipe: config.Config | None = None) -> ArgumentParser:
    """The parser with all commands, of which ``command`` alone has its arguments.

    ``recipe`` has the defaults of its fields. Adding every command's takes longer than some
    commands do.
    """
    parser = ArgumentParser(
        prog="cmpose",
        description="CM-Pose video human pose estimation",
        allow_abbrev=False,
        exit_on_error=False,
        formatter_class=help_text.HelpFormatter,
        version=_version.__version__,
    )
    commands = parser.add_subcommands()
    for each in COMMANDS.values():
        subparser = ArgumentParser(description=each.help, allow_abbrev=False, exit_on_error=False)
        if each.name == command:
            each.add_arguments(subparser)
            if recipe is not None:
                flat, defaults = config.flatten(config.to_dict(recipe)), subparser.get_defaults()
                subparser.set_defaults({name: flat[name] for name in flat if name in defaults})
        commands.add_subcommand(each.name, subparser, help=each.help)
    return parser


def _parse(parser: ArgumentParser, command: str, arguments: list[str]) -> Namespace:
    """What the parser makes of the arguments; exits with one line on what cannot be."""
    assert parser._subcommands_action is not None
    commands = parser._subcommands_action.choices
    if command not in commands and not {"-h", "--help", "--version"} & set(arguments):
        problem = f"{command}: no such command{usage.nearest(command, commands)}" if command else ""
        print(
            f"cmpose: {problem or 'give a command'}; there are {', '.join(commands)}",
            file=sys.stderr,
        )
        sys.exit(2)
    names = commands[command]._option_string_actions if command in commands else ()
    if help_text.HELP_ALL in arguments:
        arguments = [command, "--help"]
    elif {"-h", "--help"} & set(arguments) and command in commands:
        help_text.shorten(commands[command], command, config.COMMON)
    arguments = usage.same_but_hyphens(arguments, names)
    try:
        return parser.parse_args(arguments)
    except (ArgumentError, UnicodeDecodeError) as error:
        message = _recipe_error(arguments) or usage.one_line(str(error), names)
        message = help_text.hyphenated(message)
        print(f"cmpose {command}: {message} (cmpose {command} --help)", file=sys.stderr)
        sys.exit(2)


def _recipe_error(arguments: list[str]) -> str:
    """What is wrong with the recipe that ``--config`` names: the parser does not say where."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    recipe = dict(pairwise(words)).get("--config", "")
    if not recipe:
        return ""
    try:
        config.load(recipe)
    except OSError as error:
        return in_words(error)
    except ValueError as error:
        return str(error)
    return ""


def main(arguments: list[str] | None = None) -> None:
    """Runs a command.

    Exits with status 1 after a failure that its message explains, with 130 when it was asked to
    stop, with 141 when nobody reads its output any more, with 2 for arguments that cannot be.
    """
    if sys.stdout is None:  # it was closed: what is printed goes nowhere
        _main(arguments)
        return
    with redirect_stdout(Printed(sys.stdout)) as printed:
        try:
            try:
                _main(arguments)
            except SystemExit as end:
                with nullcontext() if not end.code else suppress(OutputError, SystemExit):
                    printed.flush()  # a command that failed keeps its own error
                raise
            printed.flush()
        except OutputError as error:
            sys.exit(f"cmpose: {error}")


def _main(arguments: list[str] | None) -> None:
    try:
        os.getcwd()
    except FileNotFoundError:
        sys.exit("cmpose: the folder that this shell is in was deleted; change to another one")
    if arguments is None:
        arguments = sys.argv[1:]
    typed = next((word for word in arguments if not word.startswith("-")), "")
    args = _parse(build_parser(typed), typed, arguments)
    command = COMMANDS[args.subcommand]
    try:
        recipe = command.default_recipe(args[command.name])
        if recipe is not None:
            args = _parse(build_parser(command.name, recipe), typed, arguments)
        command.run(args[command.name])
    except Interrupted as error:
        print(f"cmpose {command.name}: {error}", file=sys.stderr)
        sys.exit(STOPPED)
    except Exception as error:
        short = memory.shortage(error)
        explained = short or isinstance(error, _EXPLAINED)
        if not explained or os.environ.get("CMPOSE_TRACEBACK") == "1":
            raise
        message = in_words(error) if isinstance(error, OSError) else str(error)
        if message.startswith("bad configuration"):  # it names the field, and not yet the file
            message = _recipe_error(arguments) or message
        if short:
            message = f"{short}; {command.if_memory_runs_out}"
        sys.exit(f"cmpose {command.name}: {help_text.hyphenated(message)}")
    except KeyboardInterrupt:
        print(f"cmpose {command.name}: interrupted", file=sys.stderr)
        sys.exit(STOPPED)
