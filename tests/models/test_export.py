"""``cmpose export``: the files compute what the model does, with standard operators alone."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from cmpose.cli import main
from cmpose.data.skeleton import JOINTS
from cmpose.data.transforms import crop_matrix, crop_region, normalize_clips, warp
from cmpose.evaluation.decode import decode_heatmaps, to_image
from cmpose.files import partial_path
from cmpose.models import export as exporting
from cmpose.models.cmpose import CMPose
from cmpose.models.export import BOUND, Agreement, ExportError, compare, example, export
from cmpose.models.weights.folder import CheckpointError
from tests.models.builders import build
from tests.shared_data import PROJECT


def lively(**fields) -> CMPose:
    """A small model whose heatmaps are of order 1, not of the 0.001 that heads start at."""
    model = build(**fields)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, tensor in model.head.named_parameters():
            if tensor.dim() > 1:
                tensor.normal_(std=3.0 * tensor[0].numel() ** -0.5, generator=generator)
            elif "final" in name:
                tensor.normal_(generator=generator)
    return model.eval()


def saved(folder, **fields):
    return lively(**fields).save_pretrained(folder / "model")


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory):
    """A model with Fine Token Enhancement and its two exports for any batch."""
    folder = tmp_path_factory.mktemp("export")
    source = saved(folder, num_keypoints=3, tokens_per_keypoint=1)
    left_by_a_killed_export = partial_path(folder / "m.pt2.files")
    left_by_a_killed_export.mkdir()
    (left_by_a_killed_export / "m.pt2").write_bytes(b"half")
    agreements = {suffix: export(source, folder / f"m.{suffix}") for suffix in ("pt2", "onnx")}
    return folder, CMPose.from_pretrained(source, backend="reference"), agreements


def test_the_command_checks_what_it_writes(dynamic):
    folder, _, agreements = dynamic
    for agreement in agreements.values():
        assert agreement.good
        assert agreement.clips == 8
        assert agreement.largest > 0.1  # empty heatmaps would agree too
    assert {p.name for p in folder.iterdir()} == {"model", "m.pt2", "m.onnx"}


@pytest.mark.parametrize("batch", [1, 4, 7])
def test_any_batch(dynamic, batch):
    """Files run outside the command, for batches of other sizes than the traced one, and choose the
    same tokens and clusters."""
    folder, model, _ = dynamic
    clips = example(model, batch, seed=100 + batch)
    with torch.no_grad():
        output = model(clips)
    expected = output.heatmaps, output.fine.selection.causal, output.fine.clusters.assignment
    program = torch.export.load(folder / "m.pt2").module()(clips)
    session = onnxruntime.InferenceSession(folder / "m.onnx")
    names = [o.name for o in session.get_outputs()]
    assert names == ["heatmaps", "causal", "clusters"]
    answered = [torch.from_numpy(o) for o in session.run(None, {"clips": clips.numpy()})]
    for outputs in (program, answered):
        assert torch.equal(outputs[1], expected[1])
        assert torch.equal(outputs[2], expected[2])
        atol = BOUND * float(expected[0].abs().max())
        torch.testing.assert_close(outputs[0], expected[0], rtol=0, atol=atol)


def test_standard_operators_only(dynamic):
    folder, _, _ = dynamic
    program = torch.export.load(folder / "m.pt2")
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert not [target for target in targets if "cmpose" in target]
    model = onnx.load(folder / "m.onnx")
    assert {node.domain for node in model.graph.node} == {""}
    # ONNX Runtime's threads lose sums in ScatterND; ScatterElements sums clusters instead.
    assert all(node.op_type != "ScatterND" or not node.attribute for node in model.graph.node)
    assert "ScatterElements" in {node.op_type for node in model.graph.node}
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [20]
    onnx.checker.check_model(model)


def test_neither_needs_cmpose(dynamic):
    folder, _, _ = dynamic
    code = (
        "import sys; sys.modules['cmpose'] = None; import torch, onnxruntime;"
        "x = torch.zeros(2, 3, 3, 64, 48);"
        "print(torch.export.load(sys.argv[1]).module()(x)[0].shape);"
        "print(onnxruntime.InferenceSession(sys.argv[2]).run(None, {'clips': x.numpy()})[0].shape)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, folder / "m.pt2", folder / "m.onnx"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    assert "torch.Size([2, 3, 16, 12])" in done.stdout
    assert "(2, 3, 16, 12)" in done.stdout


@pytest.mark.parametrize(
    "fields",
    [
        {"fine": "off", "head": "token"},
        {"fine": "causal_only", "importance": "max"},
        {"peak_delta": "global_max", "include_self": False, "normalize_merge": False},
    ],
    ids=["token head", "causal only", "other clustering"],
)
def test_every_kind_of_model(tmp_path, fields):
    """As ONNX, which is made of the traced program that a .pt2 file holds."""
    agreement = export(saved(tmp_path, **fields), tmp_path / "m.onnx", batch=2, opset=18)
    assert agreement is not None
    assert agreement.good
    assert agreement.clips == 8
    [entry] = onnxruntime.InferenceSession(tmp_path / "m.onnx").get_inputs()
    assert entry.shape == [2, 3, 3, 64, 48]


def test_equal_tokens_are_taken_by_their_index(tmp_path):
    """ONNX's TopK replaces stable sorts: in both the lower index of equal tokens comes first."""
    model = lively(num_keypoints=3, tokens_per_keypoint=1)
    with torch.no_grad():
        model.coarse.slot_embed.zero_()
        model.backbone.pos_embed.zero_()
        model.backbone.patch_embed.proj.weight.zero_()
    export(model.save_pretrained(tmp_path / "model"), tmp_path / "m.onnx", batch=2)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    clips = torch.zeros(2, 3, 3, 64, 48)
    _, causal, _ = session.run(None, {"clips": clips.numpy()})
    assert causal.tolist() == [[0, 1, 2]] * 2


