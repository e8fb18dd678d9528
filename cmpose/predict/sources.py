"""Several sources: which there are, where the results of each go, and one after the other."""

from __future__ import annotations

import glob
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from cmpose.data.pictures import is_picture
from cmpose.data.video import VideoError, natural_order
from cmpose.files import Interrupted, OutputError

VIDEOS = frozenset(
    (
        *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts"),
        *(".m2ts", ".wmv", ".flv", ".3gp", ".ogv", ".gif"),
    )
)
"""How the names of video files end, in lower case; a pattern takes only these."""

RESULTS = Path("runs/predict")
"""Where results go if no folder is named: to ``runs/predict/NAME``."""


def find_sources(sources: Sequence[str]) -> list[str]:
    """Patterns of video files become these files; all else stays as it is.

    A pattern of pictures is one source: the frames of a video.

    Raises:
        VideoError: a pattern of pictures and videos.
        ValueError: a source that is given twice.
    """
    expanded: list[str] = []
    for source in sources:
        expanded += _matches(source)
    for source, times in Counter(expanded).items():
        if times > 1:
            raise ValueError(f"{source}: is given {times} times; once is enough")
    return expanded


def _matches(source: str) -> list[str]:
    address = "://" in source or " ! " in source
    if address or Path(source).exists() or not glob.has_magic(source):
        return [source]
    files = [file for file in glob.glob(source, recursive=True) if Path(file).is_file()]
    videos = [file for file in files if Path(file).suffix.lower() in VIDEOS]
    pictures = [file for file in files if is_picture(Path(file).name)]
    if videos and pictures:
        raise VideoError(
            f"{source}: are {len(pictures)} pictures and {len(videos)} videos; give a pattern of "
            "one kind, such as '*.mp4'"
        )
    return sorted(videos, key=lambda file: natural_order(Path(file))) or [source]


def name_sources(sources: Sequence[str]) -> list[str]:
    """A name for each source, by which its results are called where there are several.

    It is the file's name, with the ending and then the names of folders where others have the same.

    Raises:
        ValueError: two whose names differ in signs alone that a folder's name leaves out.
    """
    depth = max(len(Path(source).parts) for source in sources)
    names = {source: _name(source, 0) for source in sources}
    for level in range(1, depth + 2):
        uses = Counter(names.values())
        names = {
            source: _name(source, level) if uses[name] > 1 else name
            for source, name in names.items()
        }
    name, times = Counter(names.values()).most_common(1)[0]
    if times > 1:
        both = " and ".join([source for source in sources if names[source] == name][:2])
        raise ValueError(f"{both}: would both be called {name}; predict them one by one")
    return [names[source] for source in sources]


def _name(source: str, level: int) -> str:
    """0: without its ending; 1: with it; then with as many folders more."""
    path = Path(source)
    if path.is_dir():
        path = path.resolve()
    words = [path.stem if not level else path.name]
    if level > 1:
        words = [*path.parts[-level:-1], path.name]
    if path.is_file() or path.is_dir():
        return re.sub(r"[^\w-]+", "_", "_".join(words)).strip("_") or "source"
    # A camera, a stream or a pattern of pictures.
    return re.sub(r"[^\w-]+", "_", source).strip("_")[:60] or "source"


def boxes_of(detections: str, name: str, *, several: bool) -> str | None:
    """The file of a source's boxes: ``detections``, or ``NAME.json`` in it where it is a folder.

    Raises:
        ValueError: one file for several sources.
    """
    if not detections:
        return None
    if Path(detections).is_dir():
        return str(Path(detections) / f"{name}.json")
    if several:
        raise ValueError(
            f"--detections {detections}: is of one video, and there are several; give a folder "
            f"that has {name}.json for this one"
        )
    return detections


def predict_each(sources: Iterable[str], predict: Callable[[str], None]) -> None:
    """Predicts sources one after the other; one that cannot be is told, and left out.

    Args:
        sources: their names are printed.
        predict: what is done with each.

    Raises:
        ValueError: some could not be predicted.
        Interrupted, OutputError: of the source at which it was stopped, or the disk was full.
    """
    sources = list(sources)
    failed = []
    if len(sources) > 1 and all(is_picture(Path(source).name) for source in sources):
        print(
            f"note: {len(sources)} pictures, each for itself; if they are a video's frames, give "
            "their folder, or the pattern in quotes"
        )
    for number, source in enumerate(sources, 1):
        print(f"[{number} of {len(sources)}] {source}", flush=True)
        try:
            predict(source)
        except (Interrupted, OutputError):
            raise
        except (ValueError, OSError, RuntimeError) as error:
            failed.append(source)
            print(f"cmpose predict: {error}", file=sys.stderr, flush=True)
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(sources)} sources have no poses, as said above: "
            f"{', '.join(failed[:5])}{', …' if len(failed) > 5 else ''}"
        )
