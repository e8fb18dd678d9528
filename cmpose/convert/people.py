"""The people of a conversion: what is checked, and where their boxes come from."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from cmpose.convert.boxes import Box, OwnBoxes
from cmpose.convert.report import Report
from cmpose.convert.sources import NO_BOX, Draft
from cmpose.data.sequence import AnnotationError, Frame, Person, box_of_keypoints
from cmpose.data.skeleton import Skeleton


class People:
    """Checks the people of drafts and puts those that can be used into frames."""

    def __init__(self, report: Report, skeleton: Skeleton, boxes: OwnBoxes | None) -> None:
        self.report, self.skeleton, self.boxes = report, skeleton, boxes

    def fill(self, draft: Draft, frame: Frame, file: Path) -> None:
        """Fills a frame with those of the draft's people that can be used.

        Args:
            draft: what the source says.
            frame: with its size.
            file: the picture.

        Raises:
            AnnotationError: the picture has another size than the source says, or a person is
                wrong and ``on_error`` is ``raise``.
        """
        size, stated = (frame.width, frame.height), (draft.width, draft.height)
        if None not in stated and stated != size:
            hint = "label the picture that is trained on, or scale the keypoints"
            if stated[::-1] == size:
                hint = "its orientation tag was applied by the labelling tool; save it turned"
            raise AnnotationError(
                f"{draft.where}: width, height: {stated[0]}×{stated[1]}, but {file} is "
                f"{size[0]}×{size[1]}; {hint}"
            )
        boxes = [] if self.boxes is None else self.boxes.of(draft, frame, file)
        tracks: Counter[int] = Counter()
        for position, person in enumerate(draft.people):
            where = f"{draft.where}: person {position} in {file.name}"
            tracks[person.track_id] += person.track_id >= 0
            if tracks[person.track_id] > 1:
                self.report.error(
                    "track id twice in a picture",
                    f"{where}: track id {person.track_id} occurs twice; a person has one pose",
                )
                continue
            checked = self._check_person(person, frame, boxes, where)
            if checked is not None:
                frame.people.append(checked)
        frame.ignore_regions = draft.regions
        frame.labeled = any(person.num_visible for person in frame.people)
        if draft.labeled is not None:
            frame.labeled = draft.labeled

    def _check_person(
        self, person: Person, frame: Frame, boxes: list[Box], where: str
    ) -> Person | None:
        assert frame.width is not None
        assert frame.height is not None
        pose = person.keypoints
        points, seen = pose[:, :2], pose[:, 2] > 0
        limits = np.array([frame.width - 0.5, frame.height - 0.5])
        outside = seen & ((points < -0.5) | (points > limits)).any(axis=1)
        for j in np.flatnonzero(outside):
            x, y = points[j]
            self.report.warn(
                "keypoint outside the picture",
                f"{where}: {self.skeleton.keypoints[j]} at ({x:g}, {y:g}), the picture is "
                f"{frame.width}×{frame.height}",
            )
        box: np.ndarray | None = person.box
        if person.box is NO_BOX:
            box = OwnBoxes.choose(boxes, person)
            if box is None and boxes:
                self.report.warn("no box of --boxes fits: made from the keypoints", where)
        elif min(person.box[2:]) <= 0:
            self.report.warn(
                "box of size zero: made from the keypoints", f"{where}: {person.box.tolist()}"
            )
            box = None
        if box is None:
            box = box_of_keypoints(pose, enlarge=1.3, margin=0.0) if seen.any() else None
        if box is None or box[2] <= 0 or box[3] <= 0:
            self.report.leave_out("person without a box, or keypoints to make one from", where)
            return None
        if not seen.any():
            self.report.warn("person without keypoints", where)
        if box[0] >= frame.width or box[1] >= frame.height or (box[:2] + box[2:] <= 0).any():
            self.report.error(
                "box outside the picture",
                f"{where}: bbox: {box.tolist()} (x, y, width, height) is outside the picture of "
                f"{frame.width}×{frame.height}",
            )
            return None
        return replace(person, box=box)

    def check_tracks(self, name: str, drafts: list[Draft]) -> None:
        """Warns of tracks that end and come back in a video, whose drafts are in order."""
        last: dict[int, int] = {}
        for index, draft in enumerate(d for d in drafts if d.people):
            for person in draft.people:
                track = person.track_id
                if track >= 0 and last.get(track, index) < index - 1:
                    self.report.warn(
                        "track id comes back after labelled frames without it",
                        f"{name}: track {track} at {draft.file_name or draft.number}",
                    )
                last[track] = index
