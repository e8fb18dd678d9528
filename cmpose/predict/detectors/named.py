"""Detectors by name: ``--detector rtdetr``, ``--detector FILE.onnx``, ``--detector hog``."""

from __future__ import annotations

import torch

from cmpose.predict.detectors.box_arrays import Detector

_ONNX = ("yolox", "rtmdet", "rfdetr", "rtdetr")
_CHOICES = (
    "hog, rtdetr, rtdetr:NAME, rtdetr:FOLDER, FILE.onnx, or KIND:FILE.onnx with KIND one of "
    f"{', '.join(_ONNX)}"
)


def named_detector(name: str, device: torch.device) -> Detector | None:
    """The detector of a name; None is the one that is built in, OpenCV's HOG.

    Args:
        name: ``hog``; ``rtdetr``, with a model's name at huggingface.co or its folder behind a
            colon; a file ``FILE.onnx``, with what it is before a colon where it does not say.
        device: that RT-DETR runs on.

    Raises:
        ValueError: no such detector, a package that it needs is not installed, or its file or
            weights cannot be used.
    """
    kind, colon, weights = name.partition(":")
    if kind not in ("hog", *_ONNX):
        kind, colon, weights = "", ":", name
    if name == "hog":
        return None
    if weights.endswith(".onnx") and kind != "hog":
        from cmpose.predict.detectors.onnx_file import OnnxDetector

        return OnnxDetector(weights, kind)
    if kind == "rtdetr" and (weights or not colon):
        from cmpose.predict.detectors.rtdetr import RTDetr

        return RTDetr(weights, device)
    raise ValueError(f"--detector {name}: is none; give {_CHOICES}")
