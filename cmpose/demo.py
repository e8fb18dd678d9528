"""``make demo``: render, train, evaluate on held-out clips, predict with pictures."""

from __future__ import annotations

import json
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from cmpose import config as configuration
from cmpose.data.formats.posetrack import load_annotations
from cmpose.data.pictures import picture_size, read_picture
from cmpose.data.video_writer import video_writer
from cmpose.evaluation.evaluate import score_mean_pose
from cmpose.files import claim, write_metrics, write_text
from cmpose.models.weights import packaged
from cmpose.predict.predict import predict_video
from cmpose.render.dataset import render_dataset
from cmpose.render.settings import Difficulty
from cmpose.report.report import report
from cmpose.train.train import train

TRAIN_VIDEOS, VAL_VIDEOS, FRAMES, SEED = 96, 24, 12, 2026
FPS = 12.5
"""Fewer frames a second than a camera takes, so that as many pictures show more different poses."""

DIFFICULTY = Difficulty(
    occluders=0.1, defocus=0.1, background_defocus=0.1, crossing=0.1, closeup=0.0, motion_blur=0.1
)
"""Easier than the default, because there are only minutes to learn in."""


def write_video(frames: list[Path], path: Path, fps: float) -> Path:
    """Writes JPEG frames as an MP4, for ``cmpose predict`` to read."""
    with video_writer(path, picture_size(frames[0]), fps) as writer:
        for frame in frames:
            writer.write(read_picture(frame))
    return path


def _showcase(data: Path) -> tuple[Path, Path]:
    """Writes a held-out sequence of several people as a video, and their boxes as detections."""
    sequences = load_annotations("annotations/val", data)
    chosen = max(sequences, key=lambda s: min(len(frame.people) for frame in s.frames))
    frames = [data / frame.file_name for frame in chosen.frames]
    video = write_video(frames, data / f"{chosen.name}.mp4", FPS)
    boxes = [
        {"frame": i, "bbox": person.box.tolist(), "score": 1.0, "track_id": person.track_id}
        for i, frame in enumerate(chosen.frames)
        for person in frame.people
    ]
    detections = data / f"{chosen.name}_boxes.json"
    write_text(detections, json.dumps(boxes))
    return video, detections


def render(data: Path) -> None:
    """Renders the demo's training and held-out clips into ``data``; what is there is kept."""
    for split, videos in (("train", TRAIN_VIDEOS), ("val", VAL_VIDEOS)):
        summary = render_dataset(
            data,
            videos=videos,
            frames=FRAMES,
            seed=SEED,
            split=split,
            max_people=3,
            fps=FPS,
            difficulty=DIFFICULTY,
            workers=2,
        )
        print(f"     {summary}")


def demo(output: str | Path, recipe: str | Path | None = None) -> dict[str, Any]:
    """Renders clips, trains a small CM-Pose, evaluates it and explains it, below ``output``.

    What is there already, from a demo that was stopped, is kept.

    Args:
        output: a folder.
        recipe: a YAML file; None is the package's ``demo.yaml``.

    Returns:
        What ``metrics.json`` there holds: ``ap`` on held-out clips, ``mean_pose_ap``,
        ``box_source``, ``seconds``, ``clips_per_second``.

    Raises:
        InUse: another process runs the demo in ``output``.
        OutputError: when something cannot be written.
    """
    output = Path(output)
    with claim(output, "demo", "--output"):
        return _demo(output, recipe)


def _demo(output: Path, recipe: str | Path | None) -> dict[str, Any]:
    started = time.perf_counter()
    config = configuration.load(recipe or str(files("cmpose.configs") / "demo.yaml"))
    data = output / "data"
    config.data.root = str(data)
    print("1/4  render people: training and held-out clips")
    render(data)
    print("2/4  train a small CM-Pose on them")
    run = output / "train"
    metrics = train(config, run, resume=run.exists())
    print("3/4  the same boxes, always answering the mean pose")
    baseline, _ = score_mean_pose(config, output / "mean_pose")
    print("4/4  predict a held-out clip, with pictures of what each pose was read from")
    video, boxes = _showcase(data)
    shown = predict_video(
        video, run, output / "predict", detections=boxes, explain=True, overwrite=True
    )
    trained_longer = output / f"predict_{packaged.default()}"
    predict_video(
        video, packaged.default(), trained_longer, detections=boxes, progress=False, overwrite=True
    )
    metrics |= {
        "mean_pose_ap": baseline.to_json(),
        "training_seconds": metrics["seconds"],
        "seconds": time.perf_counter() - started,
    }
    write_metrics(output, metrics)
    page, other = report(run), report(output / "predict")
    ap, mean = metrics["ap"]["columns"]["Mean"], baseline.mean
    print(
        f"\nheld-out AP {ap:.1f} %, always answering the mean pose {mean:.1f} % "
        f"(official PoseTrack AP, mean of 15 joints; boxes: {metrics['box_source']})\n"
        f"pictures    {output / 'predict' / 'explain'} ({len(shown['explained'])} files)\n"
        f"video       {output / 'predict' / (video.stem + '_poses.mp4')}\n"
        f"            {trained_longer / (video.stem + '_poses.mp4')}: by the model that comes "
        "along, which has learned for longer\n"
        f"model       {run / 'model'}\n"
        f"metrics     {output / 'metrics.json'}\n"
        f"report      {page}: curves, AP, worst and best clips, tokens; opens in any browser\n"
        f"            {other}: the same of the prediction\n"
        f"{metrics['seconds']:.0f} s in all"
    )
    return metrics