def test_a_wrong_export_is_refused(tmp_path, monkeypatch):
    source = saved(tmp_path, fine="off")
    right = exporting._run_pt2

    def wrong(file):
        run = right(file)
        return lambda clips: [heatmaps * 1.001 for heatmaps in run(clips)]

    monkeypatch.setitem(exporting._FORMATS, ".pt2", (exporting._save_pt2, wrong))
    with pytest.raises(ExportError, match=r"m\.pt2: heatmaps differ by at most .* is not written"):
        export(source, tmp_path / "m.pt2")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_what_counts_as_agreement():
    model = lively(num_keypoints=3, tokens_per_keypoint=1)

    def run(change):
        def answer(clips):
            output = model(clips)
            fine = output.fine
            results = output.heatmaps, fine.selection.causal, fine.clusters.assignment
            return change(*(tensor.clone() for tensor in results))

        return answer

    def other_clip(heatmaps, causal, clusters):
        causal[0, 0] += 1
        heatmaps[0] = 99.0
        return [heatmaps, causal, clusters]

    def one_nan(heatmaps, causal, clusters):
        if len(heatmaps) == 1:
            heatmaps[0, 0, 0, 0] = float("nan")
        return [heatmaps, causal, clusters]

    # A clip with another choice is counted, its heatmaps are not compared.
    agreement = compare(model, run(other_clip), (4,))
    assert (agreement.difference, agreement.other, agreement.good) == (0.0, 1, True)
    assert not compare(model, run(other_clip), (3,)).good
    # A NaN is not lost among later batches.
    assert not compare(model, run(one_nan), (2, 1, 2)).good
    assert not Agreement(1e-3, 1.0, 8, 0).good
    with pytest.raises(ExportError, match=r"gives 1 results"):
        compare(model, run(lambda heatmaps, *_: [heatmaps]), (1,))


