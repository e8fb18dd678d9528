"""Generates the model card: what is known of a model. What is not known is called unknown."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cmpose import __version__
from cmpose.config import Config

_HEAD = """\
---
library_name: cmpose
pipeline_tag: keypoint-detection
tags: [human-pose-estimation, video, cm-pose, posetrack]
license: unknown
---

# CM-Pose, ViT {backbone}

2-D pose of a person in the middle one of {frames} video frames, {height}×{width} crops,
{keypoints} joints ([CM-Pose](https://arxiv.org/abs/2501.14356)).

```python
from cmpose.models.cmpose import CMPose

model = CMPose.from_pretrained("DIR")           # this folder
heatmaps = model(clips).heatmaps                # clips [B, {frames}, 3, {height}, {width}]
```

`cmpose predict VIDEO --checkpoint DIR --out OUT` runs it on a video, `cmpose export DIR --out
model.onnx` exports it.
"""


def model_card(config: Config, evaluations: Sequence[Mapping[str, Any]] = ()) -> str:
    """The model card: Markdown with Hugging Face's front matter.

    Args:
        config: the model's recipe.
        evaluations: the contents of ``metrics.json`` of each evaluation of exactly these weights:
            ``ap``, ``box_source``, and where known ``data``, ``clips`` and ``steps``.
    """
    m, d, t = config.model, config.data, config.train
    height, width = m.image_size
    card = _HEAD.format(
        backbone=m.backbone,
        frames=m.num_frames,
        height=height,
        width=width,
        keypoints=m.num_keypoints,
    )
    trained = next((e for e in evaluations if "steps" in e), None)
    start = "random" if trained else "unknown"
    rows = {
        "Backbone": f"ViT {m.backbone}{f', {m.depth} blocks' if m.depth else ''}",
        "Fine Token Enhancement": m.fine,
        "Starting weights": f"`{Path(m.pretrained).name}`" if m.pretrained else start,
        "Recipe": f"{t.epochs} epochs, batch {t.batch_size}, lr {t.lr:g}, {t.precision}, "
        f"seed {t.seed}",
        "Steps": str(trained["steps"]) if trained else "unknown",
        "Training data": f"`{data_name(d.root, d.train_annotations)}`" if trained else "unknown",
        "Crops": f"boxes enlarged {d.box_enlarge:g}×, UDP {'on' if d.udp else 'off'}",
        "Decoding": f"{d.decode}, flip test {'on' if d.flip_test else 'off'}, score {d.score}",
        "Written with": f"cmpose {__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "Licence of the weights": "unknown: it depends on the data and the starting weights; "
        "whoever publishes them states it here and in the front matter",
    }
    if not trained:
        rows["Recipe"] += " (of `config.json`; whether it was run is unknown)"
    lines = [card, "## What is known", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    lines += ["", "## Evaluation", ""]
    return "\n".join(lines + _evaluation(evaluations)) + "\n"


def data_name(root: str, annotations: str) -> str:
    """A name of data for other people: the data set's folder and the annotations in it."""
    # An absolute path would not help them, and would tell where this machine keeps its data.
    last = Path(annotations).name if Path(annotations).is_absolute() else annotations
    return f"{Path(root).expanduser().resolve().name}/{last}"


def _evaluation(evaluations: Sequence[Mapping[str, Any]]) -> list[str]:
    scored = [e for e in evaluations if e.get("ap")]
    if not scored:
        return ["AP: unknown. `cmpose evaluate` finds it, `cmpose export` then writes it here."]
    columns = list(scored[0]["ap"].get("columns", ()))
    metric = scored[0]["ap"].get("metric", "Official PoseTrack AP")
    lines = [
        f"{metric} in per cent (`cmpose score`). The box source moves it by several points: "
        "compare like with like.",
        "",
        f"| data | boxes | clips | {' | '.join(columns)} |",
        "|" + "---|" * (3 + len(columns)),
    ]
    for entry in scored:
        values = (entry["ap"].get("columns", {}).get(name) for name in columns)
        shown = " | ".join("–" if value is None else f"{value:.1f}" for value in values)
        data = f"`{entry['data']}`" if entry.get("data") else "unknown"
        lines.append(
            f"| {data} | {entry.get('box_source', 'unknown')} | {entry.get('clips', '–')} "
            f"| {shown} |"
        )
    return lines
