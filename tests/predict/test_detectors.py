"""RT-DETR with random weights, and ONNX graphs whose boxes are known."""

from __future__ import annotations

import re
import shutil
import sys
import types

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import cmpose
from cmpose.predict.detectors.answers import person_rows
from cmpose.predict.detectors.detect import load_video_detections
from cmpose.predict.detectors.named import named_detector
from cmpose.predict.detectors.onnx_file import OnnxDetector
from tests.shared_data import PROJECT

CPU = torch.device("cpu")
SIZE = (64, 48)
"""(width, height) of the networks' input."""

CELLS = 8 * 6 + 4 * 3 + 2 * 1  # of sides 8, 16 and 32


def graph(path, outputs, *, size=SIZE, inputs=1, dtype=TensorProto.FLOAT):
    """A network that gives the same outputs for every picture."""
    shape = [1, 3, size[1], size[0]] if size else [1, 3, "height", "width"]
    input_infos = [helper.make_tensor_value_info(f"in{i}", dtype, shape) for i in range(inputs)]
    nodes, output_infos, constants = [], [], []
    for name, value in outputs.items():
        constants.append(numpy_helper.from_array(value, f"{name}_value"))
        nodes.append(helper.make_node("Identity", [f"{name}_value"], [name]))
        kind = helper.np_dtype_to_tensor_dtype(value.dtype)
        output_infos.append(helper.make_tensor_value_info(name, kind, value.shape))
    model = helper.make_model(
        helper.make_graph(nodes, "detector", input_infos, output_infos, constants),
        opset_imports=[helper.make_opsetid("", 13)],
        ir_version=8,
    )
    onnx.save(model, path)
    return path


def yolox(*, decoded, classes=80):
    """A person of 32×16 around (40, 24) in the input, and a dog; the rest scores nothing."""
    table = np.zeros((1, CELLS, 5 + classes), np.float32)
    if decoded:
        table[0, :, 0] = np.linspace(0, 63, CELLS)
    # The cell in column 5, row 3 of those of 8 pixels.
    cell = 3 * 8 + 5
    relative = [0.0, 0.0, np.log(4), np.log(2)]
    table[0, cell, :6] = [*([40, 24, 32, 16] if decoded else relative), 0.9, 0.8]
    table[0, 2, [4, 5 + 16]] = 0.9
    return {"output": table}


PEOPLE = [[24, 16, 56, 32, 0.72], [1, 1, 9, 9, 0.9], [24, 16, 56, 31, 0.5]]
DETS = {"dets": np.array([PEOPLE], np.float32), "labels": np.array([[0, 16, 0]])}


def detr(person, classes, names=("dets", "labels"), swapped=False):
    boxes = np.zeros((1, 4, 4), np.float32)
    logits = np.full((1, 4, classes), -9, np.float32)
    boxes[0, 2] = 40 / 64, 24 / 48, 32 / 64, 16 / 48
    logits[0, 2, person] = np.log(0.72 / 0.28)
    boxes[0, 1], logits[0, 1, person + 5] = (0.2, 0.2, 0.1, 0.1), 3
    outputs = list(zip(names, (boxes, logits), strict=True))
    return dict(outputs[::-1] if swapped else outputs)


class Recorder:
    """A session that keeps what it is given."""

    def __init__(self, session) -> None:
        self.session = session

    def run(self, names, feed):
        [self.pixels] = feed.values()
        return self.session.run(names, feed)

    def __getattr__(self, name):
        return getattr(self.session, name)


def looked_at(detector, picture):
    """The input [H, W, 3] that the network gets for a picture, and the boxes."""
    recorder = detector.session = Recorder(detector.session)
    rows = detector(picture)
    return recorder.pixels[0].transpose(1, 2, 0), rows


PICTURE = np.zeros((60, 160, 3), np.uint8)
PICTURE[:] = 200, 100, 50
"""In the letterbox it is 64×24 pixels: 0.4 of its size."""


