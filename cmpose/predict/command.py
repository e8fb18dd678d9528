"""``cmpose predict``."""

from __future__ import annotations

from typing import Literal

from jsonargparse import ArgumentParser, Namespace

from cmpose.command import Command


def _add_arguments(subparser: ArgumentParser) -> None:
    add = subparser.add_argument
    add(
        "video",
        nargs="+",
        help="a video file, a picture, a folder of pictures, a pattern such as 'frames/*.jpg' or "
        "'*.mp4', a camera's number, or the address of a stream; several have a folder each",
    )
    add(
        "--checkpoint",
        default="",
        help="the folder of a training run, or of a model, or the name of a model that comes with "
        "the package, which is what is taken where none is given, if there is one",
    )
    add(
        "--out",
        default="",
        help="the folder that poses, video and pictures are written to; if not given, "
        "runs/predict/NAME",
    )
    add(
        "--show",
        action="store_true",
        help="show the drawn frames in a window; without --out nothing is written then",
    )
    _add_boxes(subparser)
    add(
        "--outputs",
        type=list[Literal["video", "poses", "coco", "csv"]],
        default=["video", "poses", "coco"],
        help="which files to write",
    )
    add(
        "--explain",
        action="store_true",
        help="also write pictures of heatmaps, causal tokens and clusters, of three frames",
    )
    add(
        "--explain_frames",
        type=list[int],
        default=[],
        help="write such pictures of these frames instead; they count from 0",
    )
    add(
        "--smooth_keypoints",
        type=float,
        default=0.0,
        help="how still keypoints at rest are held, by the One-Euro filter: 0 not at all, 1 is "
        "usual",
    )
    add(
        "--keypoint_score",
        type=float,
        default=0.1,
        help="keypoints of a lower score are not drawn, and have no angles",
    )
    add("--batch_size", type=int, default=16, help="how many people go through the model at once")
    add("--max_frames", type=int | None, default=None, help="stop after this many frames")
    add(
        "--fps",
        type=float | None,
        default=None,
        help="frames a second of the drawn video; if not given, those of the input, or 25",
    )
    add(
        "--on_error",
        type=Literal["raise", "skip"],
        default="raise",
        help="what to do at an unreadable picture of a folder",
    )
    add(
        "--overwrite",
        action="store_true",
        help="forget what an earlier run did for this video, and start anew",
    )
    add("--device", default="auto", help="auto, cpu or cuda")


def _add_boxes(subparser: ArgumentParser) -> None:
    """Whose poses are predicted."""
    add = subparser.add_argument
    add(
        "--detections",
        default="",
        help="a JSON file with people's boxes (see docs/predict.md); without it a detector is run",
    )
    add(
        "--detector",
        default="",
        help="what finds people: rtdetr, rtdetr:FOLDER, FILE.onnx (YOLOX, RTMDet, RF-DETR) or hog; "
        "if not given, hog, which needs no download and misses many people",
    )
    add("--min_score", type=float, default=0.2, help="boxes with a lower score are ignored")
    add(
        "--detect_every",
        type=int | None,
        default=None,
        help="run the detector in every Nth frame; if not given, 3",
    )
    add(
        "--bridge",
        type=int | None,
        default=None,
        help="how many frames in a row a person may be missing and still gets boxes, between "
        "those before and after; if not given, 10, or 0 when the boxes have track ids",
    )
    add(
        "--smooth",
        type=int | None,
        default=None,
        help="average boxes over this many frames before and after; if not given, 2, or 0 when "
        "the boxes have track ids",
    )


def _run_predict(args: Namespace) -> None:
    from cmpose.models.weights import packaged
    from cmpose.predict.detectors.named import named_detector
    from cmpose.predict.pose_model import load
    from cmpose.predict.results import check_somebody
    from cmpose.predict.sources import RESULTS, boxes_of, find_sources, name_sources, predict_each

    sources = find_sources(args.video)
    names = dict(zip(sources, name_sources(sources), strict=True))
    chosen = args.checkpoint
    if not chosen:
        chosen = packaged.default()
        print(f"model: {chosen}, which comes with the package ({packaged.card(chosen)})")
    model = load(chosen, args.device)
    detector = named_detector(args.detector, model.predictor.device) if args.detector else None
    options = {name: args[name] for name in _PREDICT}
    saving = {name: args[name] for name in _SAVE}

    def predict(source: str) -> None:
        boxes = boxes_of(args.detections, names[source], several=len(sources) > 1)
        prediction = model.predict(source, boxes=boxes, detector=detector, **options)
        if args.show and not args.out:
            prediction.show()
            return
        out = args.out or str(RESULTS / names[source])
        if args.out and len(sources) > 1:
            out = f"{args.out}/{names[source]}"
        check_somebody(prediction.save(out, **saving), out)

    if len(sources) == 1:
        predict(sources[0])
    else:
        predict_each(sources, predict)


_PREDICT = (
    *("min_score", "detect_every", "bridge", "smooth", "smooth_keypoints", "keypoint_score"),
    *("batch_size", "max_frames", "fps", "on_error"),
)
_SAVE = ("outputs", "explain", "explain_frames", "overwrite", "show")
"""Options that the two calls of ``cmpose.predict.pose_model`` take as they are."""


PREDICT = Command(
    "predict",
    "poses of the people in a video",
    _add_arguments,
    _run_predict,
    if_memory_runs_out="free some, and run the same command again: it goes on; or give a smaller "
    "--batch_size",
)
