"""``cmpose ablate``."""

from __future__ import annotations

import sys
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from cmpose import config
from cmpose.command import Command

UNFINISHED = 3
"""Exit status of ``cmpose ablate`` when its time was up: call it again."""


def _ablate(subparser: ArgumentParser) -> None:
    config.add_fields(subparser)
    subparser.add_argument("output", help="the study's folder; the same command goes on in it")
    subparser.add_argument(
        "--preset",
        type=Literal["cpu", "gpu"],
        default="cpu",
        help="recipe, rendered data, seeds, ratios, jobs and limit that are not given otherwise; "
        "with --config the data are the recipe's own",
    )
    subparser.add_argument(
        "--parts",
        type=list[Literal["table4", "table5", "figure3"]],
        default=[],
        help="of the paper, such as [table4,table5]; default: all",
    )
    subparser.add_argument(
        "--ratios", type=list[float], default=[], help="of Figure 3; default: the preset's"
    )
    subparser.add_argument("--seeds", type=int, default=0, help="how many; 0: the preset's")
    subparser.add_argument("--jobs", type=int, default=0, help="runs at a time; 0: the preset's")
    subparser.add_argument(
        "--limit_minutes",
        type=float | None,
        default=None,
        help="saves and ends within this time, 0: never; default: the preset's",
    )
    subparser.add_argument("--report", default="", help="its folder; default: OUTPUT/report")


def _run_ablate(args: Namespace) -> None:
    from cmpose.study.ablate import ablate

    done = ablate(
        args.output,
        args.preset,
        config.from_namespace(args),
        own_data=bool(args.config),
        parts=args.parts,
        ratios=args.ratios,
        seeds=args.seeds,
        jobs=args.jobs,
        limit_minutes=args.limit_minutes,
        report=args.report,
    )
    if not done:
        sys.exit(UNFINISHED)


def _recipe_of_ablate(args: Namespace) -> config.Config | None:
    if args.config:
        return None
    from cmpose.study.ablate import preset_recipe

    return preset_recipe(args.preset)


ABLATE = Command(
    "ablate",
    "the paper's Tables 4 and 5 and Figure 3, over seeds",
    _ablate,
    _run_ablate,
    _recipe_of_ablate,
)