@pytest.mark.parametrize("decoded", [False, True])
def test_yolox(tmp_path, decoded):
    detector = named_detector(str(graph(tmp_path / "m.onnx", yolox(decoded=decoded))), CPU)
    assert detector.kind == "yolox"
    pixels, rows = looked_at(detector, PICTURE)
    np.testing.assert_array_equal(pixels[:24], np.broadcast_to([50, 100, 200], (24, 64, 3)))
    np.testing.assert_array_equal(pixels[24:], np.full((24, 64, 3), 114))
    # 24 to 56 by 16 to 32 of the input, cut at the picture's lower edge.
    np.testing.assert_allclose(rows, [[60, 40, 140, 60, 0.72]], rtol=1e-5)


@pytest.mark.parametrize("kind", ["yolox", "rtmdet"])
def test_boxes_after_suppression(tmp_path, kind):
    detector = OnnxDetector(graph(tmp_path / f"{kind}_m.onnx", DETS))
    assert detector.kind == kind
    tall = PICTURE.transpose(1, 0, 2)  # 18×48 in the letterbox, 0.3 of its size
    pixels, rows = looked_at(detector, tall)
    inside = np.array([50.0, 100, 200])
    if kind == "rtmdet":
        inside = (inside - [103.53, 116.28, 123.675]) / [57.375, 57.12, 58.395]
    np.testing.assert_allclose(pixels[:, :18], np.broadcast_to(inside, (48, 18, 3)), rtol=1e-6)
    assert rows.shape == (0, 5), "its boxes lie right of the picture"
    _, rows = looked_at(detector, PICTURE)
    np.testing.assert_allclose(rows, [[60, 40, 140, 60, 0.72]], rtol=1e-5)
    alone = OnnxDetector(graph(tmp_path / f"{kind}.onnx", {"dets": DETS["dets"]}))
    assert len(alone(PICTURE)) == 2, "without labels all are people"


def test_two_kinds_with_the_same_outputs_are_told_by_name(tmp_path):
    path = graph(tmp_path / "people.onnx", DETS)
    message = (
        r"people.onnx: may be yolox or rtmdet, whose inputs differ; give --detector yolox:FILE.o"
    )
    with pytest.raises(ValueError, match=message):
        OnnxDetector(path)
    assert named_detector(f"rtmdet:{path}", CPU).kind == "rtmdet"
    with pytest.raises(ValueError, match=r"are dets \[1, 3, 5\], labels \[1, 3\], not those"):
        named_detector(f"rfdetr:{path}", CPU)


