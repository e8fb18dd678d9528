"""A rendered split on disk: where its files lie, and whether a folder is ours to write into."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cmpose.data.formats.reader import read
from cmpose.files import OutputError, write_text
from cmpose.render.settings import SPLITS, RenderSettings


class SplitFolder:
    """The files of one split.

    Args:
        root: the data set's folder.
        settings: the split's.

    Attributes:
        root: as given.
        settings: as given.
        images: folder of the sequences' folders.
        annotations: folder of the sequences' files.
        manifest: file with the settings; it marks the folder as rendered here.
    """

    def __init__(self, root: Path, settings: RenderSettings) -> None:
        self.root, self.settings = root, settings
        self.images = root / "images" / settings.split
        self.annotations = root / "annotations" / settings.split
        self.manifest = _manifest(root, settings.split)

    def frames(self, video: int) -> Path:
        """The folder of a sequence's frames."""
        return self.images / self.settings.sequence_name(video)

    def is_frame(self, path: Path) -> bool:
        """Whether a file in the folder of a sequence has the name of one of its frames."""
        return path.name in {f"{f:06d}.jpg" for f in range(self.settings.frames)}

    def annotation(self, video: int) -> Path:
        """A sequence's file, which is written last."""
        return self.annotations / f"{self.settings.sequence_name(video)}.json"

    def is_done(self, video: int) -> bool:
        """Whether a sequence is complete: its frames may have been deleted since."""
        folder = self.frames(video)
        return self.annotation(video).is_file() and all(
            (folder / f"{f:06d}.jpg").is_file() for f in range(self.settings.frames)
        )

    def check_ours(self) -> None:
        """Raises ValueError if something else lies there, or the split with other settings."""
        root = self.root
        if root.exists() and not root.is_dir():
            raise ValueError(f"out: {root} is a file; name a new folder")
        if self.manifest.exists():
            self._check_settings()
            return
        if not root.exists():
            return
        ours = {_manifest(root, split).name for split in SPLITS}
        # A hidden file may be the lock of another split's run, or what a killed run has left.
        entries = {path.name for path in root.iterdir() if path.name[0] != "."}
        has_split = self.images.exists() or self.annotations.exists()
        if entries and (has_split or not entries & ours):
            raise ValueError(
                f"out: {root} is not empty and was not rendered here; name a new folder"
            )

    def _check_settings(self) -> None:
        settings = self.settings.to_json()
        earlier = read(self.manifest, dict[str, Any], ValueError, "name a new folder")
        differing = [
            f"{name} {earlier.get(name)!r} there, {settings.get(name)!r} asked"
            for name in sorted({*earlier, *settings})
            if earlier.get(name) != settings.get(name)
        ]
        if differing:
            raise ValueError(
                f"out: {self.root} holds the {self.settings.split} split with other settings "
                f"({'; '.join(differing)}); name a new folder"
            )

    def check_there(self) -> None:
        """Raises OutputError if the folder was deleted; else a part of the set would come back."""
        if not self.manifest.is_file():
            raise OutputError(
                f"{self.manifest}: is not there any more; run the same command again to render the "
                "data set anew"
            )

    def mark(self) -> None:
        """Writes the settings, unless they are there."""
        if not self.manifest.exists():
            write_text(self.manifest, json.dumps(self.settings.to_json(), indent=1))


def _manifest(root: Path, split: str) -> Path:
    return root / f"rendered_{split}.json"
