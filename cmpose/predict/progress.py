"""The progress bar of ``cmpose predict``."""

from __future__ import annotations

from tqdm import tqdm

from cmpose.data.video import VideoInfo


class Progress:
    """A bar of the frames that an interrupted run had done, then one of those that are left."""

    def __init__(self, info: VideoInfo, max_frames: int | None, start: int, *, shown: bool) -> None:
        """
        Args:
            info: the video's.
            max_frames: the prediction ends after so many; None does not end it.
            start: frames that an interrupted run had done.
            shown: False shows nothing.
        """
        self.start, self.shown = start, shown
        # 0 where no length is known: of a camera, unless the options name a number of frames.
        self.frames = min(info.frames or max_frames or 0, max_frames or info.frames)
        self.bar = self._again() if start else self._predict()

    def _again(self) -> tqdm:
        return tqdm(
            total=self.start, unit="frame", desc="go on", disable=None if self.shown else True
        )

    def _predict(self) -> tqdm:
        return tqdm(
            total=self.frames or None,
            initial=self.start,
            unit="frame",
            desc="predict",
            disable=None if self.shown else True,
        )

    def update(self, number: int) -> None:
        """All frames up to ``number`` are done."""
        self.bar.update(number + 1 - self.bar.n)
        if number == self.start - 1:
            self.bar.close()
            self.bar = self._predict()

    def close(self) -> None:
        self.bar.close()
