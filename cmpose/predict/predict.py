"""``cmpose predict``: the poses of the people in a video, and what is written of them.

``PoseStream`` gives the frames with their poses, ``FrameWriter`` writes each group of them before
the next is begun, and the result files are written from the journal in the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any

from cmpose.data.video import Source, Video, VideoFrame, VideoInfo, open_video
from cmpose.data.video_writer import note_of_encoder
from cmpose.files import Interrupted, OutputError, stop_requests
from cmpose.predict.clock import Clock
from cmpose.predict.detectors.detect import VideoDetections
from cmpose.predict.journal import Journal, open_journal
from cmpose.predict.options import Options, settings_of, settle
from cmpose.predict.outputs import OutputsError, missing_results, refuse_others
from cmpose.predict.people import find_people
from cmpose.predict.predictor import Predictor
from cmpose.predict.progress import Progress
from cmpose.predict.results import metrics_of, summary, write_last_metrics, write_results
from cmpose.predict.stream import PoseStream
from cmpose.predict.window import DesktopWindow
from cmpose.predict.write import FrameWriter


def predict_video(
    video: Source,
    checkpoint_path: str | Path | Predictor,
    out: str | Path,
    *,
    overwrite: bool = False,
    device: str = "auto",
    progress: bool = True,
    show: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Poses of the people in a video.

    A run that was interrupted goes on where it stopped when it is called with the same arguments,
    and gives the same poses as one that was not. A camera or stream cannot be read again: its
    results are then written from what there is.

    Args:
        video: whatever ``open_video`` opens.
        checkpoint_path: a run's folder or a checkpoint; or the model of one.
        out: gets ``poses/NAME.json`` (PoseTrack18's format), ``coco/NAME.json`` (COCO's results),
            ``NAME_poses.mp4`` with skeletons (of a picture alone, a picture), ``metrics.json``,
            with ``explain`` ``explain/NAME_FRAME_TRACK.png``; and ``journal/NAME/`` with what was
            done so far.
        overwrite: throws away what an earlier run left for this video, finished or not.
        device: ``auto``, ``cpu`` or ``cuda``; a model is where it is.
        progress: shows a progress bar, and prints a summary.
        show: also shows the drawn frames in a window; closing it stops the prediction.
        options: the fields of ``Options``.

    Returns:
        What ``metrics.json`` holds: frames, people, tracks, box_source, boxes left out, seconds,
        rates, and the seconds that each part took.

    Raises:
        VideoError: a video that cannot be read or written.
        WindowError: ``show`` where there is no display.
        ValueError: a bad option or detection file, or frames to explain that are not there.
        CheckpointError: no usable checkpoint.
        OutputsError: a result would replace an input, a link, or, without ``overwrite``, a file
            that no journal in ``out`` says is of cmpose predict; or results of a run that is done
            are missing.
        JournalError: ``out`` holds a run of this video with other settings.
        InUse: another process predicts this video into ``out``.
        Interrupted: on SIGINT or SIGTERM; what was done is kept. A camera just ends.
        OutputError: a full disk and the like; what was done is kept.
    """
    named: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}
    chosen = Options(**named)
    chosen.check()
    out = Path(out)
    predictor = _loaded(checkpoint_path, device, chosen)
    with ExitStack() as stack:
        window = stack.enter_context(DesktopWindow(f"{video}: poses")) if show else None
        source = stack.enter_context(open_video(video, fps=chosen.fps, on_error=chosen.on_error))
        clock = Clock()
        with clock("decode"):
            source.scan(chosen.max_frames)
        info = source.info
        if progress:
            _say_notes(info, chosen)
        detections, chosen = settle(chosen, info)
        weights = predictor.folder
        settings = settings_of(source, predictor.config, predictor.device.type, chosen, weights)
        inputs = [*source.files(), *(path for path in weights.iterdir() if path.is_file())]
        if isinstance(chosen.detections, str | Path):
            inputs.append(Path(chosen.detections))
        refuse_others(out, info, chosen, inputs, overwrite=overwrite)
        folder = out / "journal" / info.name
        journal = stack.enter_context(open_journal(folder, settings, overwrite=overwrite))
        if journal.finished is not None:
            return _finished(journal.finished, info, out, chosen, progress=progress)
        if journal.dropped and progress:
            print(f"note: {journal.dropped}")
        stop = stack.enter_context(stop_requests())
        stack.enter_context(_saying_what_is_kept(journal))
        return _predict(
            *(predictor, source, journal, out, chosen, detections, clock, stop, window),
            progress=progress,
        )


