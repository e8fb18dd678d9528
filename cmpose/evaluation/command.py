"""``cmpose evaluate`` and ``cmpose score``."""

from __future__ import annotations

import errno
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from cmpose import config
from cmpose.command import Command
from cmpose.files import in_words

_ACTING = {
    "data": config.all_fields(
        "data", "train_annotations", "train_sequences", "unannotated", "augment"
    ),
    "train": ["batch_size", "precision", "device"],
}
"""Fields that an evaluation depends on: the model is the checkpoint's."""


def _evaluate(subparser: ArgumentParser) -> None:
    config.add_some_fields(subparser, _ACTING)
    subparser.add_argument(
        "--checkpoint",
        required=True,
        help="a run's folder or a checkpoint; gives the model, and without --config the recipe",
    )
    subparser.add_argument(
        "--output",
        default="",
        help="folder of predictions and metrics; default: RUN/evaluations/step-N, or "
        "evaluations/NAME beside a model that is in no run",
    )


def _run_evaluate(args: Namespace) -> None:
    from cmpose.evaluation.evaluate import evaluate_checkpoint
    from cmpose.models.weights import checkpoint

    settings = config.from_namespace(args, _recipe_of_evaluate(args))
    try:
        evaluate_checkpoint(args.checkpoint, settings.data, settings.train, args.output)
    except OSError as error:
        if not isinstance(error, FileNotFoundError) and error.errno != errno.ENAMETOOLONG:
            raise
        recipe = args.config or checkpoint.find(args.checkpoint) / checkpoint.CONFIG
        raise OSError(
            f"{in_words(error)}; {recipe} names the data where no option does (--data.root and "
            "others)"
        ) from error


def _recipe_of_evaluate(args: Namespace) -> config.Config:
    if args.config:
        return config.load(args.config)
    from cmpose.models.weights import checkpoint

    return checkpoint.load_config(checkpoint.find(args.checkpoint))


def _score(subparser: ArgumentParser) -> None:
    subparser.add_argument("ground_truth", help="folder with one annotation file a sequence")
    subparser.add_argument("predictions", help="folder with files of the same names")
    subparser.add_argument("--json", default="", help="also write the result to this file")
    subparser.add_argument(
        "--match",
        type=Literal["name", "order"],
        default="name",
        help="how a file's frames are matched: by image id or name, or by their order in the file",
    )
    subparser.add_argument(
        "--reference",
        type=Literal["auto", "head", "box"],
        default="auto",
        help="unit of distances: head boxes (PoseTrack's AP) or the people's boxes; "
        "auto: head boxes where the keypoints are PoseTrack's",
    )


def _run_score(args: Namespace) -> None:
    from cmpose.evaluation.posetrack_ap import score_folders
    from cmpose.files import claim_file, write_json

    if args.json:
        _refuse_input(Path(args.json), Path(args.ground_truth), Path(args.predictions))
    reference = None if args.reference == "auto" else args.reference
    with claim_file(args.json, "score", "--json") if args.json else nullcontext():
        result = score_folders(
            args.ground_truth, args.predictions, match=args.match, reference=reference
        )
        print(result.table())
        if args.json:
            write_json(args.json, result.to_json())


def _refuse_input(result: Path, *inputs: Path) -> None:
    """Raises ValueError if the result would replace a file that is scored, or lie among them."""
    for path in inputs:
        same = result.is_file() and any(
            file.is_file() and file.samefile(result)
            for file in (path.glob("*.json") if path.is_dir() else [path])
        )
        if same or (path.is_dir() and result.resolve().is_relative_to(path.resolve())):
            raise ValueError(
                f"--json {result}: is an input, or lies among those in {path}; name a "
                "file elsewhere"
            )


EVALUATE = Command(
    "evaluate",
    "official PoseTrack AP of a checkpoint",
    _evaluate,
    _run_evaluate,
    default_recipe=_recipe_of_evaluate,
    if_memory_runs_out="set data.num_workers or train.batch_size lower, or free some",
)

SCORE = Command(
    "score",
    "official PoseTrack AP of prediction files",
    _score,
    _run_score,
)