@pytest.mark.parametrize(
    ("kind", "outputs", "mean", "std"),
    [
        ("rfdetr", detr(1, 91), [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
        ("rfdetr", detr(1, 91, swapped=True), [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]),
        ("rtdetr", detr(0, 80, ("pred_boxes", "logits"), swapped=True), [0, 0, 0], [255] * 3),
    ],
)
def test_detr(tmp_path, kind, outputs, mean, std):
    detector = OnnxDetector(graph(tmp_path / "m.onnx", outputs))
    assert detector.kind == kind
    pixels, rows = looked_at(detector, PICTURE)
    expected = (np.array([200, 100, 50]) - mean) / std
    np.testing.assert_allclose(pixels, np.broadcast_to(expected, (48, 64, 3)), rtol=1e-6)
    np.testing.assert_allclose(rows, [[60, 20, 140, 40, 0.72]], rtol=1e-5)


def test_an_input_of_any_size_is_640(tmp_path):
    detector = OnnxDetector(graph(tmp_path / "m.onnx", detr(1, 91), size=None))
    assert looked_at(detector, PICTURE)[0].shape == (640, 640, 3)


def test_a_person_once_and_inside_the_picture():
    boxes = [[-9, -9, 50, 90], [0, 0, 50, 88], [60, 5, 60, 9], [np.nan, 0, 9, 9], [60, 0, 99, 99]]
    rows = person_rows(np.array(boxes), np.array([0.5, 0.9, 0.9, 0.9, 0.01]), (80, 90))
    np.testing.assert_array_equal(rows, [[0, 0, 50, 88, 0.9]])


def test_files_that_are_no_detector_are_named(tmp_path, monkeypatch):
    odd = graph(tmp_path / "odd.onnx", {"features": np.zeros((1, 8, 7, 7), np.float32)})
    two = graph(tmp_path / "two.onnx", DETS, inputs=2)
    whole = graph(tmp_path / "int.onnx", DETS, dtype=TensorProto.UINT8)
    (tmp_path / "text.onnx").write_text("no graph")
    for name, message in (
        (
            str(odd),
            r"odd\.onnx: its outputs are features \[1, 8, 7, 7\], not those of YOLOX,",
        ),
        (
            str(two),
            r"two\.onnx: its inputs are in0 tensor\(float\) \[1, 3, 48, 64\], in1 .* expor",
        ),
        (str(whole), r"int\.onnx: its inputs are in0 tensor\(uint8\)"),
        (str(tmp_path / "text.onnx"), r"text\.onnx: onnxruntime cannot read it \("),
        ("none.onnx", r"--detector none\.onnx: no such file"),
        ("yolo", r"--detector yolo: is none; give hog, rtdetr, rtdetr:NAME, .* FILE\.onnx"),
        ("hog:x.onnx", "--detector hog:x.onnx: is none; give hog"),
        ("rtdetr:", "--detector rtdetr:: is none; give hog"),
        ("rtdetr:./none", r"--detector rtdetr:\./none: no such folder; give a model's name"),
    ):
        with pytest.raises(ValueError, match=message):
            named_detector(name, CPU)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ValueError, match=r"onnxruntime is not installed: pip install 'cmpose\[on"):
        named_detector(str(odd), CPU)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match=r"transformers is not installed: pip install 'cmpose\[r"):
        named_detector("rtdetr", CPU)


@pytest.fixture(scope="module")
def rtdetr(tmp_path_factory):
    """A folder of a small RT-DETR with random weights, and the model in it."""
    from transformers import RTDetrConfig, RTDetrForObjectDetection, RTDetrResNetConfig

    folder = tmp_path_factory.mktemp("rtdetr")
    backbone = RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 16, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = RTDetrConfig(
        backbone_config=backbone,
        encoder_in_channels=[16, 16, 16],
        encoder_hidden_dim=16,
        d_model=16,
        encoder_ffn_dim=16,
        decoder_in_channels=[16, 16, 16],
        decoder_ffn_dim=16,
        decoder_layers=1,
        decoder_attention_heads=2,
        encoder_attention_heads=2,
        num_queries=12,
        num_denoising=0,
        id2label={0: "dog", 1: "person"},
        label2id={"dog": 0, "person": 1},
    )
    torch.manual_seed(0)
    model = RTDetrForObjectDetection(config).eval()
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"size": {"height": 64, "width": 96}}')
    return folder, model


def test_rtdetr_gives_the_networks_people(rtdetr):
    """The input is 96×64; the picture twice as wide."""
    folder, model = rtdetr
    picture = np.random.default_rng(0).integers(0, 255, (64, 192, 3), np.uint8)
    rows = named_detector(f"rtdetr:{folder}", CPU)(picture)
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 255
    pixels = torch.nn.functional.interpolate(pixels, (64, 96), mode="bilinear", antialias=True)
    with torch.no_grad():
        output = model(pixel_values=pixels)
    scores = output.logits[0, :, 1].sigmoid().double().numpy()
    x, y, w, h = output.pred_boxes[0].double().numpy().T * np.array([[192], [64], [192], [64]])
    boxes = np.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], 1)
    assert len(rows) > 0
    np.testing.assert_allclose(rows, person_rows(boxes, scores, (192, 64)), atol=1e-3)


