"""What ``cmpose predict`` costs: ``python -m bench.predict``, on any machine.

Frames a second for 1, 2, 4 and 8 people in each frame, and the milliseconds a frame that every
part takes, by ``predict_video``'s own clock, on one thread. Boxes come from a file, so the detector
is measured by itself. The video is rendered here, 1280×720; weights are random, which changes no
time. The first of two runs warms up. ``--save`` renews ``bench/results/cpu/predict.json`` and the
table of ``docs/predict.md``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import torch

from bench.harness import records
from bench.harness.timing import Clock, one_after_another
from bench.report.tables import origin, rendered, table
from cmpose.config import Config, ModelConfig
from cmpose.data.pictures import read_picture
from cmpose.demo import write_video
from cmpose.files import write_text
from cmpose.models.cmpose import CMPose
from cmpose.models.weights import checkpoint
from cmpose.predict.detectors.detect import detect_people
from cmpose.predict.predict import predict_video
from cmpose.provenance import PROJECT, provenance
from cmpose.render.dataset import render_dataset

RECORD = records.RESULTS / "cpu" / "predict.json"
PAGE = PROJECT / "docs" / "predict.md"
PEOPLE = (1, 2, 4, 8)
SIZE = (720, 1280)
PARTS = ("decode", "crop", "model", "draw", "encode")
TINY = ModelConfig(backbone="tiny", depth=3, image_size=(128, 96), mlp_ratio=2.0,
                   tokens_per_keypoint=1, num_clusters=12, head_channels=128)  # fmt: skip
MODELS = {"tiny, 128×96": (TINY, 60), "ViT-B, 256×192": (ModelConfig(), 3)}
"""The demo's model, and the paper's; and the frames that each is measured on."""

HEAD = ("model", "people", "frames/s", "people/s", *(f"{part}, ms" for part in (*PARTS, "rest")))


def cells(row: records.Record) -> list[str]:
    """A row of the table."""
    rates = f"{row['fps']:.2f}", f"{row['fps'] * row['people']:.2f}"
    parts = (f"{row['ms'][part]:.1f}" for part in (*PARTS, "rest"))
    return [row["model"], str(row["people"]), *rates, *parts]


def make_video(folder: Path, frames: int) -> tuple[Path, list[Path]]:
    """Rendered people as an MP4, and its frames."""
    render_dataset(
        folder / "data", videos=1, frames=frames, seed=1, size=SIZE, split="val", progress=False
    )
    files = sorted((folder / "data" / "images").rglob("*.jpg"))
    return write_video(files, folder / "video.mp4", 25), files


def measure(folder: Path, video: Path, model: str, people: int, frames: int) -> records.Record:
    """The second of two runs over the video's first frames, as the record holds it.

    Boxes are of standing people side by side, a third of the picture high, who walk slowly.
    """
    (height, width), boxes = SIZE, folder / "boxes.json"
    size = [0.15 * height, 0.4 * height]
    places = [
        {"frame": n, "bbox": [(i + 0.2) * width / people + n, 0.3 * height, *size], "track_id": i}
        for n in range(frames)
        for i in range(people)
    ]
    boxes.write_text(json.dumps(places))
    metrics: dict[str, Any] = {}
    for count in (1, frames):
        metrics = predict_video(
            video, folder / model, folder / "out", detections=boxes, max_frames=count,
            device="cpu", overwrite=True, progress=False,
        )  # fmt: skip
    frames, fps = metrics["frames"], metrics["frames_per_second"]
    ms = {part: 1e3 * metrics["seconds_by_part"].get(part, 0.0) / frames for part in PARTS}
    ms["rest"] = 1e3 * metrics["seconds"] / frames - sum(ms.values())
    return {"model": model, "people": people, "frames": frames, "fps": fps, "ms": ms}


def detector_ms(files: list[Path]) -> float:
    """Milliseconds of one run of the people detector."""
    pictures = [read_picture(file) for file in files[:8]]
    runs = [partial(detect_people, picture) for picture in pictures]
    runs[0]()
    return 1e3 * Clock().wall(partial(one_after_another, runs)) / len(runs)


def report(record: dict[str, Any]) -> str:
    """The table and where it is from, as the document has them."""
    more = f"{record['threads']} thread(s)", f"OpenCV {record['opencv']}"
    where = origin(record["provenance"], *more)
    detector = f"One run of the people detector: {record['detector_ms']:.0f} ms."
    return f"{table(HEAD, map(cells, record['rows']))}\n\n{where}. {detector}"


def main(arguments: list[str] | None = None) -> None:
    """Prints the table as Markdown, and writes the record."""
    parser = argparse.ArgumentParser(prog="python -m bench.predict")
    parser.add_argument("--save", action="store_true", help="renew the record and docs/predict.md")
    args = parser.parse_args(arguments)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        video, files = make_video(folder, max(frames for _, frames in MODELS.values()))
        for model, (config, frames) in MODELS.items():
            recipe = Config(model=config)
            recipe.train.precision = "fp32"
            torch.manual_seed(0)
            checkpoint.save(folder / model, "model", CMPose(recipe.model).state_dict(), recipe)
            for people in PEOPLE:
                rows.append(measure(folder, video, model, people, frames))
                print(*cells(rows[-1]), flush=True)
        detector = detector_ms(files)
    record = {"benchmark": "predict", "provenance": provenance(), "threads": 1,
              "opencv": cv2.__version__, "frame_size": list(SIZE), "detector_ms": detector,
              "rows": rows}  # fmt: skip
    if args.save:
        records.save(RECORD, record, records.Prediction)
        write_text(PAGE, rendered(PAGE.read_text(), {"predict": report(record)}))
    print(f"\n{report(record)}")


if __name__ == "__main__":
    main()
