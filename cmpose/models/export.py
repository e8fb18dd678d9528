"""``cmpose export``: writes a model as a folder, a ``torch.export`` program (.pt2) or ONNX file.

Programs and ONNX files are compared with the model before they get their name. The ops are traced
as their plain PyTorch references, Fine Token Enhancement included, so that the result holds
standard operators only and needs neither cmpose nor its kernels.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile, ZipFile

import torch
from torch import Tensor, nn

from cmpose import ops
from cmpose.config import Config
from cmpose.data.formats.reader import convert, parse_file
from cmpose.data.formats.run import Metrics
from cmpose.data.skeleton import Skeleton
from cmpose.data.transforms import IMAGENET_MEAN, IMAGENET_STD
from cmpose.files import claim_file, partial_path, remove, whole_file, writing
from cmpose.models.cmpose import CMPose
from cmpose.models.weights import checkpoint

BOUND = 1e-4
"""How far heatmaps may be from the model's, as a share of its largest absolute heatmap value."""

OTHER_CHOICES = 0.25
"""In what share of clips tokens may be chosen differently, where rounding decides between two."""

METADATA = "cmpose"
_ONNX_KEY = b"\x0a\x06" + METADATA.encode()
"""How the key of a file's metadata stands in a protobuf: field 1, 6 bytes."""
OPSET = 20
_EXAMPLE = 2  # clips to trace with when the batch is dynamic: torch takes 0 and 1 as constants
_SEED = 0


class ExportError(RuntimeError):
    """A model cannot be exported, or its export does not compute what it does."""


class _Exported(nn.Module):
    """The model as a function of clips [B, T, 3, H, W] that returns tensors.

    They are heatmaps [B, K, h, w]; with causal tokens also their indices [B, nK]; with clusters
    also the cluster [B, N − nK] of each other token.
    """

    def __init__(self, model: CMPose) -> None:
        super().__init__()
        self.model = model

    def forward(self, clips: Tensor) -> tuple[Tensor, ...]:
        output = self.model(clips)
        if output.fine is None:
            return (output.heatmaps,)
        if output.fine.clusters is None:
            return output.heatmaps, output.fine.selection.causal
        return output.heatmaps, output.fine.selection.causal, output.fine.clusters.assignment


def output_names(config: Config) -> list[str]:
    """Names of the tensors that an export of such a model returns, in their order."""
    choices = {"off": 0, "causal_only": 1, "full": 2}[config.model.fine]
    return ["heatmaps", "causal", "clusters"][: 1 + choices]


def metadata(config: Config, skeleton: Skeleton) -> dict[str, Any]:
    """What an export's file says of how to make crops and to read heatmaps."""
    return {
        "joints": list(skeleton.keypoints),
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "box_enlarge": config.data.box_enlarge,
        "udp": config.data.udp,
        "decode": config.data.decode,
        "sigma": config.model.sigma,
    }


# -- the two formats ------------------------------------------------------------------------------


def trace(model: CMPose, batch: int | Literal["dynamic"]) -> torch.export.ExportedProgram:
    """The model's graph, in which the ops are their references.

    Args:
        model: in eval mode, with ``backend: reference``.
        batch: how many clips, or ``dynamic``.
    """
    dynamic = batch == "dynamic"
    clips = example(model, _EXAMPLE if dynamic else int(batch))
    shapes = {"clips": {0: torch.export.Dim("batch", min=1)}} if dynamic else None
    with torch.no_grad(), ops.without_value_checks():
        return torch.export.export(_Exported(model), (clips,), dynamic_shapes=shapes)


def example(model: CMPose, batch: int, seed: int = _SEED) -> Tensor:
    """Random normalised clips [batch, T, 3, H, W]."""
    c = model.config
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, c.num_frames, 3, *c.image_size, generator=generator)


def _save_pt2(
    program: torch.export.ExportedProgram, file: Path, about: dict[str, Any], opset: int
) -> None:
    del opset
    torch.export.save(program, file, extra_files={f"{METADATA}.json": json.dumps(about)})


def _run_pt2(file: Path) -> Callable[[Tensor], list[Tensor]]:
    module = torch.export.load(file).module()
    return lambda clips: list(module(clips))


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's warnings of packages and interfaces that are not used here."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        logger.setLevel(before)


def _stable_sort(
    self: Any, *, dim: int = -1, descending: bool = False, stable: bool | None = None
) -> Any:
    """``torch.sort(stable=True)`` in ONNX, whose TopK puts the lower index first among equals."""
    import onnxscript

    del stable
    onnx: Any = onnxscript.opset18  # annotated for arrays, called here with values of a graph
    length = onnx.Gather(onnx.Shape(self), onnx.Constant(value_ints=[dim]))
    return onnx.TopK(self, length, axis=dim, largest=int(descending), sorted=1)


