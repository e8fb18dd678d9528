"""``cmpose render``."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from cmpose.command import Command
from cmpose.render.settings import Difficulty


def _render(subparser: ArgumentParser) -> None:
    subparser.add_argument("out", help="folder of the data set; made if absent")
    subparser.add_argument("--videos", type=int, default=24, help="number of sequences")
    subparser.add_argument("--frames", type=int, default=30, help="frames in each sequence")
    subparser.add_argument("--seed", type=int, default=0, help="the same seed gives the same files")
    subparser.add_argument("--split", default="train", help="which split to render: train or val")
    subparser.add_argument(
        "--size",
        type=tuple[int, int],
        default=(360, 640),
        help="[height, width] in pixels",
    )
    subparser.add_argument("--max_people", type=int, default=4, help="most people in a sequence")
    subparser.add_argument("--fps", type=float, default=25.0, help="frames a second of the motion")
    subparser.add_argument("--workers", type=int, default=2, help="processes that render")
    subparser.add_class_arguments(Difficulty, "difficulty")


def _run_render(args: Namespace) -> None:
    from cmpose.render.dataset import render_dataset

    summary = render_dataset(
        args.out,
        videos=args.videos,
        frames=args.frames,
        seed=args.seed,
        split=args.split,
        size=args.size,
        max_people=args.max_people,
        fps=args.fps,
        workers=args.workers,
        difficulty=Difficulty(**args.difficulty.as_dict()),
    )
    print(summary)


RENDER = Command(
    "render",
    "make a data set of rendered people",
    _render,
    _run_render,
    if_memory_runs_out="give fewer --workers, or free some, and run the same command again",
)
