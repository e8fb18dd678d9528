"""Boxes that stay with their person: linked over frames, bridged, smoothed.

Three steps, none of which looks further ahead than ``bridge + smooth`` frames, so that a video of
any length, or a camera, is followed in constant memory:

1. *Link.* A box goes to the track that it overlaps most, by intersection over union with the
   track's last box or with where that box is now at the track's speed; best pairs first, nothing
   below ``min_overlap``. What is left begins a track.
2. *Bridge.* A person who is missing for up to ``bridge`` frames, because the detector missed them
   or was not run, gets boxes on the straight line between the two that were found. After a longer
   absence the track has ended.
3. *Smooth.* Every box becomes the mean of those of up to ``smooth`` frames on either side, equally
   many on both, in weights that fall linearly: a steady motion is left as it is, without lag.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import numpy as np

from cmpose.predict.detect import Detection, overlaps

T = TypeVar("T")

_SIGHTINGS = 5  # that a track's speed is taken from


class BoxTracker:
    """Gives boxes track ids, frame by frame."""

    def __init__(self, *, min_overlap: float = 0.1, bridge: int = 10) -> None:
        """
        Args:
            min_overlap: intersection over union that links.
            bridge: frames that a person may be missing for; after more the track ends.
        """
        self.min_overlap, self.bridge = min_overlap, bridge
        self._tracks: dict[int, deque[tuple[int, np.ndarray]]] = {}  # id → frames and boxes
        self._next_id = 0

    def update(self, frame: int, detections: Iterable[Detection]) -> list[Detection]:
        """A frame's detections with track ids, in their order; those that have one keep it.

        Args:
            frame: its number, larger than at the last call.
            detections: everybody who was found in it.
        """
        detections = list(detections)
        for track_id, sightings in list(self._tracks.items()):
            if frame - sightings[-1][0] - 1 > self.bridge:
                del self._tracks[track_id]
        named = {d.track_id for d in detections if d.track_id >= 0}
        self._next_id = max([self._next_id, *(i + 1 for i in named)])
        linked = self._link(frame, detections, named)
        seen = []
        for k, detection in enumerate(detections):
            track_id = linked.get(k, detection.track_id)
            if track_id < 0:
                track_id, self._next_id = self._next_id, self._next_id + 1
            sightings = self._tracks.setdefault(track_id, deque(maxlen=_SIGHTINGS))
            sightings.append((frame, detection.box))
            seen.append(replace(detection, track_id=track_id))
        return seen

    def _link(self, frame: int, detections: Sequence[Detection], named: set[int]) -> dict[int, int]:
        """Detection → track id, the largest overlaps first."""
        pairs = []
        for track_id, sightings in self._tracks.items():
            if track_id in named:
                continue
            here = sightings[-1][1], _moved(sightings, frame)
            pairs += [
                (max(overlaps(detection.box, box)[0] for box in here), k, track_id)
                for k, detection in enumerate(detections)
                if detection.track_id < 0
            ]
        linked: dict[int, int] = {}
        taken: set[int] = set()
        for overlap, k, track_id in sorted(pairs, key=lambda p: (-p[0], p[1], p[2])):
            if overlap >= self.min_overlap and k not in linked and track_id not in taken:
                linked[k] = track_id
                taken.add(track_id)
        return linked


def _moved(sightings: Sequence[tuple[int, np.ndarray]], frame: int) -> np.ndarray:
    """A track's last box, moved on at the track's speed."""
    (first, start), (last, end) = sightings[0], sightings[-1]
    if first == last:
        return end
    center_from, center_to = start[:2] + start[2:] / 2, end[:2] + end[2:] / 2
    step = (center_to - center_from) / (last - first) * (frame - last)
    return np.concatenate([end[:2] + step, end[2:]])


@dataclass
class _Entry(Generic[T]):
    item: T | None
    people: dict[int, Detection] = field(default_factory=dict)


def steady_boxes(
    frames: Iterable[tuple[T, Sequence[Detection] | None]], *, bridge: int = 10, smooth: int = 2
) -> Iterator[tuple[T, list[Detection]]]:
    """Frames with their people linked, bridged and smoothed; up to ``bridge + smooth`` late.

    Args:
        frames: whatever stands for a frame, and who was found in it, or None where nobody looked.
        bridge: frames that a person may be missing for.
        smooth: frames on either side that a box is averaged over; 0 leaves boxes as they are.
    """
    tracker = BoxTracker(bridge=bridge)
    last: dict[int, tuple[int, Detection]] = {}  # track → where it was seen last
    # From `smooth` frames before the next to be handed on to the newest.
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

    for item, found in frames:
        entries.append(_Entry(item))
        number += 1
        for detection in tracker.update(number, found) if found is not None else ():
            before, seen = last.get(detection.track_id, (number, detection))
            if 1 < number - before <= bridge + 1:
                for frame in range(before + 1, number):
                    at(frame).people[detection.track_id] = _between(
                        seen, detection, (frame - before) / (number - before)
                    )
            entries[-1].people[detection.track_id] = detection
            last[detection.track_id] = number, detection
        last = {i: (n, d) for i, (n, d) in last.items() if number - n <= bridge}
        if number - next_out >= bridge + smooth:
            yield hand_on()
    while next_out <= number:
        yield hand_on()


def _between(a: Detection, b: Detection, share: float) -> Detection:
    return Detection(
        (1 - share) * a.box + share * b.box,
        (1 - share) * a.score + share * b.score,
        a.track_id,
        interpolated=True,
    )
