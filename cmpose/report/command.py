"""``cmpose report``."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from cmpose.command import Command


def _add_arguments(subparser: ArgumentParser) -> None:
    subparser.add_argument(
        "run", help="the folder of a training run, or the output folder of cmpose predict"
    )
    subparser.add_argument(
        "--out", default="", help="the page's file; if not given, RUN/report.html"
    )
    subparser.add_argument(
        "--clips",
        type=int,
        default=4,
        help="how many of the worst clips to show, and how many of the best",
    )


def _run_report(args: Namespace) -> None:
    from cmpose.report.report import report

    path = report(args.run, args.out, args.clips)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, opens in any browser")


REPORT = Command(
    "report", "one HTML page that shows a training run or a prediction", _add_arguments, _run_report
)
