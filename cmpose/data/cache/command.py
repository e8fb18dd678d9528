"""``cmpose cache``."""

from __future__ import annotations

from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from cmpose import config
from cmpose.command import Command


def _cache(subparser: ArgumentParser) -> None:
    config.add_fields(subparser)
    subparser.add_argument(
        "--split",
        type=Literal["train", "val", "both"],
        default="train",
        help="cache the training clips, the evaluation clips, or both",
    )
    subparser.add_argument(
        "--verify",
        action="store_true",
        help="compare a finished cache with its checksums, and with the frames as they are now",
    )
    subparser.add_argument(
        "--overwrite",
        action="store_true",
        help="throw away what is there and make it anew",
    )


def _run_cache(args: Namespace) -> None:
    from cmpose.data.cache.cache import cache, verify

    recipe = config.from_namespace(args)
    splits = ("train", "val") if args.split == "both" else (args.split,)
    if args.verify:
        verify(recipe, splits)
    else:
        cache(recipe, splits, overwrite=args.overwrite)


CACHE = Command(
    "cache", "cut people out of the frames once, for training to read", _cache, _run_cache
)
