"""A people detector in an ONNX file, through onnxruntime: YOLOX, RTMDet, RF-DETR, RT-DETR.

What a file is, is told by its outputs (B = 1; input pixels are those of the network's input):

======= ================================================ ==========================================
kind    outputs                                          input
======= ================================================ ==========================================
yolox   [1, N, 5 + C]: centre and size, either in input  BGR, 0 to 255, letterbox
        pixels or relative to a grid; object, classes
yolox,  ``dets`` [1, N, 5]: corners in input pixels and  the same; of RTMDet minus the mean, over
rtmdet  a score; ``labels`` [1, N]                       the standard deviation of ImageNet
rfdetr  ``dets`` [1, N, 4]: centre and size as shares;   RGB, stretched, minus the mean, over the
        ``labels`` [1, N, C]: logits                     standard deviation of ImageNet
rtdetr  ``pred_boxes`` and ``logits``, likewise          RGB, stretched, 0 to 1
======= ================================================ ==========================================

A letterbox keeps the picture's shape: it stands in the upper left corner, and what is left of the
input is grey (114). The person is class 0 of COCO's 80, or 1 where classes have COCO's own ids
(RF-DETR's 91).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import cv2
import numpy as np

from cmpose.predict.detectors.answers import corners, person_rows, sigmoid

_MEAN, _STD = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
"""Of ImageNet, red first, of 255."""

_GREY, _SIDE = 114, 640
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxDetector:
    """Finds people in a picture.

    Attributes:
        kind: ``yolox``, ``rtmdet``, ``rfdetr`` or ``rtdetr``.
        box_source: what it is, for people.
        signature: by which another file can be told apart.
        session: onnxruntime's.
    """

    def __init__(self, path: str | Path, kind: str = "") -> None:
        """
        Args:
            path: the file.
            kind: see above; empty tells it by the outputs, and where two kinds have the same, by
                the file's name.

        Raises:
            ValueError: onnxruntime is not installed, or the file is none of these detectors.
        """
        self._where, self.kind = f"--detector {path}", kind
        try:
            import onnxruntime
        except ImportError as error:
            raise ValueError(
                f"{self._where}: onnxruntime is not installed: pip install 'cmpose[onnx]'"
            ) from error
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"{self._where}: no such file")
        available = onnxruntime.get_available_providers()
        providers = ("CUDAExecutionProvider", "CPUExecutionProvider")
        try:
            self.session = onnxruntime.InferenceSession(
                str(path), providers=[each for each in providers if each in available]
            )
        except Exception as error:  # onnxruntime's exceptions have no class in common
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{self._where}: onnxruntime cannot read it ({reason})") from error
        inputs = self.session.get_inputs()
        shape = inputs[0].shape
        if len(inputs) != 1 or len(shape) != 4 or shape[1] != 3 or inputs[0].type not in _TYPES:
            shapes = ", ".join(f"{each.name} {each.type} {each.shape}" for each in inputs)
            raise ValueError(
                f"{self._where}: its inputs are {shapes}; one of [1, 3, height, width], float, is "
                "expected: export it without other inputs"
            )
        self._dtype = _TYPES[inputs[0].type]
        height, width = (each if isinstance(each, int) else _SIDE for each in shape[2:])
        self.size = width, height
        self.box_source = f"ONNX {path.name}"
        self.signature = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
        grey = np.full((1, 3, height, width), _GREY, self._dtype)
        self._decoded = False  # whether YOLOX's boxes are in pixels
        self._learn(self._run(grey), path.name.lower().replace("-", "").replace("_", ""))

    def _run(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        names = [each.name for each in self.session.get_outputs()]
        outputs = self.session.run(names, {self.session.get_inputs()[0].name: pixels})
        return dict(zip(names, outputs, strict=True))

    def _learn(self, outputs: dict[str, np.ndarray], name: str) -> None:
        """Sets ``kind`` by what the network gives for a grey picture."""
        kinds = _kinds(outputs, self.size)
        if len(kinds) > 1 and not self.kind:
            kinds = [kind for kind in kinds if kind in name] or kinds
        if self.kind in kinds:
            kinds = [self.kind]
        if not kinds or (self.kind and self.kind not in kinds):
            shapes = ", ".join(f"{n} {list(o.shape)}" for n, o in outputs.items())
            expected = self.kind or "YOLOX, RTMDet, RF-DETR or RT-DETR"
            raise ValueError(
                f"{self._where}: its outputs are {shapes}, not those of {expected}; see "
                "docs/predict.md"
            )
        if len(kinds) > 1:
            choices = " or ".join(f"--detector {kind}:FILE.onnx" for kind in kinds)
            raise ValueError(
                f"{self._where}: may be {' or '.join(kinds)}, whose inputs differ; give {choices}"
            )
        self.kind = kinds[0]
        if len(outputs) == 1:
            # Relative to the grid, no centre is half an input away from its cell.
            self._decoded = float(next(iter(outputs.values()))[0, :, 0].max()) > self.size[0] / 2

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """People's boxes, see ``person_rows``, in a picture, uint8 RGB [H, W, 3]."""
        height, width = picture.shape[:2]
        detr = self.kind in ("rfdetr", "rtdetr")
        pixels, inside = self._stretched(picture) if detr else self._letterbox(picture)
        outputs = self._run(np.ascontiguousarray(pixels.transpose(2, 0, 1)[None], self._dtype))
        boxes, scores = self._boxes(outputs)
        scale = np.array([width / inside[0], height / inside[1]] * 2)
        return person_rows(boxes * scale, scores, (width, height))

    def _stretched(self, picture: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """The input [H, W, 3], and the part of it, (width, height), that is the picture."""
        pixels = cv2.resize(picture, self.size, interpolation=cv2.INTER_LINEAR).astype(np.float32)
        return (pixels - _MEAN) / _STD if self.kind == "rfdetr" else pixels / 255, self.size

    def _letterbox(self, picture: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
        """See ``_stretched``."""
        height, width = picture.shape[:2]
        ratio = min(self.size[0] / width, self.size[1] / height)
        inside = max(1, int(width * ratio)), max(1, int(height * ratio))
        pixels = np.full((self.size[1], self.size[0], 3), _GREY, np.float32)
        resized = cv2.resize(picture[..., ::-1], inside, interpolation=cv2.INTER_LINEAR)
        pixels[: inside[1], : inside[0]] = resized
        if self.kind == "rtmdet":
            pixels = (pixels - _MEAN[::-1]) / _STD[::-1]
        return pixels, inside

    def _boxes(self, outputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Corners [N, 4] in input pixels, and the scores of a person [N]."""
        first, *others = (np.asarray(o[0], np.float64) for o in outputs.values())
        if not others and first.shape[1] > 5:
            boxes = first[:, :4] if self._decoded else _on_grid(first[:, :4], self.size)
            return corners(boxes), first[:, 4] * first[:, 5]
        if self.kind in ("rfdetr", "rtdetr"):
            boxes, logits = _boxes_and_logits([first, *others])
            # Shares of the input become pixels of it.
            scores = sigmoid(logits[:, _person_of(logits.shape[1])])
            return corners(boxes) * [*self.size, *self.size], scores
        dets, labels = _dets_and_labels([first, *others])
        return dets[:, :4], np.where(labels == 0, dets[:, 4], 0.0)


def _kinds(outputs: dict[str, np.ndarray], size: tuple[int, int]) -> list[str]:
    """The kinds of detectors that have such outputs."""
    shapes = [output.shape for output in outputs.values()]
    if not all(len(shape) in (2, 3) and shape[0] == 1 for shape in shapes):
        return []
    widths = [shape[2] if len(shape) == 3 else 0 for shape in shapes]
    if len(shapes) == 1 and widths[0] > 5 and shapes[0][1] == len(_grid(size)):
        return ["yolox"]
    if sorted(widths) in ([5], [0, 5]):
        return ["yolox", "rtmdet"]
    if len(shapes) == 2 and 4 in widths and min(widths) > 0 and shapes[0][1] == shapes[1][1]:
        return ["rtdetr"] if "pred_boxes" in outputs else ["rfdetr"]
    return []


def _person_of(classes: int) -> int:
    """The person's class: of COCO's own ids (0 is nothing there) it is 1."""
    return 1 if classes in (2, 90, 91, 92) else 0


def _boxes_and_logits(outputs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Of RF-DETR's and RT-DETR's two outputs, whose order differs."""
    first, second = outputs
    return (second, first) if first.shape[1] != 4 else (first, second)


def _dets_and_labels(outputs: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [N, 5] and classes [N]; without classes all are people."""
    dets = next(output for output in outputs if output.ndim == 2)
    return dets, next((output for output in outputs if output.ndim == 1), np.zeros(len(dets)))


def _grid(size: tuple[int, int]) -> np.ndarray:
    """YOLOX's cells [N, 3]: column, row, pixels of a side."""
    cells = []
    for side in (8, 16, 32):
        rows, columns = np.mgrid[: size[1] // side, : size[0] // side]
        cells.append(np.stack([columns.ravel(), rows.ravel(), np.full(rows.size, side)], 1))
    return np.concatenate(cells)


def _on_grid(boxes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """YOLOX's boxes in input pixels: centres count from cells, sizes are logarithms of cells."""
    grid = _grid(size)
    sides = grid[:, 2:]
    return np.hstack([(boxes[:, :2] + grid[:, :2]) * sides, np.exp(boxes[:, 2:]) * sides])
