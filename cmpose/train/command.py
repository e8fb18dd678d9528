"""``cmpose train``."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from cmpose import config
from cmpose.command import Command


def _train(subparser: ArgumentParser) -> None:
    config.add_fields(subparser)
    subparser.add_argument("--output", default="", help="the run's folder; needed unless --dry-run")
    subparser.add_argument("--resume", action="store_true", help="go on from its last checkpoint")
    subparser.add_argument(
        "--dry-run",
        action="store_true",
        help="only print the memory and the clips/s that the recipe is predicted to need",
    )
    subparser.add_argument(
        "--processes", type=int, default=1, help="for --dry-run: number of cards that share a step"
    )
    subparser.add_argument(
        "--card", default="", help="for --dry-run: cards by name, such as rtx-4090,h200-sxm"
    )


def _run_train(args: Namespace) -> None:
    if args.dry_run:
        from cmpose.train.dry_run import report

        print(report(config.from_namespace(args), args.processes, args.card))
        return
    if args.processes != 1:
        raise ValueError(
            f"--processes {args.processes}: is for --dry-run; several cards train by torchrun, see "
            "docs/training.md"
        )
    if args.card:
        raise ValueError(
            f"--card {args.card}: is for --dry-run; training takes the device of train.device"
        )
    if not args.output:
        raise ValueError("--output is not given: name the run's folder")
    from cmpose.train.train import train

    train(config.from_namespace(args), args.output, resume=args.resume)


TRAIN = Command(
    "train",
    "train a model by a recipe",
    _train,
    _run_train,
    if_memory_runs_out="set data.num_workers or data.frame_cache_mb lower, or free some, then go "
    "on with --resume",
)
