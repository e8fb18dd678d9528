"""Models that come with the package, by name: the folders in ``cmpose/models/packaged``, if any."""

from __future__ import annotations

from pathlib import Path

from cmpose.models.weights import folder as model_folder

_FOLDER = Path(__file__).resolve().parents[1] / "packaged"


def names() -> list[str]:
    """The names of the packaged models."""
    if not _FOLDER.is_dir():
        return []
    return sorted(path.name for path in _FOLDER.iterdir() if model_folder.is_model(path))


def named(path: str | Path) -> Path | None:
    """The folder of the packaged model of this name; None if there is none.

    A file or a folder of that name, where the command is run, comes first.
    """
    if Path(path).exists() or str(path) not in names():
        return None
    return _FOLDER / str(path)


def is_packaged(folder: Path) -> bool:
    """Whether a model's folder is a packaged one, into which nothing is written."""
    return folder.resolve().parent == _FOLDER


def default() -> str:
    """The name of the model that is taken when none is named.

    Raises:
        CheckpointError: no model comes with this version of the package.
    """
    if not names():
        raise model_folder.CheckpointError(
            "--checkpoint: give the folder of a run or of a model; none comes with this version"
        )
    return "tiny" if "tiny" in names() else names()[0]


def card(name: str) -> Path:
    """The model card of a packaged model."""
    return _FOLDER / name / model_folder.CARD


def in_words() -> str:
    """For a message on a model that is not there: that a name would do, and which there are."""
    return f", or the name of a packaged model ({', '.join(names())})" if names() else ""
