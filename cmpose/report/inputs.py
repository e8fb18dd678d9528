"""Reads the files that reports of training runs and of predictions are made from."""

from __future__ import annotations

from pathlib import Path

from cmpose.data.formats.reader import read
from cmpose.data.formats.run import Metrics

METRICS = "metrics.json"


class ReportError(ValueError):
    """A folder that no report can be written of; the message names it and what is expected."""


def read_metrics(path: Path) -> Metrics | None:
    """The metrics in a file, None when there is no such file.

    Raises:
        ReportError: the file cannot be read, or a value is of another type.
    """
    remedy = "mend it, or delete it to have the page without it"
    try:
        return read(path, Metrics, ReportError, remedy)
    except FileNotFoundError:
        return None
