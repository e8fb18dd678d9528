"""The people of a conversion: what is checked, and where their boxes come from."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from cmpose.convert.boxes import Box, OwnBoxes
from cmpose.convert.report import ConvertReport
from cmpose.convert.sources import NO_BOX, Draft
from cmpose.data.sequence import AnnotationError, Frame, Person, box_of_keypoints
from cmpose.data.skeleton import Skeleton

_LEAST = 2.0
"""A label's box of so many pixels, or fewer, in width or height is no person's."""


class People:
    """Checks the people of drafts and puts those that can be used into frames."""

    def __init__(self, report: ConvertReport, skeleton: Skeleton, boxes: OwnBoxes | None) -> None:
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
            raise AnnotationError(
                f"{draft.where}: width, height: {stated[0]}×{stated[1]}, but {file} is "
                f"{size[0]}×{size[1]}; label the picture that is trained on, or scale the keypoints"
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
            checked = self._check_person(person, frame, boxes, where, draft.boxes_are_made)
            if checked is not None:
                frame.people.append(checked)
        frame.ignore_regions = draft.regions
        frame.labeled = any(person.num_visible for person in frame.people)
        if draft.labeled is not None:
            frame.labeled = draft.labeled

    def _check_person(
        self, person: Person, frame: Frame, boxes: list[Box], where: str, box_is_made: bool
    ) -> Person | None:
        assert frame.width is not None
        assert frame.height is not None
        pose = person.keypoints
        points, visible = pose[:, :2], pose[:, 2] > 0
        limits = np.array([frame.width - 0.5, frame.height - 0.5])
        outside = visible & ((points < -0.5) | (points > limits)).any(axis=1)
        for j in np.flatnonzero(outside):
            x, y = points[j]
            self.report.warn(
                "keypoint outside the picture",
                f"{where}: {self.skeleton.keypoints[j]} at ({x:g}, {y:g}), the picture is "
                f"{frame.width}×{frame.height}",
            )
        box = self._box(person, boxes, where, box_is_made)
        if box is None or box[2] <= 0 or box[3] <= 0:
            self.report.leave_out("person without a box, or keypoints to make one from", where)
            return None
        if not visible.any():
            self.report.warn("person without keypoints", where)
        if box[0] >= frame.width or box[1] >= frame.height or (box[:2] + box[2:] <= 0).any():
            self.report.error(
                "box outside the picture",
                f"{where}: bbox: {box.tolist()} (x, y, width, height) is outside the picture of "
                f"{frame.width}×{frame.height}",
            )
            return None
        return replace(person, box=box)

    def _box(
        self, person: Person, boxes: list[Box], where: str, is_made: bool
    ) -> np.ndarray | None:
        """A person's box: the label's, else one of ``--boxes``, else that of the keypoints.

        Labelling tools write a box of zeros where nobody drew one, or the extent of the keypoints,
        which is a point or a line where there are few of them: that says nothing of the person.
        """
        is_labelled = not is_made and person.box is not NO_BOX
        if is_labelled and min(person.box[2:]) > _LEAST:
            return person.box
        box = OwnBoxes.choose(boxes, person)
        if box is None and boxes:
            self.report.warn("no box of --boxes fits: made from the keypoints", where)
        if is_labelled:
            instead = "made from the keypoints" if box is None else "one of --boxes is taken"
            self.report.warn(f"box of size zero: {instead}", f"{where}: {person.box.tolist()}")
        if box is not None or not person.num_visible:
            return box
        return person.box if is_made else box_of_keypoints(person.keypoints, 1.3, 0.0)

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