def _index_put(self: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
    """The sums of ``merge_clusters``: self [B, L, D], values [B, M, D], indices (clip, cluster).

    The exporter would use ScatterND. There ONNX Runtime adds values of equal indices in several
    threads at once and now and then loses some; in ScatterElements it adds them one by one.
    """
    import onnxscript

    if not accumulate or len(indices) != 2:
        raise ExportError("only the index_put of merge_clusters can be exported to ONNX")
    onnx: Any = onnxscript.opset18
    column = onnx.Unsqueeze(indices[1], onnx.Constant(value_ints=[2]))
    indices_of_all = onnx.Expand(column, onnx.Shape(values))
    return onnx.ScatterElements(self, indices_of_all, values, axis=1, reduction="add")


def _save_onnx(
    program: torch.export.ExportedProgram, file: Path, about: dict[str, Any], opset: int
) -> None:
    with _quiet():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=opset,
            input_names=["clips"],
            output_names=about["outputs"],
            custom_translation_table={
                torch.ops.aten.sort.stable: _stable_sort,
                torch.ops.aten.index_put.default: _index_put,
            },
            verbose=False,
        )
    assert exported is not None
    foreign = {node.domain for node in exported.model.graph} - {"", "ai.onnx"}
    if foreign:
        raise ExportError(f"the exporter used operators of {', '.join(foreign)}, not of ONNX alone")
    exported.model.metadata_props[METADATA] = json.dumps(about)
    exported.save(str(file))


