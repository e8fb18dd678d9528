"""``cmpose evaluate`` and ``cmpose score``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from cmpose import config
from cmpose.command import Command


def _evaluate(subparser: ArgumentParser) -> None:
    config.add_fields(subparser)
    subparser.add_argument(
        "--checkpoint",
        required=True,
        help="a run's folder or a checkpoint: gives the model, and without --config the recipe",
    )
    subparser.add_argument("--output", default="", help="default: CHECKPOINT/evaluation")


def _run_evaluate(args: Namespace) -> None:
    from cmpose.evaluation.evaluate import evaluate_checkpoint

    given = config.from_namespace(args)
    evaluate_checkpoint(args.checkpoint, given.data, given.train, args.output)


def _recipe_of_evaluate(args: Namespace) -> config.Config | None:
    if args.config:
        return None
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
        help="how frames are matched within a file: by name and id, or by their order",
    )
    subparser.add_argument(
        "--reference",
        type=Literal["auto", "head", "box"],
        default="auto",
        help="measure distances in head boxes (PoseTrack's AP) or in the people's boxes",
    )


def _run_score(args: Namespace) -> None:
    from cmpose.evaluation.posetrack_ap import score_folders
    from cmpose.files import write_text

    reference = None if args.reference == "auto" else args.reference
    result = score_folders(
        args.ground_truth, args.predictions, match=args.match, reference=reference
    )
    print(result.table())
    if args.json:
        write_text(Path(args.json), json.dumps(result.to_json(), indent=1) + "\n")


EVALUATE = Command(
    "evaluate",
    "official PoseTrack AP of a checkpoint",
    _evaluate,
    _run_evaluate,
    _recipe_of_evaluate,
)

SCORE = Command(
    "score",
    "official PoseTrack AP of prediction files",
    _score,
    _run_score,
)
