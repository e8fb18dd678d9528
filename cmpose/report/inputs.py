"""Reads the files that reports of training runs and of predictions are made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

METRICS = "metrics.json"


class ReportError(ValueError):
    """A folder that no report can be written of; the message names it and what is expected."""


def read_json(path: Path) -> Any:
    """The JSON in a file, None when there is no such file.

    Raises:
        ReportError: the file cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ReportError(
            f"{path}: cannot be read ({error}); mend it, or delete it to have the page without it"
        ) from error