@pytest.mark.parametrize("suffix", ["pt2", "onnx"])
def test_files_that_no_export_wrote_are_not_replaced(dynamic, tmp_path, suffix):
    own, mine = dynamic[0] / f"m.{suffix}", tmp_path / f"m.{suffix}"
    mine.write_bytes(own.read_bytes().replace(b"cmpose", b"others"))
    before = mine.read_bytes()
    with pytest.raises(FileExistsError, match=rf"--out .*m\.{suffix}: is there already and is not"):
        export(dynamic[0] / "model", mine)
    assert mine.read_bytes() == before
    # One of its own gets as far as the model.
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        export(tmp_path / "none", own)


def test_bad_arguments_are_named(tmp_path, monkeypatch):
    source = saved(tmp_path, fine="off")
    with pytest.raises(ValueError, match=r"the suffix '\.pb' is no format; give FILE\.pt2"):
        export(source, tmp_path / "m.pb")
    with pytest.raises(ValueError, match=r"--batch 0: must be at least 1, or dynamic"):
        export(source, tmp_path / "m.pt2", batch=0)
    with pytest.raises(ValueError, match=r"--half: is for a folder, not for .*m\.pt2"):
        export(source, tmp_path / "m.pt2", half=True)
    with pytest.raises(ValueError, match=r"--opset 17: must be at least 18"):
        export(source, tmp_path / "m.onnx", opset=17)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name)
    )
    with pytest.raises(ExportError, match=r"needs onnxscript: pip install 'cmpose\[export\]'"):
        export(source, tmp_path / "m.onnx")


def test_a_folder_tells_the_ap_of_its_run(tmp_path, capsys):
    run = tmp_path / "run"
    saved(run)
    ap = {"columns": {"Mean": 44.04}, "joints": [], "ap": []}
    (run / "metrics.json").write_text(
        json.dumps({"ap": ap, "box_source": "ground truth", "data": "d/val", "steps": 5})
    )
    for part in ("evaluations/model", "model/evaluation"):  # here `evaluate` writes, and wrote
        metrics = {"ap": ap, "box_source": f"{part}.json", "clips": 3}
        (run / part).mkdir(parents=True)
        (run / part / "metrics.json").write_text(json.dumps(metrics))
    main(["export", str(run), "--out", str(tmp_path / "published")])
    assert "README.md, config.json, model.safetensors, skeleton.json" in capsys.readouterr().out
    card = (tmp_path / "published" / "README.md").read_text()
    assert "Official PoseTrack AP in per cent" in card
    for line in (
        "`d/val` | ground truth | –",
        *(f"unknown | {part}.json | 3" for part in ("evaluations/model", "model/evaluation")),
    ):
        assert f"| {line} | 44.0 |" in card
    assert {p.name for p in (tmp_path / "published").iterdir()} == {
        *("README.md", "config.json", "model.safetensors", "skeleton.json")
    }
    assert CMPose.from_pretrained(tmp_path / "published").recipe is not None


