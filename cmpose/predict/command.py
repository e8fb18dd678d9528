"""``cmpose predict``."""

from __future__ import annotations

from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from cmpose.command import Command


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
    from cmpose.predict.predict import predict_video

    options = args.as_dict()
    predict_video(
        options.pop("video"),
        options.pop("checkpoint"),
        options.pop("out"),
        detections=options.pop("detections") or None,
        **{name: value for name, value in options.items() if name != "config"},
    )


PREDICT = Command(
    "predict",
    "poses of the people in a video",
    _predict,
    _run_predict,
)
