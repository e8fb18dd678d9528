"""The command line: ``cmpose COMMAND`` or ``python -m cmpose COMMAND``; ``--help`` on each."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from cmpose import _version, config
from cmpose.data.convert_options import ConvertOptions
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
    subparser.add_argument(
        "--processes", type=int, default=1, help="of --dry-run: cards that share a step"
    )


def _run_train(args: Namespace) -> None:
    if args.dry_run:
        from cmpose.engine.plan import report

        print(report(config.from_namespace(args), args.processes))
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
    subparser.add_argument(
        "video", help="a file, a folder of pictures or a pattern, a camera's number, an address"
    )
    subparser.add_argument("--checkpoint", required=True, help="a run's folder or a checkpoint")
    subparser.add_argument("--out", required=True, help="folder for poses, video and pictures")
    subparser.add_argument("--detections", default="", help="people's boxes (see docs/predict.md)")
    subparser.add_argument("--min_score", type=float, default=0.2, help="of a box, to be used")
    subparser.add_argument(
        "--outputs",
        type=list[Literal["video", "poses", "coco"]],
        default=["video", "poses", "coco"],
        help="what to write",
    )
    subparser.add_argument(
        "--explain", action="store_true", help="also draw causal tokens and clusters"
    )
    subparser.add_argument(
        "--explain_frames", type=list[int], default=[], help="which frames; default: three"
    )
    subparser.add_argument(
        "--detect_every",
        type=int,
        default=3,
        help="frames from one run of the detector to the next",
    )
    subparser.add_argument(
        "--bridge",
        type=int | None,
        default=None,
        help="frames a person may be missing for; default: 10, for boxes with track ids 0",
    )
    subparser.add_argument(
        "--smooth",
        type=int | None,
        default=None,
        help="frames on either side to average boxes over; default: 2, with track ids 0",
    )
    subparser.add_argument("--batch_size", type=int, default=16, help="people at once")
    subparser.add_argument("--max_frames", type=int | None, default=None, help="stop after so many")
    subparser.add_argument(
        "--fps", type=float | None, default=None, help="of the drawn video; default: its own, or 25"
    )
    subparser.add_argument(
        "--on_error",
        type=Literal["raise", "skip"],
        default="raise",
        help="at an unreadable picture of a folder",
    )
    subparser.add_argument(
        "--overwrite", action="store_true", help="throw away what an earlier run left"
    )
    subparser.add_argument("--device", default="auto")


def _run_predict(args: Namespace) -> None:
    from cmpose.engine.predict import predict_video

    options = args.as_dict()
    predict_video(
        options.pop("video"),
        options.pop("checkpoint"),
        options.pop("out"),
        detections=options.pop("detections") or None,
        **{name: value for name, value in options.items() if name != "config"},
    )


def _export(subparser: ArgumentParser) -> None:
    subparser.add_argument("checkpoint", help="a run's folder, a checkpoint or a model's folder")
    subparser.add_argument(
        "--out", required=True, help="FILE.pt2, FILE.onnx, or a folder for the model and its card"
    )
    subparser.add_argument(
        "--batch",
        type=int | Literal["dynamic"],
        default="dynamic",
        help="clips in a batch, or dynamic for any number",
    )
    subparser.add_argument("--opset", type=int, default=20, help="version of ONNX's operators")


def _run_export(args: Namespace) -> None:
    from cmpose.engine.export import export

    export(args.checkpoint, args.out, batch=args.batch, opset=args.opset)


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


def _frames(subparser: ArgumentParser) -> None:
    subparser.add_argument("video", help="any file that OpenCV reads")
    subparser.add_argument("folder", help="gets 000000.jpg and so on")
    subparser.add_argument("--every", type=int, default=1, help="keep every n-th frame")
    subparser.add_argument("--quality", type=int, default=95, help="of the JPEGs, 1 to 100")


def _run_frames(args: Namespace) -> None:
    from cmpose.engine.frames import extract_frames

    print(extract_frames(args.video, args.folder, every=args.every, quality=args.quality))


def _convert(subparser: ArgumentParser) -> None:
    subparser.add_argument("source", help="COCO keypoints (JSON), PoseTrack17 annolist, or CSV")
    subparser.add_argument("out", help="the data set's folder")
    subparser.add_argument("--images", required=True, help="folder that file names start from")
    subparser.add_class_arguments(ConvertOptions)


def _run_convert(args: Namespace) -> None:
    from cmpose.data.convert import convert

    names = [each.name for each in fields(ConvertOptions)]
    options = ConvertOptions(**{name: args[name] for name in names})
    report = convert(args.source, args.out, args.images, options)
    print(report.text(), end="")


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
    subparser.add_argument(
        "--reference",
        type=Literal["auto", "head", "box"],
        default="auto",
        help="measure distances in head boxes (PoseTrack's AP) or in the people's boxes",
    )


def _run_score(args: Namespace) -> None:
    from cmpose.engine.checkpoint import write_text
    from cmpose.evaluation.posetrack_ap import score_folders

    reference = None if args.reference == "auto" else args.reference
    result = score_folders(
        args.ground_truth, args.predictions, match=args.match, reference=reference
    )
    print(result.table())
    if args.json:
        write_text(Path(args.json), json.dumps(result.to_json(), indent=1) + "\n")


def _report(subparser: ArgumentParser) -> None:
    subparser.add_argument("run", help="folder of a training run, or what predict wrote")
    subparser.add_argument("--out", default="", help="the page; default: RUN/report.html")
    subparser.add_argument("--clips", type=int, default=4, help="worst ones, and best ones")


def _run_report(args: Namespace) -> None:
    from cmpose.engine.report import report

    path = report(args.run, args.out, args.clips)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, opens in any browser")


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
    "export": (_export, _run_export, "a model as a folder with a card, torch.export or ONNX"),
    "render": (_render, _run_render, "make a data set of rendered people"),
    "frames": (_frames, _run_frames, "a video's frames as JPEGs, to be labelled"),
    "convert": (_convert, _run_convert, "make a data set of annotations of your own"),
    "score": (_score, _run_score, "official PoseTrack AP of prediction files"),
    "report": (_report, _run_report, "a page to look at, of a training run or a prediction"),
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