def test_of_several_checkpoints_the_weights_are_averaged(tmp_path, capsys):
    """Three of one network, the last of which counted another number of batches; then others."""
    parts = [build(num_keypoints=3, seed=seed) for seed in range(3)]
    for number, part in enumerate(parts):
        part.head.deconv_layers[1].num_batches_tracked.fill_(number)
        part.head.deconv_layers[1].running_mean.fill_(float(number))
        part.save_pretrained(tmp_path / "runs" / str(number))
    evaluated = tmp_path / "runs" / "evaluations" / "0"
    evaluated.mkdir(parents=True)
    metrics = {"ap": {"columns": {"Mean": 44.04}, "joints": [], "ap": []}, "box_source": "gt"}
    (evaluated / "metrics.json").write_text(json.dumps(metrics))
    folders = [str(tmp_path / "runs" / str(number)) for number in range(3)]
    main(["export", *folders, "--out", str(tmp_path / "soup")])
    weights = CMPose.from_pretrained(tmp_path / "soup").state_dict()
    for key, value in weights.items():
        exact = sum(part.state_dict()[key].double() for part in parts) / 3
        torch.testing.assert_close(value, exact.to(value.dtype), rtol=1e-6, atol=0)
    assert not torch.equal(weights["head.final_layer.weight"], parts[0].head.final_layer.weight)
    assert weights["head.deconv_layers.1.running_mean"].eq(1).all()
    assert "AP: unknown" in (tmp_path / "soup" / "README.md").read_text()  # not its part's 44.0
    main(["export", folders[0], "--out", str(tmp_path / "alone")])
    assert "| 44.0 |" in (tmp_path / "alone" / "README.md").read_text()
    for fields in ({"num_keypoints": 2}, {"num_keypoints": 3, "neighbors": 1}):
        build(**fields).save_pretrained(tmp_path / "other")
        with pytest.raises(CheckpointError, match=r"other has other settings.* than .*0: average"):
            export([folders[0], tmp_path / "other"], tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A model for PoseTrack's joints, exported by the command line."""
    folder = tmp_path_factory.mktemp("served")
    source = saved(folder, num_keypoints=15, fine="off")
    main(["export", str(source), "--out", str(folder / "m.onnx"), "--batch", "1"])
    return folder / "m.onnx", CMPose.from_pretrained(source)


@pytest.mark.parametrize("udp", [False, True])
def test_the_example_serves_the_poses_that_cmpose_predicts(served, tmp_path, udp):
    file, model = served
    exported = onnx.load(file)
    about = json.loads(exported.metadata_props[0].value)
    assert about["udp"] is False
    exported.metadata_props[0].value = json.dumps(about | {"udp": udp})
    onnx.save(exported, tmp_path / "m.onnx")
    picture = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    picture = cv2.GaussianBlur(picture, (0, 0), 5) * 3
    cv2.imwrite(str(tmp_path / "frame.png"), picture)
    boxes = [[10.0, 20.0, 50.0, 80.0], [60.5, 5.0, 70.0, 60.0]]
    (tmp_path / "boxes.json").write_text(json.dumps(boxes))
    files = [str(tmp_path / n) for n in ("m.onnx", "boxes.json", "poses.json", "frame.png")]
    script = PROJECT / "examples" / "serve_onnx.py"
    code = (
        "import sys, runpy; sys.modules['torch'] = None;"
        f"runpy.run_path({str(script)!r}, run_name='__main__')"
    )
    subprocess.run([sys.executable, "-c", code, *files], check=True, timeout=300, cwd=tmp_path)
    poses = json.loads((tmp_path / "poses.json").read_text())

    size = model.config.image_size
    matrices = [crop_matrix(crop_region(np.array(b), size), size, udp=udp) for b in boxes]
    crops = np.stack([warp(picture[..., ::-1], m, size) for m in matrices])
    clips = normalize_clips(torch.from_numpy(crops)[:, None].expand(-1, 3, -1, -1, -1))
    with torch.no_grad():
        xy, scores = decode_heatmaps(model(clips).heatmaps)
    expected = to_image(
        xy,
        torch.from_numpy(np.stack(matrices)),
        heatmap_size=model.heatmap_size,
        image_size=size,
        udp=udp,
    )
    assert (scores > 0).all()  # where no heatmap rises, cmpose answers (0, 0)
    assert [[p["joint"] for p in pose] for pose in poses] == [list(JOINTS)] * 2
    served_xy = torch.tensor([[p["xy"] for p in pose] for pose in poses], dtype=torch.float64)
    torch.testing.assert_close(served_xy, expected, rtol=0, atol=1e-6)
    theirs = torch.tensor([[p["score"] for p in pose] for pose in poses])
    torch.testing.assert_close(theirs, scores, rtol=0, atol=BOUND * float(scores.max()))