_HOG_NOTE = (
    "people are looked for by OpenCV's HOG detector, the last resort: it misses many people, those "
    "who crouch, embrace, are small or cut off, and finds some where nobody is; see --detector and "
    "--detections in docs/predict.md#whose-poses"
)


def _say_notes(info: VideoInfo, options: Options) -> None:
    """Prints what a user should know before frames are predicted."""
    to_draw = "video" in options.outputs and not info.picture
    hog = options.detections is None and options.detector is None
    for note in (
        *(info.cut_off, *info.notes, note_of_encoder() if to_draw else ""),
        _HOG_NOTE if hog else "",
    ):
        if note:
            print(f"note: {note}")


@contextmanager
def _saying_what_is_kept(journal: Journal) -> Iterator[None]:
    """Adds to the message of a failure what is in the journal, and how to go on."""
    try:
        yield
    except OutputError as error:
        if not journal.path.exists():  # it was deleted
            raise
        failure = OutputError(
            f"{error}; the poses of {journal.done} frames are kept in {journal.folder}, the same "
            "command goes on from them"
        )
        failure.errno = error.errno
        raise failure from error


def _finished(
    metrics: dict[str, Any], info: VideoInfo, out: Path, options: Options, *, progress: bool
) -> dict[str, Any]:
    """The metrics of a run that is done; raises OutputsError if results of it are gone."""
    if missing := missing_results(out, info, options, metrics):
        others = f", and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise OutputsError(
            f"{missing[0]}: is missing{others}, though the prediction of {info.source} was done; "
            "--overwrite does it anew"
        )
    if not (out / "metrics.json").exists():
        write_last_metrics(out, metrics)
    if progress:
        print(f"{info.source} is done already, in {out}; --overwrite does it anew")
    return metrics


def _loaded(model: str | Path | Predictor, device: str, options: Options) -> Predictor:
    predictor = model if isinstance(model, Predictor) else Predictor.load(model, device)
    if (options.explain or options.explain_frames) and predictor.model.fine is None:
        raise ValueError(
            "--explain needs a model with Fine Token Enhancement; this one has model.fine=off"
        )
    return predictor


# Many parameters: all that a prediction needs, once it is settled.
def _predict(
    predictor: Predictor,
    video: Video,
    journal: Journal,
    out: Path,
    options: Options,
    detections: VideoDetections | None,
    clock: Clock,
    stop: Event,
    window: DesktopWindow | None,
    *,
    progress: bool,
) -> dict[str, Any]:
    """Predicts the frames that the journal lacks, draws all, and writes the results."""
    info, start = video.info, journal.done
    writer = FrameWriter(predictor, info, out, journal, options, clock, window)
    if (journal.ended and not writer.to_draw) or (info.live and start):
        for frame in journal.frames():
            writer.count(frame)
    else:
        bar = Progress(info, options.max_frames, start, shown=progress)
        with writer.drawing(), closing(bar):
            # The network needs the pictures of some frames before the first that is to be done.
            reach = predictor.config.model.num_frames // 2
            skip = 0 if writer.to_draw else max(0, start - reach)
            frames = clock.each("decode", islice(video.frames(skip), options.max_frames))
            if info.live:
                frames = _until(stop, frames)
            people = find_people(frames, journal.frames(), detections, options, clock)
            for group in PoseStream(predictor, info, options, clock).groups(people):
                writer.write(group)
                if window is not None and window.closed and not info.picture:
                    stop.set()
                bar.update(group[-1].number)
                if stop.is_set() and not info.live:
                    raise Interrupted(
                        f"stopped after {journal.done} of {info.frames or '?'} frames; their poses "
                        f"are kept in {journal.folder}, the same command goes on from them"
                        f"{writer.drawn_so_far()}"
                    )
    if not journal.ended:
        journal.end()
    with clock("write results"):
        skeleton = predictor.model.skeleton
        write_results(out, video, journal, options, predictor.config, skeleton)
    metrics = metrics_of(info, options, journal.done, start, writer.totals, detections, clock)
    write_last_metrics(out, metrics)
    journal.finish(metrics)
    if progress:
        print(summary(metrics, out, [info.number(frame) for frame in writer.explainer.pending]))
    if window is not None and info.picture:
        window.wait()
    return metrics


def _until(stop: Event, frames: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
    """The frames of a camera until it is told to stop."""
    for frame in frames:
        yield frame
        if stop.is_set():
            return
