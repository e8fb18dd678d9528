"""``cmpose ablate``."""

from __future__ import annotations

import sys
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from cmpose import config
from cmpose.command import Command

UNFINISHED = 3
"""Exit status of ``cmpose ablate`` when its time was up: call it again."""


_ACTING = {
    "model": config.all_fields("model"),
    "data": config.all_fields("data"),
    "train": config.all_fields("train", "seed", "evaluate_every", "keep_checkpoints"),
}
"""Fields that a study does not set itself."""


def _ablate(subparser: ArgumentParser) -> None:
    config.add_some_fields(subparser, _ACTING)
    subparser.add_argument("output", help="the study's folder; the same command goes on in it")
    subparser.add_argument(
        "--preset",
        type=Literal["cpu", "gpu"],
        default="cpu",
        help="gives the recipe, the rendered data and what the options below leave out; "
        "with --config nothing is rendered and the data are the recipe's own",
    )
    subparser.add_argument(
        "--parts",
        type=list[Literal["table4", "table5", "figure3"]],
        default=[],
        help="parts of the paper to run, such as [table4,table5]; default: all",
    )
    subparser.add_argument(
        "--ratios",
        type=list[float],
        default=[],
        help="ratios of masked and noised tokens in Figure 3; default: the preset's",
    )
    subparser.add_argument("--seeds", type=int, default=0, help="number of seeds; 0: the preset's")
    subparser.add_argument(
        "--jobs", type=int, default=0, help="number of runs at a time; 0: the preset's"
    )
    subparser.add_argument(
        "--limit_minutes",
        type=float | None,
        default=None,
        help="stop after this many minutes at most, and save the runs under way; 0: no limit; "
        "default: the preset's",
    )
    subparser.add_argument(
        "--report", default="", help="folder of the report; default: OUTPUT/report"
    )


def _run_ablate(args: Namespace) -> None:
    from cmpose.study.ablate import AblationOptions, ablate

    done = ablate(
        args.output,
        args.preset,
        config.from_namespace(args, _recipe_of_ablate(args)),
        own_data=bool(args.config),
        options=AblationOptions(
            parts=tuple(args.parts),
            ratios=tuple(args.ratios),
            seeds=args.seeds,
            jobs=args.jobs,
            limit_minutes=args.limit_minutes,
            report=args.report,
        ),
    )
    if not done:
        sys.exit(UNFINISHED)


def _recipe_of_ablate(args: Namespace) -> config.Config:
    if args.config:
        return config.load(args.config)
    from cmpose.study.presets import preset_recipe

    return preset_recipe(args.preset)


ABLATE = Command(
    "ablate",
    "the paper's Tables 4 and 5 and Figure 3, over seeds",
    _ablate,
    _run_ablate,
    default_recipe=_recipe_of_ablate,
    if_memory_runs_out="give fewer --jobs, or free some, and run the same command again",
)