def _run_onnx(file: Path) -> Callable[[Tensor], list[Tensor]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda clips: [
        torch.from_numpy(output) for output in session.run(None, {"clips": clips.numpy()})
    ]


_FORMATS = {".pt2": (_save_pt2, _run_pt2), ".onnx": (_save_onnx, _run_onnx)}
_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


# -- the check ------------------------------------------------------------------------------------


@dataclass
class Agreement:
    """How an export compares with its model.

    Attributes:
        difference: the largest between two heatmaps' values, in clips with the same choices.
        largest: the model's largest absolute heatmap value.
        clips: how many were compared.
        other: in how many of them another token was causal, or a token was in another cluster.
    """

    difference: float
    largest: float
    clips: int
    other: int

    def __str__(self) -> str:
        share = self.difference / self.largest if self.largest else self.difference
        return (
            f"heatmaps differ by at most {self.difference:.3g}, {share:.2g} of their largest value "
            f"(bound {BOUND:g}); {self.other} of {self.clips} clips with other causal tokens or "
            f"clusters (bound {OTHER_CHOICES:.0%})"
        )

    @property
    def good(self) -> bool:
        """Whether both bounds hold, which they do not for NaN."""
        near = self.difference <= BOUND * self.largest
        return near and self.other <= OTHER_CHOICES * self.clips


@torch.no_grad()
def compare(
    model: CMPose, run: Callable[[Tensor], list[Tensor]], batches: tuple[int, ...]
) -> Agreement:
    """Runs an export and its model on random clips, in batches of the sizes given.

    The choices of Fine Token Enhancement are discrete: where two tokens are equal but for
    rounding, the export may take the other one, and the clip's heatmaps then differ visibly. Such
    clips are counted, and their heatmaps are not compared.

    Args:
        model: in eval mode.
        run: the export: clips → its results.
        batches: how many clips to compare at a time.

    Raises:
        ExportError: the export gives other results than the model, or of other shapes.
    """
    agreement = Agreement(0.0, 0.0, 0, 0)
    for number, batch in enumerate(batches):
        clips = example(model, batch, _SEED + 1 + number)
        heatmaps, *choices = _Exported(model)(clips)
        theirs, *other_choices = run(clips)
        if theirs.shape != heatmaps.shape or len(choices) != len(other_choices):
            raise ExportError(
                f"the export gives {len(other_choices) + 1} results, heatmaps "
                f"{list(theirs.shape)}; the model {len(choices) + 1}, {list(heatmaps.shape)}"
            )
        same = torch.ones(batch, dtype=torch.bool)
        for mine, other in zip(choices, other_choices, strict=True):
            same &= (mine == other).all(dim=1)
        agreement.clips += batch
        agreement.other += int((~same).sum())
        agreement.largest = max(agreement.largest, float(heatmaps.abs().max()))
        difference = (theirs - heatmaps)[same].abs().flatten()
        # By torch: unlike Python's max it never loses a NaN.
        agreement.difference = float(
            torch.cat([difference, torch.tensor([agreement.difference])]).max()
        )
    return agreement


# -- the command ----------------------------------------------------------------------------------


_METRICS_REMEDY = "evaluate again, or delete it to export without it"


def evaluations_of(folder: Path) -> list[dict[str, Any]]:
    """The metrics known of the model in a folder: its run's, and those of ``cmpose evaluate``."""
    # Evaluations lay in the model's own folder before there was evaluation_folder.
    files = [checkpoint.evaluation_folder(folder) / "metrics.json"]
    files.append(folder / "evaluation" / "metrics.json")
    if folder.name == "model":
        files.insert(0, folder.parent / "metrics.json")
    evaluations = []
    for file in filter(Path.is_file, files):
        metrics = parse_file(file, checkpoint.CheckpointError, _METRICS_REMEDY)
        convert(metrics, Metrics, str(file), checkpoint.CheckpointError, remedy=_METRICS_REMEDY)
        evaluations.append(metrics)
    return evaluations


def export(
    path: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    batch: int | Literal["dynamic"] = "dynamic",
    opset: int = OPSET,
    half: bool = False,
) -> Agreement | None:
    """Exports the model of a run or checkpoint and checks what was written.

    Args:
        path: a run's folder, a checkpoint or an exported folder; the weights of several are
            averaged (:func:`~cmpose.models.weights.checkpoint.average`).
        out: ``FILE.pt2``, ``FILE.onnx``, or a folder, which gets the model with a model card.
        batch: clips in a batch, or ``dynamic`` for any number; not for a folder.
        opset: version of ONNX's operators; for a ``.onnx`` file.
        half: stores a folder's weights in 16 bits.

    Returns:
        How the file compares with the model; None for a folder.

    Raises:
        CheckpointError: no usable checkpoint, or several of different networks.
        ValueError: a batch or a suffix that cannot be.
        ExportError: packages are missing, or the file does not compute what the model does; it is
            not left behind then.
        FileExistsError: ``out`` is a file that no export wrote.
        InUse: another process exports there.
        OutputError: when it cannot be written.
    """
    out = Path(out).expanduser()
    if out.suffix not in ("", *_FORMATS):
        raise ValueError(
            f"--out {out}: the suffix {out.suffix!r} is no format; give FILE.pt2, FILE.onnx, or a "
            "folder without a suffix"
        )
    if batch != "dynamic" and not out.suffix:
        raise ValueError(
            f"--batch {batch}: is for FILE.pt2 and FILE.onnx, not for the folder {out}"
        )
    if opset != OPSET and out.suffix != ".onnx":
        raise ValueError(f"--opset {opset}: is for FILE.onnx, not for {out}")
    if half and out.suffix:
        raise ValueError(f"--half: is for a folder, not for {out}")
    if batch != "dynamic" and batch < 1:
        raise ValueError(f"--batch {batch}: must be at least 1, or dynamic")
    if out.suffix == ".onnx":
        missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
        if missing:
            raise ExportError(
                f"--out {out}: ONNX needs {', '.join(missing)}: pip install 'cmpose[export]'"
            )
        if opset < 18:
            raise ValueError(f"--opset {opset}: must be at least 18")
    if out.suffix and os.path.lexists(out) and not _is_export(out):
        raise FileExistsError(
            f"--out {out}: is there already and is not of cmpose export: move it, or give another "
            "--out"
        )
    paths = [path] if isinstance(path, str | Path) else list(path)
    model, config = checkpoint.average(paths, backend="reference" if out.suffix else None)
    # What was evaluated are the parts of an average, not the average.
    evaluations = evaluations_of(checkpoint.find(paths[0])) if len(paths) == 1 else []
    with claim_file(out, "export", "--out"):
        if out.suffix:
            return _export_file(model, config, out, batch, opset)
        written = model.save_pretrained(out, evaluations=evaluations, half=half)
    print(f"{written}: {', '.join(sorted(file.name for file in written.iterdir()))}")
    return None


def _is_export(file: Path) -> bool:
    """Whether a file has the metadata of an export, or is empty."""
    if not file.is_file():
        return not file.is_dir()  # a device or a broken link replaces nothing
    if not file.stat().st_size:
        return True
    if file.suffix == ".onnx":
        with open(file, "rb") as stream, mmap(stream.fileno(), 0, access=ACCESS_READ) as data:
            return data.find(_ONNX_KEY) >= 0
    try:
        with ZipFile(file) as parts:
            return any(name.endswith(f"extra/{METADATA}.json") for name in parts.namelist())
    except (BadZipFile, OSError):
        return False


def _export_file(
    model: CMPose, config: Config, out: Path, batch: int | Literal["dynamic"], opset: int
) -> Agreement:
    save, load = _FORMATS[out.suffix]
    about = {"outputs": output_names(config)} | metadata(config, model.skeleton)
    with _work_folder(out) as folder:
        unchecked = folder / out.name
        with writing(out):
            save(trace(model, batch), unchecked, about, opset)
        batches = (1, _EXAMPLE, 5) if batch == "dynamic" else (batch,) * max(2, 8 // batch)
        agreement = compare(model, load(unchecked), batches)
        if not agreement.good:
            raise ExportError(f"{out}: {agreement}; it is not written. Please report this")
        # ONNX keeps weights of more than 2 GB in a second file, which must be there first.
        files = [out.with_name(file.name) for file in sorted(folder.iterdir(), reverse=True)]
        for file in files:
            with whole_file(file) as partial:
                os.replace(folder / file.name, partial)
    size = sum(file.stat().st_size for file in files) / 1e6
    names = " and ".join(map(str, reversed(files)))
    print(f"{names}: {size:.0f} MB, batch {batch}; {agreement}")
    return agreement


@contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out``, which is claimed, for files that are not checked yet."""
    folder = partial_path(out.with_name(f"{out.name}.files"))
    with writing(out):
        remove(folder)  # a killed export left it
        folder.mkdir()
    try:
        yield folder
    finally:
        remove(folder)
