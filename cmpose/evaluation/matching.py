"""Which predicted frame belongs to which frame of the ground truth.

Frames without people in the ground truth are not scored, so they need no prediction; predicted
frames that the ground truth does not list are left out. What is certain is matched, by image id or
by file name; what could be meant in two ways is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Literal

from cmpose.data.formats.messages import folded, short
from cmpose.data.sequence import split_frame_name
from cmpose.evaluation.pose_files import FramePoses

Match = Literal["name", "order"]

_Key = tuple[str | int, ...]


@dataclass
class Matched:
    """The frames of a sequence that are scored.

    Attributes:
        by: what the frames were matched by.
        frames: position in the ground truth's file, ground truth, prediction; in that file's order.
        left_out: names of predicted frames that are not scored, for the ground truth lacks them.
        absent: how many frames of nobody in the ground truth have no prediction.
    """

    by: str
    frames: list[tuple[int, FramePoses, FramePoses]]
    left_out: list[str] = field(default_factory=list)
    absent: int = 0


def match_frames(
    truth: Sequence[FramePoses],
    predicted: Sequence[FramePoses],
    match: Match,
    truth_source: str,
    predicted_source: str,
) -> Matched:
    """Pairs the frames of a sequence.

    Args:
        truth: frames of the ground truth.
        predicted: frames of the prediction.
        match: ``name`` goes by image id, or by file name where the ids differ; ``order`` pairs
            the i-th with the i-th, as the official tool does.
        truth_source: the ground truth's name in messages.
        predicted_source: the prediction's.

    Raises:
        ValueError: by ``order`` the number of frames differs; by ``name`` a frame with people has
            no counterpart, or two, or another one by id than by name.
    """
    if match not in ("name", "order"):
        raise ValueError(f"match must be 'name' or 'order', got {match!r}")
    if match == "order":
        if len(truth) != len(predicted):
            raise ValueError(
                f"{predicted_source} has {len(predicted)} frames, the ground truth {truth_source} "
                f"{len(truth)}; by order every frame must be listed, those of nobody too"
            )
        pairs = zip(truth, predicted, strict=True)
        return Matched("order", [(i, real, guess) for i, (real, guess) in enumerate(pairs)])
    by, matched = _Matcher(truth, predicted, truth_source, predicted_source).match()
    used = set(matched.values())
    return Matched(
        by,
        [(i, truth[i], predicted[k]) for i, k in sorted(matched.items())],
        [_shown(frame) for k, frame in enumerate(predicted) if k not in used],
        len(truth) - len(matched),
    )


class _Matcher:
    """Tries one way to match frames after the other, the surest first."""

    def __init__(
        self,
        truth: Sequence[FramePoses],
        predicted: Sequence[FramePoses],
        truth_source: str,
        predicted_source: str,
    ) -> None:
        self.truth, self.predicted = truth, predicted
        self.truth_source, self.predicted_source = truth_source, predicted_source
        self.needed = [i for i, frame in enumerate(truth) if frame.annotated]
        self.guesses = [frame.name.replace("\\", "/") for frame in predicted]
        self.reals = [frame.name.replace("\\", "/") for frame in truth]
        self.named = all(self.guesses) and all(self.reals[i] for i in self.needed)

    def match(self) -> tuple[str, dict[int, int]]:
        """By what, and position in the ground truth → position in the prediction."""
        if not self.needed:
            return "nothing, as nobody is annotated", {}
        whole = self._by_keys(self.reals, lambda name: (name,)) if self.named else {}
        if self._is_whole(whole):
            same = self._by_id()
            agree = all(same.get(i) == whole[i] for i in self.needed)
            return "image id" if agree else "file name", whole
        readings = self._readings()
        by_id, clash = self._by_id(), ""
        if self._is_whole(by_id):
            clash = self._clash(by_id, readings)
            if not clash:
                return "image id", by_id
            if len(by_id) == len(self.predicted) == len(self.truth):
                raise ValueError(clash)
        if len(readings) > 1:
            raise ValueError(
                f"{self.predicted_source}: the frames of {self.truth_source} were numbered anew "
                f"when it was converted ({self._renumbered()}), and which numbers the predictions "
                "have cannot be told; predict all frames, or the data set's own folder of them"
            )
        if self.named:
            [reals] = readings
            for by, key in _RULES:
                matched = self._by_keys(reals, key)
                if self._is_whole(matched):
                    kind = "file name" if reals == self.reals else "file name in the source"
                    return kind + by, matched
        raise ValueError(clash or self._unmatched(readings[0]))

    def _is_whole(self, matched: Mapping[int, int]) -> bool:
        return all(i in matched for i in self.needed)

    def _by_id(self) -> dict[int, int]:
        ids = {str(frame.image_id): k for k, frame in enumerate(self.predicted)}
        return {
            i: ids[str(frame.image_id)]
            for i, frame in enumerate(self.truth)
            if frame.image_id is not None and str(frame.image_id) in ids
        }

    def _by_keys(self, reals: Sequence[str], key: Callable[[str], _Key]) -> dict[int, int]:
        """Frames whose key occurs once in the ground truth and once in the prediction."""
        theirs: dict[_Key, list[int]] = {}
        for k, name in enumerate(self.guesses):
            theirs.setdefault(key(name), []).append(k)
        ours: dict[_Key, int] = {}
        for i, name in enumerate(reals):
            ours[key(name)] = -1 if key(name) in ours else i
        return {
            i: theirs[each][0]
            for each, i in ours.items()
            if i >= 0 and len(theirs.get(each, ())) == 1
        }

    def _renumbered(self) -> str:
        """A frame that a conversion gave another number than its source has, empty without."""
        for i in self.needed:
            frame = self.truth[i]
            if frame.source_name and _number(frame.source_name) != _number(frame.name):
                name = PurePosixPath(self.reals[i]).name
                return f"{_cut(name)} was {_cut(frame.source_name)}"
        return ""

    def _readings(self) -> list[list[str]]:
        """The names by which the prediction may know the ground truth's frames.

        ``cmpose convert`` numbers frames from 0 and keeps the source's names beside. The numbers
        of the predicted frames tell which of both they are; the data set has 0 to nframes - 1.
        """
        sources = [frame.source_name.replace("\\", "/") or frame.name for frame in self.truth]
        if not self.named or not self._renumbered():
            return [self.reals]
        numbers = {_number(name) for name in self.guesses}
        nframes = self.truth[self.needed[0]].nframes
        if nframes is None:
            return [self.reals, sources]
        if numbers == set(range(nframes)):
            return [self.reals]
        if 0 not in numbers or not numbers <= set(range(nframes)):
            return [sources]
        return [self.reals, sources]

    def _clash(self, by_id: Mapping[int, int], readings: Sequence[Sequence[str]]) -> str:
        """What to say of a frame whose id leads to a frame of another name, empty if none does."""
        if not self.named:
            return ""
        parts = 1 if len({_tail(name, 1) for name in self.reals}) == len(self.reals) else 2
        for i in self.needed:
            other = self.guesses[by_id[i]]
            key = _loose(folded(other), parts)
            if all(_loose(folded(reals[i]), parts) != key for reals in readings):
                return (
                    f"{self.predicted_source}: image id {self.truth[i].image_id} is "
                    f"{_cut('/'.join(_tail(other, parts)))}, in the ground truth "
                    f"{self.truth_source} it is {_cut('/'.join(_tail(self.reals[i], parts)))}; "
                    "write the ground truth's ids and file names, or match frames by order"
                )
        return ""

    def _unmatched(self, reals: Sequence[str]) -> str:
        """Why frames cannot be matched: two have one name, some are missing, or all are."""
        matched = max(
            (self._by_keys(reals, key) if self.named else self._by_id() for _, key in _RULES),
            key=len,
        )
        missing = next(i for i in self.needed if i not in matched)
        name = _shown(self.truth[missing])
        if self.named:
            for _, key in reversed(_RULES):
                same = [n for n in self.guesses if key(n) == key(reals[missing])]
                if len(same) > 1:
                    return (
                        f"{self.predicted_source}: {name} of the ground truth {self.truth_source} "
                        f"may be {_cut(same[0])} or {_cut(same[1])}; write the ground truth's "
                        "file names or ids, or match frames by order"
                    )
        if matched:
            count = sum(i not in matched for i in self.needed)
            return (
                f"{self.predicted_source} has {len(self.predicted)} frames, and none for {count} "
                f"of {len(self.needed)} frames with people in the ground truth "
                f"{self.truth_source}, e.g. {name}; list every frame of the sequence, those of "
                "nobody too"
            )
        return (
            f"{self.predicted_source}: frames match the ground truth {self.truth_source} neither "
            f"by image id nor by file name (for example {name} is not among them); write the "
            "ground truth's ids and file names, or match frames by order"
        )


def _shown(frame: FramePoses) -> str:
    name = PurePosixPath(frame.name.replace("\\", "/")).name
    return _cut(name) if name else short(frame.image_id)


def _cut(name: str) -> str:
    """The end of a file's name, by which frames differ, at a length that fits in a message."""
    return name if len(name) <= 80 else "..." + name[-77:]


