"""Gives boxes track ids, fills short gaps of a track, and smooths it.

There are three steps. None looks further ahead than ``bridge + smooth`` frames, so that memory is
constant for a video of any length and for a camera:

1. *Link.* A box is given to the track that it overlaps most. The overlap is the intersection over
   union with the track's last box, or with that box moved on at the track's speed, whichever is
   larger. The best pairs come first; pairs below ``min_overlap`` are not linked. A box without a
   track begins one.
2. *Bridge.* The detector may miss a person, or not be run, for up to ``bridge`` frames in a row.
   The person then gets boxes on the straight line between the box before and the box after. After
   a longer absence the track has ended.
3. *Smooth.* Every box becomes a weighted mean over up to ``smooth`` frames on either side, as many
   before as after. Weights fall linearly with the distance, so that a steady motion stays as it is
   and nothing lags behind.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import numpy as np

from cmpose.predict.detectors.detect import Detection, overlaps

T = TypeVar("T")

_SIGHTINGS = 5
"""A track's speed is measured over so many of its last boxes."""


class BoxTracker:
    """Gives boxes track ids, frame by frame."""

    def __init__(self, *, min_overlap: float = 0.1, bridge: int = 10) -> None:
        """
        Args:
            min_overlap: the least intersection over union at which a box is given to a track.
            bridge: how many frames a person may be missing; after more the track ends.
        """
        self.min_overlap, self.bridge = min_overlap, bridge
        self._tracks: dict[int, deque[tuple[int, np.ndarray]]] = {}  # id → frames and boxes
        self._next_id = 0

    def update(self, frame: int, detections: Iterable[Detection]) -> list[Detection]:
        """Gives a frame's detections track ids. Those that have one keep it.

        Args:
            frame: its number, larger than at the last call.
            detections: of everybody in it.

        Returns:
            The detections with track ids, in the order given.
        """
        detections = list(detections)
        for track_id, sightings in list(self._tracks.items()):
            if frame - sightings[-1][0] - 1 > self.bridge:
                del self._tracks[track_id]
        named = {d.track_id for d in detections if d.track_id >= 0}
        self._next_id = max([self._next_id, *(i + 1 for i in named)])
        linked = self._link(frame, detections, named)
        tracked = []
        for k, detection in enumerate(detections):
            track_id = linked.get(k, detection.track_id)
            if track_id < 0:
                track_id, self._next_id = self._next_id, self._next_id + 1
            sightings = self._tracks.setdefault(track_id, deque(maxlen=_SIGHTINGS))
            sightings.append((frame, detection.box))
            tracked.append(replace(detection, track_id=track_id))
        return tracked

    def _link(self, frame: int, detections: Sequence[Detection], named: set[int]) -> dict[int, int]:
        """Index of a detection → track id. The largest overlaps are linked first."""
        pairs = []
        for track_id, sightings in self._tracks.items():
            if track_id in named:
                continue
            last_boxes = sightings[-1][1], _moved(sightings, frame)
            pairs += [
                (max(overlaps(detection.box, box)[0] for box in last_boxes), k, track_id)
                for k, detection in enumerate(detections)
                if detection.track_id < 0
            ]
        linked: dict[int, int] = {}
        linked_tracks: set[int] = set()
        for overlap, k, track_id in sorted(pairs, key=lambda p: (-p[0], p[1], p[2])):
            if overlap >= self.min_overlap and k not in linked and track_id not in linked_tracks:
                linked[k] = track_id
                linked_tracks.add(track_id)
        return linked


def _moved(sightings: Sequence[tuple[int, np.ndarray]], frame: int) -> np.ndarray:
    """A track's last box [4], moved on to ``frame`` at the track's speed."""
    (first, start), (last, end) = sightings[0], sightings[-1]
    if first == last:
        return end
    center_from, center_to = start[:2] + start[2:] / 2, end[:2] + end[2:] / 2
    step = (center_to - center_from) / (last - first) * (frame - last)
    return np.concatenate([end[:2] + step, end[2:]])


@dataclass
class _Entry(Generic[T]):
    """A frame that waits, and its people by track id."""

    item: T | None
    people: dict[int, Detection] = field(default_factory=dict)


def steady_boxes(
    frames: Iterable[tuple[T, Sequence[Detection] | None]], *, bridge: int = 10, smooth: int = 2
) -> Iterator[tuple[T, list[Detection]]]:
    """Frames with their people linked, bridged and smoothed.

    A frame comes out when up to ``bridge + smooth`` later ones have gone in.

    Args:
        frames: an object of any kind for each frame, and the frame's detections, or None if the
            detector was not run on it.
        bridge: how many frames a person may be missing and still gets boxes.
        smooth: boxes are averaged over so many frames before and after; 0 leaves them as they are.

    Returns:
        Each object with the people of its frame.
    """
    tracker = BoxTracker(bridge=bridge)
    last: dict[int, tuple[int, Detection]] = {}  # track id → the frame it was last seen in
    # Frames that are still needed: `smooth` before the next one to be handed on, up to the newest.
    entries: deque[_Entry[T]] = deque()
    number, next_out = -1, 0

    def at(frame: int) -> _Entry[T]:
        return entries[frame - (number - len(entries) + 1)]

    def hand_on() -> tuple[T, list[Detection]]:
        nonlocal next_out
        entry = at(next_out)
        oldest = number - len(entries) + 1
        people = []
        for track_id, detection in entry.people.items():
            reach = 0
            while (
                reach < smooth
                and next_out - reach - 1 >= oldest
                and next_out + reach + 1 <= number
                and track_id in at(next_out - reach - 1).people
                and track_id in at(next_out + reach + 1).people
            ):
                reach += 1
            if reach:
                around = range(-reach, reach + 1)
                boxes = [at(next_out + d).people[track_id].box for d in around]
                weights = [reach + 1 - abs(d) for d in around]
                detection = replace(detection, box=np.average(boxes, axis=0, weights=weights))
            people.append(detection)
        item, entry.item = entry.item, None
        next_out += 1
        while number - len(entries) + 1 < next_out - smooth:
            entries.popleft()
        return item, people  # type: ignore[return-value]

    for item, detections in frames:
        entries.append(_Entry(item))
        number += 1
        for detection in tracker.update(number, detections) if detections is not None else ():
            before, earlier = last.get(detection.track_id, (number, detection))
            if 1 < number - before <= bridge + 1:
                for frame in range(before + 1, number):
                    at(frame).people[detection.track_id] = _between(
                        earlier, detection, (frame - before) / (number - before)
                    )
            entries[-1].people[detection.track_id] = detection
            last[detection.track_id] = number, detection
        last = {i: (n, d) for i, (n, d) in last.items() if number - n <= bridge}
        if number - next_out >= bridge + smooth:
            yield hand_on()
    while next_out <= number:
        yield hand_on()


def _between(a: Detection, b: Detection, share: float) -> Detection:
    """The box on the straight line from ``a`` (share 0) to ``b`` (share 1)."""
    return Detection(
        (1 - share) * a.box + share * b.box,
        (1 - share) * a.score + share * b.score,
        a.track_id,
        interpolated=True,
    )
