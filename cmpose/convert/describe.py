"""A sequence of the new data set from its pictures and what the source says of them."""

from __future__ import annotations

from cmpose.convert.grouping import PictureSequence
from cmpose.convert.options import ConvertOptions
from cmpose.convert.people import People
from cmpose.convert.pictures import placed_name
from cmpose.convert.report import ConvertReport
from cmpose.convert.upright import upright_draft
from cmpose.data.pictures import FrameError, check_picture
from cmpose.data.sequence import AnnotationError, Frame, Sequence
from cmpose.data.skeleton import Skeleton

_ID_STEP = 10**8


class Describer:
    """Makes sequences.

    Args:
        options: ``split``, which is part of file names, and ``exif``.
        skeleton: of the people.
        people: checks the people of each picture.
        report: is told of unreadable pictures.
        keep_ids: image ids are the source's; else position of the sequence, from 1, · 10⁸ + frame.
    """

    def __init__(
        self,
        options: ConvertOptions,
        skeleton: Skeleton,
        people: People,
        report: ConvertReport,
        *,
        keep_ids: bool,
    ) -> None:
        self.options, self.skeleton, self.people, self.report = options, skeleton, people, report
        self.keep_ids = keep_ids

    def sequence(self, pictures: PictureSequence, position: int) -> Sequence | None:
        """The sequence; None if a listed picture is unreadable and ``on_error`` is ``skip``.

        Raises:
            AnnotationError: pictures are unreadable or of several sizes, or people are wrong.
        """
        name, first = pictures.name, pictures.pictures[0]
        frames, size = [], None
        for index, picture in enumerate(pictures.pictures):
            draft = pictures.drafts.get(picture)
            try:
                header = check_picture(picture)
            except FrameError as error:
                if draft is None:
                    raise AnnotationError(f"{error}; it is a neighbour in {name}") from error
                self.report.error("picture unreadable", str(error))
                return None
            own_size = header.size
            size = size or own_size
            if header.orientation != 1:
                self.report.warn("orientation tag: written upright, without it", str(picture))
            if own_size != size:
                raise AnnotationError(
                    f"{picture}: is {own_size[0]}×{own_size[1]} pixels, {first.name} of the same "
                    f"sequence {size[0]}×{size[1]}; frames of a video have one size: --group still "
                    "if it is none"
                )
            if draft is not None:
                draft = upright_draft(draft, picture, header, self.options.exif, self.skeleton)
                frame = Frame(
                    image_id=draft.image_id if self.keep_ids else index + position * _ID_STEP,
                    file_name=f"images/{self.options.split}/{name}/{placed_name(index, picture)}",
                    index=index,
                    width=size[0],
                    height=size[1],
                    extra={"source": draft.file_name if draft.number is None else picture.name},
                )
                self.people.fill(draft, frame, picture)
                frames.append(frame)
        nframes = len(pictures.pictures)
        return Sequence(name, name, frames, nframes=nframes, source=name, skeleton=self.skeleton)