def _number(name: str) -> int | None:
    """The frame number in a name, or None; a longer run of digits is none."""
    parts = split_frame_name(name.replace("\\", "/"))
    return int(parts[1]) if parts is not None and len(parts[1]) <= 18 else None


def _tail(name: str, parts: int) -> tuple[str, ...]:
    """The last parts of a path: one survives a moved folder, two tell merged sequences apart."""
    return PurePosixPath(name).parts[-parts:]


def _stem(name: str, parts: int) -> _Key:
    *folders, file = _tail(name, parts)
    return (*folders, PurePosixPath(file).stem)


def _loose(name: str, parts: int) -> _Key:
    """A name without its extension and the zeros before its number."""
    *folders, stem = _stem(name, parts)
    pieces = split_frame_name(str(stem))
    if pieces is None:
        return (*folders, stem)
    before, digits, after = pieces
    return (*folders, before, digits.lstrip("0"), after)


_RULES: tuple[tuple[str, Callable[[str], _Key]], ...] = (
    ("", lambda name: _tail(name, 1)),
    (" and folder", lambda name: _tail(name, 2)),
    (" without extension", lambda name: _stem(name, 1)),
    (" without extension, and folder", lambda name: _stem(name, 2)),
    (" by number, without zeros and extension", lambda name: _loose(name, 1)),
    (" by number, without zeros and extension, and folder", lambda name: _loose(name, 2)),
    (" in any case, by number, without zeros and extension", lambda name: _loose(folded(name), 1)),
    (
        " in any case, by number, without zeros and extension, and folder",
        lambda name: _loose(folded(name), 2),
    ),
)
"""How names are compared, from the strictest on; what is said of it behind "file name"."""
