"""The command line: ``cmpose COMMAND`` or ``python -m cmpose COMMAND``; ``--help`` on each."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from cmpose import _version, config
from cmpose.data.rendered_plan import Difficulty

# Failures whose message says all: shown without a traceback. Anything else is a bug and shows one.
_TOLD = (ValueError, OSError, RuntimeError)

UNFINISHED = 3
"""Exit status of ``cmpose ablate`` when its time was up: call it again."""


def _train(subparser: ArgumentParser) -> None:
    config.add_fields(subparser)
    subparser.add_argument("--output", default="", help="the run's folder; needed to train")
    subparser.add_argument("--resume", action="store_true", help="go on from its last checkpoint")
    subparser.add_argument(
        "--dry-run",
        action="store_true",
        help="only print the memory and the clips/s that the recipe is predicted to need",
    )


def _run_train(args: Namespace) -> None:
    if args.dry_run:
        from cmpose.engine.plan import report

        print(report(config.from_namespace(args)))
        return
    if not args.output:
        raise ValueError("--output is not given: name the run's folder")
    from cmpose.engine.train import train

    train(config.from_namespace(args), args.output, resume=args.resume)


def _cache(subparser: ArgumentParser) -> None:
    config.add_fields(subparser)
    subparser.add_argument(
        "--split",
        type=Literal["train", "val", "both"],
        default="train",
        help="of training clips, evaluation clips, or both",
    )
    subparser.add_argument(
        "--verify", action="store_true", help="compare a finished cache with its checksums"
    )
    subparser.add_argument(
        "--overwrite", action="store_true", help="throw away what is there and make it anew"
    )


def _run_cache(args: Namespace) -> None:
    from cmpose.engine.cache import cache, verify

    recipe = config.from_namespace(args)
    splits = ("train", "val") if args.split == "both" else (args.split,)
    if args.verify:
        verify(recipe, splits)
    else:
        cache(recipe, splits, overwrite=args.overwrite)


def _evaluate(subparser: ArgumentParser) -> None:
    config.add_fields(subparser)
    subparser.add_argument(
        "--checkpoint",
        required=True,
        help="a run's folder or a checkpoint: gives the model, and without --config the recipe",
    )
    subparser.add_argument("--output", default="", help="default: CHECKPOINT/evaluation")


def _run_evaluate(args: Namespace) -> None:
    from cmpose.engine.evaluate import evaluate_checkpoint

    given = config.from_namespace(args)
    evaluate_checkpoint(args.checkpoint, given.data, given.train, args.output)


def _recipe_of(path: str) -> config.Config:
    from cmpose.engine import checkpoint

    return checkpoint.load_config(checkpoint.find(path))


def _predict(subparser: ArgumentParser) -> None:
    subparser.add_argument("video", help="any file that OpenCV reads")
    subparser.add_argument("--checkpoint", required=True, help="a run's folder or a checkpoint")
    subparser.add_argument("--out", required=True, help="folder for poses, video and pictures")
    subparser.add_argument("--detections", default="", help="people's boxes (see docs/predict.md)")
    subparser.add_argument(
        "--explain", action="store_true", help="also draw causal tokens and clusters"
    )
    subparser.add_argument(
        "--explain_frames", type=list[int], default=[], help="which frames; default: three"
    )
    subparser.add_argument("--min_score", type=float, default=0.2, help="of a box, to be used")
    subparser.add_argument("--device", default="auto")


def _run_predict(args: Namespace) -> None:
    from cmpose.engine.predict import predict_video

    predict_video(
        args.video,
        args.checkpoint,
        args.out,
        detections=args.detections or None,
        explain=args.explain or bool(args.explain_frames),
        explain_frames=args.explain_frames,
        min_score=args.min_score,
        device=args.device,
    )


def _render(subparser: ArgumentParser) -> None:
    subparser.add_argument("out", help="folder of the new data set")
    subparser.add_argument("--videos", type=int, default=24)
    subparser.add_argument("--frames", type=int, default=30, help="in each video")
    subparser.add_argument("--seed", type=int, default=0)
    subparser.add_argument("--split", default="train", help="train or val")
    subparser.add_argument(
        "--size", type=tuple[int, int], default=(360, 640), help="[height, width] in pixels"
    )
    subparser.add_argument("--max_people", type=int, default=4, help="in a video")
    subparser.add_argument("--fps", type=float, default=25.0, help="that motion is sampled at")
    subparser.add_argument("--workers", type=int, default=2, help="processes")
    subparser.add_class_arguments(Difficulty, "difficulty")


def _run_render(args: Namespace) -> None:
    from cmpose.data.rendered import render_dataset

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


def _score(subparser: ArgumentParser) -> None:
    subparser.add_argument("ground_truth", help="folder with one annotation file a sequence")
    subparser.add_argument("predictions", help="folder with files of the same names")
    subparser.add_argument("--json", default="", help="also write the result to this file")
    subparser.add_argument(
        "--match",
        type=Literal["name", "order"],
        default="name",
        help="how frames are matched within a file: by name and id, or by their order",
    )


def _run_score(args: Namespace) -> None:
    from cmpose.engine.checkpoint import write_text
    from cmpose.evaluation.posetrack_ap import score_folders

    result = score_folders(args.ground_truth, args.predictions, match=args.match)
    print(result.table())
    if args.json:
        write_text(Path(args.json), json.dumps(result.to_json(), indent=1) + "\n")


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
    from cmpose.engine.ablate import ablate

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


def _demo(subparser: ArgumentParser) -> None:
    subparser.add_argument("--output", default="runs/demo")
    subparser.add_argument("--config", default="", help="default: the recipe in configs/demo.yaml")


def _run_demo(args: Namespace) -> None:
    from cmpose.engine.demo import demo

    demo(args.output, args.config or None)


def _doctor(subparser: ArgumentParser) -> None:
    del subparser


def _run_doctor(args: Namespace) -> None:
    from cmpose.doctor import report

    del args
    print(report())


_COMMANDS: dict[str, tuple[Callable[[ArgumentParser], None], Callable[[Namespace], None], str]] = {
    "train": (_train, _run_train, "train a model by a recipe"),
    "cache": (_cache, _run_cache, "cut people out of the frames once, for training to read"),
    "evaluate": (_evaluate, _run_evaluate, "official PoseTrack AP of a checkpoint"),
    "predict": (_predict, _run_predict, "poses of the people in a video"),
    "render": (_render, _run_render, "make a data set of rendered people"),
    "score": (_score, _run_score, "official PoseTrack AP of prediction files"),
    "ablate": (_ablate, _run_ablate, "the paper's Tables 4 and 5 and Figure 3, over seeds"),
    "demo": (_demo, _run_demo, "render, train, evaluate and predict, small"),
    "doctor": (_doctor, _run_doctor, "versions, device, and which backend runs each op"),
}


def _default_recipe(command: str, args: Namespace) -> config.Config | None:
    """The recipe that a command without ``--config`` departs from; None takes the fields' own."""
    if command == "evaluate" and not args.config:
        return _recipe_of(args.checkpoint)
    if command == "ablate" and not args.config:
        from cmpose.engine.ablate import preset_recipe

        return preset_recipe(args.preset)
    return None


def build_parser(recipe: config.Config | None = None, command: str = "") -> ArgumentParser:
    """The parser with all commands; ``recipe`` has the defaults of ``command``'s fields."""
    parser = ArgumentParser(
        prog="cmpose",
        description="CM-Pose video human pose estimation",
        allow_abbrev=False,
        version=_version.__version__,
    )
    commands = parser.add_subcommands()
    for name, (add, _, text) in _COMMANDS.items():
        subparser = ArgumentParser(description=text, allow_abbrev=False)
        add(subparser)
        if name == command and recipe is not None:
            subparser.set_defaults(config.flatten(config.to_dict(recipe)))
        commands.add_subcommand(name, subparser, help=text)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Runs a command; a failure that its message explains exits with status 1."""
    args = build_parser().parse_args(arguments)
    try:
        recipe = _default_recipe(args.subcommand, args[args.subcommand])
        if recipe is not None:
            args = build_parser(recipe, args.subcommand).parse_args(arguments)
        _COMMANDS[args.subcommand][1](args[args.subcommand])
    except _TOLD as error:
        if os.environ.get("CMPOSE_TRACEBACK") == "1":
            raise
        sys.exit(f"cmpose {args.subcommand}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"cmpose {args.subcommand}: interrupted")
