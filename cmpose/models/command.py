"""``cmpose export``."""

from __future__ import annotations

from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from cmpose.command import Command


def _export(subparser: ArgumentParser) -> None:
    subparser.add_argument(
        "checkpoint",
        nargs="+",
        help="a run's folder, a checkpoint or a model's folder; of several, the weights are "
        "averaged",
    )
    subparser.add_argument(
        "--out", required=True, help="FILE.pt2, FILE.onnx, or a folder for the model and its card"
    )
    subparser.add_argument(
        "--batch",
        type=int | Literal["dynamic"],
        default="dynamic",
        help="number of clips in a batch, or dynamic for any number",
    )
    subparser.add_argument(
        "--half", action="store_true", help="store a folder's weights in 16 bits"
    )
    subparser.add_argument("--opset", type=int, default=20, help="version of ONNX's operators")


def _run_export(args: Namespace) -> None:
    from cmpose.models.export import export

    export(args.checkpoint, args.out, batch=args.batch, opset=args.opset, half=args.half)


EXPORT = Command(
    "export", "a model as a folder with a card, torch.export or ONNX", _export, _run_export
)