def test_rtdetr_of_another_kind_or_without_people_is_named(rtdetr, tmp_path):
    _, model = rtdetr
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"is bert, not one of rt_detr, .*; give a model's name"):
        named_detector(f"rtdetr:{tmp_path}", CPU)
    model.config.id2label = {0: "dog", 1: "cat"}
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no class person, but dog, cat"):
        named_detector(f"rtdetr:{tmp_path}", CPU)


def test_a_detector_by_name_predicts_and_is_not_mixed_with_another(weights, clip, tmp_path, capsys):
    video, boxes, count, _ = clip
    path = graph(tmp_path / "yolox.onnx", yolox(decoded=True))
    model = cmpose.load(weights)
    prediction = model.predict(video, detector=str(path))
    metrics = prediction.save(tmp_path / "out", outputs=["poses"])
    assert "HOG" not in capsys.readouterr().out
    assert (metrics["people"], metrics["box_source"]) == (count, "ONNX yolox.onnx")
    graph(path, yolox(decoded=False))
    with pytest.raises(RuntimeError, match=r"detector was 'ONNX yolox\.onnx .*, is 'ONNX yolox"):
        model.predict(video, detector=str(path)).save(tmp_path / "out", outputs=["poses"])
    with pytest.raises(ValueError, match="boxes are given too"):
        model.predict(video, boxes=boxes, detector=str(path))
    model.predict(video, detector="hog", max_frames=1).save(tmp_path / "hog", outputs=["poses"])
    assert "HOG detector, the last resort: it misses many people" in capsys.readouterr().out


class Boxes:
    """What each of the packages returns, of one person and what is no person."""

    person, score, dog = [10.0, 20.0, 60.0, 120.0], 0.75, [1.0, 2.0, 30.0, 40.0]

    def rtmlib(self):
        def net(picture):
            assert picture.dtype == np.uint8
            return np.array([self.person], np.float32)

        return types.SimpleNamespace(YOLOX=lambda file, model_input_size: net)

    def torchvision(self):
        def net(pictures):
            [rgb] = pictures
            assert rgb.shape[0] == 3
            assert 0 <= rgb.min() <= rgb.max() <= 1
            boxes = torch.tensor([self.person, self.dog])
            labels = torch.tensor([1, 18])
            return [{"boxes": boxes, "scores": torch.tensor([0.75, 0.9]), "labels": labels}]

        net.eval = lambda: net
        detection = types.SimpleNamespace(fasterrcnn_resnet50_fpn_v2=lambda weights: net)
        return types.SimpleNamespace(models=types.SimpleNamespace(detection=detection))

    def ultralytics(self):
        def net(picture, classes, verbose):
            assert classes == [0]
            data = torch.tensor([[*self.person, self.score, 0]])
            return [types.SimpleNamespace(boxes=types.SimpleNamespace(data=data))]

        return types.SimpleNamespace(YOLO=lambda file: net)


@pytest.mark.parametrize("package", ["rtmlib", "torchvision", "ultralytics"])
def test_the_documents_lines_make_files_of_boxes(package, clip, tmp_path, monkeypatch):
    text = (PROJECT / "docs/predict.md").read_text()
    text = text[text.index("### Boxes of other packages") :]
    writing, *blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    [lines] = [block for block in blocks if f"import {package}\n" in block]
    monkeypatch.setitem(sys.modules, package, getattr(Boxes(), package)())
    shutil.copy(clip[0], tmp_path / "walk.mp4")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(compile(lines, package, "exec"), names)
    exec(compile(writing, "boxes", "exec"), names)
    detections = load_video_detections("boxes.json", clip[2], size=(256, 144))
    assert list(detections) == list(range(clip[2]))
    for [person] in detections.values():
        assert person.box.tolist() == [10, 20, 50, 100]
        assert person.score == (1 if package == "rtmlib" else 0.75)
