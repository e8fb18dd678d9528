"""``cmpose cache``."""

from __future__ import annotations

from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from cmpose import config
from cmpose.command import Command

_ACTING = {
    "model": ["image_size", "num_frames"],
    "data": config.all_fields(
        *("data", "unannotated", "udp", "decode", "flip_test", "score", "frame_cache_mb", "warp"),
        "reduced_decode",
    ),
}
"""Fields that a cache depends on: what is made of the crops later is not among them."""


def _cache(subparser: ArgumentParser) -> None:
    config.add_some_fields(subparser, _ACTING)
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

    recipe = config.from_namespace(args, _recipe_of_cache(args))
    if args.verify and args.overwrite:
        raise ValueError("--verify and --overwrite: give one of them, the other could not act")
    splits = ("train", "val") if args.split == "both" else (args.split,)
    if args.verify:
        verify(recipe, splits)
    else:
        cache(recipe, splits, overwrite=args.overwrite)


def _recipe_of_cache(args: Namespace) -> config.Config:
    return config.load(args.config) if args.config else config.Config()


CACHE = Command(
    "cache",
    "cut people out of the frames once, for training to read",
    _cache,
    _run_cache,
    default_recipe=_recipe_of_cache,
    if_memory_runs_out="set data.num_workers lower, or free some, and run the same command again",
)
