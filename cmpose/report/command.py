"""``cmpose report``."""

from __future__ import annotations

from jsonargparse import ArgumentParser, Namespace

from cmpose.command import Command


def _report(subparser: ArgumentParser) -> None:
    subparser.add_argument("run", help="folder of a training run, or what predict wrote")
    subparser.add_argument("--out", default="", help="the page; default: RUN/report.html")
    subparser.add_argument("--clips", type=int, default=4, help="worst ones, and best ones")


def _run_report(args: Namespace) -> None:
    from cmpose.report.report import report

    path = report(args.run, args.out, args.clips)
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB, opens in any browser")


REPORT = Command(
    "report", "a page to look at, of a training run or a prediction", _report, _run_report
)
