"""``cmpose convert`` and ``cmpose frames``."""

from __future__ import annotations

from dataclasses import fields

from jsonargparse import ArgumentParser, Namespace

from cmpose.command import Command
from cmpose.convert.options import ConvertOptions


def _convert(subparser: ArgumentParser) -> None:
    subparser.add_argument("source", help="COCO keypoints (JSON), PoseTrack17 annolist, or CSV")
    subparser.add_argument("out", help="folder of the new data set")
    subparser.add_argument(
        "--images", required=True, help="folder that the source's file names are relative to"
    )
    subparser.add_class_arguments(ConvertOptions, skip={"overwrite"})
    subparser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what an earlier conversion of the split wrote",
    )


def _run_convert(args: Namespace) -> None:
    from cmpose.convert.convert import convert

    names = [each.name for each in fields(ConvertOptions)]
    options = ConvertOptions(**{name: args[name] for name in names})
    report = convert(args.source, args.out, args.images, options)
    print(report.text(), end="")


def _frames(subparser: ArgumentParser) -> None:
    subparser.add_argument("video", help="any video file that FFmpeg reads")
    subparser.add_argument("folder", help="where 000000.jpg and so on are written")
    subparser.add_argument("--every", type=int, default=1, help="keep every n-th frame")
    subparser.add_argument("--quality", type=int, default=95, help="quality of the JPEGs, 1 to 100")


def _run_frames(args: Namespace) -> None:
    from cmpose.convert.frames import extract_frames

    print(extract_frames(args.video, args.folder, every=args.every, quality=args.quality))


CONVERT = Command(
    "convert",
    "make a data set of annotations of your own",
    _convert,
    _run_convert,
)

FRAMES = Command(
    "frames",
    "a video's frames as JPEGs, to be labelled",
    _frames,
    _run_frames,
)
