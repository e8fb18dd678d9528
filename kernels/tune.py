"""Measures other configurations than the pinned ones on the card at hand.

    python -m cmpose.kernels.tune [OP ...] [--quick] [--json FILE] [--list] [--arch 89]

For every line of ``configs.py`` that one of the shapes below uses, it times the pinned
configuration and its neighbours (blocks and warps halved and doubled, one pipeline stage more and
fewer). Each launch is timed alone with a cold L2 cache. A candidate counts only if the op's results
with it agree with the pinned ones. It prints the line to put into ``configs.py``, which must pass
the compile check (``tests.kernels.compile_check``). Without a change of the source,
``CMPOSE_CONFIGS=FILE`` uses the file that ``--json`` writes.

Without a card nothing is measured: in a checkout of the project the configurations are ranked by
the estimate of docs/profile.md, for the card of ``--arch``.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from cmpose.kernels import (
    configs,
    corrupt_tokens,
    heatmap_loss,
    launch,
    overrides,
    reconstruction_loss,
    spatial_attention,
    temporal_attention,
    warp_clips,
)
from cmpose.kernels.launch import Config

Line = tuple[str, Hashable]
"""Kernel and variant."""

Call = Callable[[], Any]

GAIN = 0.98
"""A candidate replaces the pinned configuration if it takes less than this share of its time."""


# -- shapes ---------------------------------------------------------------------------------------


class Shape(NamedTuple):
    """A model: clips, frames, patch tokens, keypoints, width, heads, and its dtype."""

    B: int = 32
    T: int = 3
    N: int = 192
    K: int = 15
    D: int = 768
    H: int = 12
    dtype: torch.dtype = torch.bfloat16


SHAPES = (
    Shape(),
    Shape(D=1024, H=16),
    Shape(B=16, D=1280, H=16),
    Shape(D=384),
    Shape(D=192, H=3, N=48),
    Shape(B=8, D=1024, H=8, N=432),
    Shape(B=16, T=7),
    Shape(B=4, N=1024),
    Shape(B=1),
    Shape(B=8, dtype=torch.float32),
)
"""ViT-B, L, H, S, and the model for CPUs; wide heads and 384 × 288 pixels; more frames; more
tokens; one clip; float32."""


def _grid(shape: Shape) -> tuple[int, int]:
    """Rows and columns of patches, 4 : 3."""
    rows = round((shape.N * 4 / 3) ** 0.5)
    return rows, shape.N // rows


def _attention(op: Any) -> Callable[[Shape, str], Iterator[tuple[str, Call]]]:
    def calls(shape: Shape, device: str) -> Iterator[tuple[str, Call]]:
        # The three branches are one batch.
        qkv = torch.randn(
            *(3 * shape.B, shape.T, shape.N + shape.K, 3, shape.H, shape.D // shape.H),
            dtype=shape.dtype,
            device=device,
        )
        yield "forward", lambda: op.forward(qkv)
        if op is temporal_attention:
            grad = torch.randn_like(qkv[:, :, :, 0]).contiguous()
            yield "backward", lambda: op.backward(grad, qkv)
        else:
            out, lse = op.forward(qkv)
            grad = torch.randn_like(out)
            yield "backward", lambda: op.backward(grad, qkv, out, lse)

    return calls


def _corrupt_tokens(shape: Shape, device: str) -> Iterator[tuple[str, Call]]:
    B, T, N, K, D, _, dtype = shape
    tokens = torch.randn(B, T, N, D, dtype=dtype, device=device)
    keypoints = torch.randn(K, D, dtype=dtype, device=device)
    position = torch.randn(T, N + K, D, dtype=dtype, device=device)
    seed = torch.ones(1, dtype=torch.int64, device=device)
    options = (0.45, 0.45, 1.0, "exact", True, 0)
    yield (
        "forward",
        lambda: corrupt_tokens.forward(tokens, keypoints, position, seed, *options),
    )
    grad = torch.randn(3, B, T, N + K, D, dtype=dtype, device=device)
    masked = torch.rand(B, T, N, device=device) < 0.45
    yield "backward", lambda: corrupt_tokens.backward(grad, masked, dtype, dtype, True)


def _reconstruction_loss(shape: Shape, device: str) -> Iterator[tuple[str, Call]]:
    B, T, N, K, D, _, dtype = shape
    # The model's reconstructed tokens are a view without the keypoints.
    pred = torch.randn(B, T, N + K, D, dtype=dtype, device=device)[:, :, :N]
    target = torch.randn(B, T, N, D, dtype=dtype, device=device)
    corrupted = torch.rand(B, T, N, device=device) < 0.45
    yield (
        "forward",
        lambda: reconstruction_loss.forward(pred, target, corrupted, None, True, True, False),
    )
    yield from _scale(reconstruction_loss.scale_, target, corrupted)


def _scale(function: Callable[..., None], gradient: Tensor, rows: Tensor) -> Iterator[Any]:
    upstream = torch.full((1,), -1.0, device=gradient.device)

    def scaled() -> Tensor:
        result = gradient.clone()
        function(result, rows, upstream)
        return result

    yield "scale", scaled


def _heatmap_loss(shape: Shape, device: str) -> Iterator[tuple[str, Call]]:
    height, width = (4 * side for side in _grid(shape))
    pred = torch.randn(shape.B, shape.K, height, width, dtype=shape.dtype, device=device)
    keypoints = torch.rand(shape.B, shape.K, 2, device=device) * width
    visible = (torch.rand(shape.B, shape.K, device=device) < 0.8).float()
    yield "forward", lambda: heatmap_loss.forward(pred, keypoints, visible, 2.0, None, True)
    yield from _scale(heatmap_loss.scale_, pred, visible)


def _warp_clips(shape: Shape, device: str) -> Iterator[tuple[str, Call]]:
    frames = torch.randint(
        0, 256, (shape.B, shape.T, 384, 288, 3), dtype=torch.uint8, device=device
    )
    turn = torch.tensor([[0.6, 0.1, 8.0], [-0.1, 0.6, 40.0]], dtype=torch.float64)
    matrices = turn.expand(shape.B, 2, 3).contiguous().to(device)
    size = tuple(16 * side for side in _grid(shape))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    planar = frames.permute(0, 1, 4, 2, 3).contiguous().permute(0, 1, 3, 4, 2)
    options = matrices, size, mean, std, shape.dtype
    yield "forward", lambda: warp_clips.forward(frames, *options)
    odd = frames[:, :, :, 1:]
    yield "forward, odd rows", lambda: warp_clips.forward(odd, *options)
    yield "forward, channels first", lambda: warp_clips.forward(planar, *options)


OPS: dict[str, Callable[[Shape, str], Iterator[tuple[str, Call]]]] = {
    "temporal_attention": _attention(temporal_attention),
    "spatial_attention": _attention(spatial_attention),
    "corrupt_tokens": _corrupt_tokens,
    "reconstruction_loss": _reconstruction_loss,
    "heatmap_loss": _heatmap_loss,
    "warp_clips": _warp_clips,
}


# -- what is launched, and what else could be -----------------------------------------------------


class Recorded(NamedTuple):
    """A launch, and the line of the table from which its configuration comes."""

    line: Line
    launched: launch.Launch


def record(call: Call, arch: int) -> list[Recorded]:
    """What ``call`` would launch on a card of capability ``arch``."""
    with launch.recording(arch) as launches, configs.noting() as lookups:
        call()
    recorded = []
    for launched in launches:
        [line] = [(n.kernel, n.variant) for n in lookups if n.config is launched.config]
        recorded.append(Recorded(line, launched))
    return recorded


@contextmanager
def pinned_to(line: Line, config: Config) -> Iterator[None]:
    """Within it ``line`` has this one configuration, on every card."""
    kernel, variant = line
    lines = configs.CONFIGS[kernel]
    configs.CONFIGS[kernel] = {**lines, variant: dict.fromkeys(lines[variant], config)}
    try:
        yield
    finally:
        configs.CONFIGS[kernel] = lines


def candidates(
    kernel: str, pinned: Config, loops: bool = True, quick: bool = False
) -> list[Config]:
    """Configurations around ``pinned``, without it.

    Each field is halved, kept or doubled (stages: one less, kept, one more), all combined; of
    these, those whose blocks hold a quarter to four times as many elements a warp.

    Args:
        kernel: its name in the table.
        pinned: the configuration that is there.
        loops: whether the kernel has a loop, without which stages change nothing.
        quick: changes one field at a time.
    """
    stages = (pinned.num_stages - 1, pinned.num_stages, pinned.num_stages + 1)
    axes = [
        *([size // 2, size, size * 2] for size in pinned.blocks.values()),
        [pinned.num_warps // 2, pinned.num_warps, pinned.num_warps * 2],
        stages if loops else stages[1:2],
    ]
    fields = (*pinned.blocks.values(), pinned.num_warps, pinned.num_stages)

    def load(config: Config) -> float:
        return math.prod(config.blocks.values()) / config.num_warps

    neighbours = []
    for values in itertools.product(*axes):
        *sizes, warps, stages = values
        changed = sum(a != b for a, b in zip(values, fields, strict=True))
        config = Config(dict(zip(pinned.blocks, sizes, strict=True)), warps, stages)
        if (
            0 < changed <= (1 if quick else len(fields))
            and min(values) >= 1
            and warps <= 16
            and overrides.allowed(kernel, config)
            and 0.25 <= load(config) / load(pinned) <= 4
        ):
            neighbours.append(config)
    return neighbours


class TunedLine(NamedTuple):
    """A line of the table, and the calls that use it."""

    line: Line
    pinned: Config
    loops: bool
    calls: list[tuple[str, Call]]

    def candidates(self, quick: bool) -> list[Config]:
        return candidates(self.line[0], self.pinned, self.loops, quick)


def targets(calls: Iterable[tuple[str, Call]], arch: int) -> list[TunedLine]:
    """The lines that ``calls`` reach, each once."""
    by_line: dict[Line, TunedLine] = {}
    for name, call in calls:
        for line, launched in record(call, arch):
            source = inspect.getsource(launched.kernel.fn)
            loops = re.search(r"\bin (tl\.)?range\(", source) is not None
            target = by_line.setdefault(line, TunedLine(line, launched.config, loops, []))
            if (name, call) not in target.calls:
                target.calls.append((name, call))
    return list(by_line.values())


def calls_of(op: str, shapes: Iterable[Shape], device: str) -> Iterator[tuple[str, Call]]:
    """The launcher calls of an op at some shapes, named."""
    for shape in shapes:
        text = " ".join(f"{k}={v}" for k, v in shape._asdict().items() if k != "dtype")
        for name, call in OPS[op](shape, device):
            yield f"{op} {name}, {text}, {str(shape.dtype)[6:]}", call


def written(config: Config) -> str:
    """As it stands in configs.py."""
    stages = [str(config.num_stages)] if config.num_stages != 1 else []
    blocks = [f"{name}={size}" for name, size in config.blocks.items()]
    return f"c({', '.join([str(config.num_warps), *stages, *blocks])})"


# -- measuring ------------------------------------------------------------------------------------


def tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else [t for t in result if t is not None]


def agree(result: Any, expected: Any) -> bool:
    """Whether two results differ by no more than sums in another order would."""
    for a, b in zip(tensors(result), tensors(expected), strict=True):
        if not b.is_floating_point():
            if not torch.equal(a, b):
                return False
        elif b.numel():
            eps = 2 * torch.finfo(b.dtype).eps + 64 * torch.finfo(torch.float32).eps
            allowed = eps * float(b.abs().nan_to_num(0, 0, 0).max())
            if not torch.allclose(a.float(), b.float(), rtol=0, atol=allowed, equal_nan=True):
                return False
    return True


def milliseconds(line: Line, call: Call, arch: int, quick: bool) -> float:
    """The time of the launches of ``call`` that use ``line``, each alone, its inputs not in L2."""
    recorded = record(call, arch)
    for _, launched in recorded:  # fills the buffers that later ones read
        run(launched)
    torch.cuda.synchronize()
    return sum(
        triton.testing.do_bench(
            lambda launched=launched: run(launched),
            warmup=10,
            rep=20 if quick else 100,
            return_mode="median",
        )
        for used, launched in recorded
        if used == line
    )


def run(launched: launch.Launch) -> None:
    """Launches what was recorded."""
    blocks = launched.config.blocks
    constants = {k: v for k, v in launched.constants.items() if k not in blocks}
    launch.launch(
        launched.kernel,
        launched.grid,
        *launched.arguments,
        config=launched.config,
        fp_fusion=launched.fp_fusion,
        **constants,
    )


class Measured(NamedTuple):
    """A configuration of a line: its time as a share of the pinned one's, or why it has none."""

    config: Config
    share: float
    milliseconds: list[float]
    failure: str = ""


def measure(
    target: TunedLine, config: Config, expected: list[Any], arch: int, quick: bool
) -> Measured:
    """Times ``config`` on the target's calls, if their results are as ``expected``."""
    times = []
    try:
        with pinned_to(target.line, config):
            for (_, call), result in zip(target.calls, expected, strict=True):
                if not agree(call(), result):
                    return Measured(config, math.inf, [], "its results differ")
                times.append(milliseconds(target.line, call, arch, quick))
    except Exception as error:  # out of shared memory, or whatever the compiler has
        return Measured(config, math.inf, [], f"{type(error).__name__}: {error}".splitlines()[0])
    return Measured(config, 1.0, times)


Estimator = Callable[[list[launch.Launch], int], float]
"""Launches and a compute capability → milliseconds."""


def estimator() -> Estimator | None:
    """What estimates launches without a card; None where the project's ``bench`` folder is not."""
    try:
        return importlib.import_module("bench.profile.model").milliseconds
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in ("bench", "tests"):
            return None
        raise


def estimate(target: TunedLine, config: Config, arch: int, estimated: Estimator) -> Measured:
    """What the launches of ``config`` should take on the target's calls."""
    try:
        with pinned_to(target.line, config):
            times = [
                estimated([one for line, one in record(call, arch) if line == target.line], arch)
                for _, call in target.calls
            ]
    except Exception as error:  # out of shared memory, or whatever the compiler has
        return Measured(config, math.inf, [], f"{type(error).__name__}: {error}".splitlines()[0])
    return Measured(config, 1.0, times)


def tune(
    target: TunedLine, arch: int, quick: bool, estimated: Estimator | None = None
) -> list[Measured]:
    """The pinned configuration and its candidates, the pinned one first, measured or estimated."""
    expected = [] if estimated else [call() for _, call in target.calls]

    def timed(config: Config) -> Measured:
        if estimated:
            return estimate(target, config, arch, estimated)
        return measure(target, config, expected, arch, quick)

    measured = [timed(target.pinned)]
    if measured[0].failure and estimated:
        return measured
    if measured[0].failure:
        raise RuntimeError(f"{target.line} as it is pinned: {measured[0].failure}")
    for config in target.candidates(quick):
        one = timed(config)
        if not one.failure:
            pinned = measured[0].milliseconds
            ratios = [a / b for a, b in zip(one.milliseconds, pinned, strict=True)]
            one = one._replace(share=math.prod(ratios) ** (1 / len(ratios)))
        measured.append(one)
    return measured


def best(measured: list[Measured]) -> Measured:
    """The fastest, or the pinned one if that gains too little."""
    fastest = min(measured, key=lambda one: one.share)
    return fastest if fastest.share < GAIN else measured[0]


# -- the program ----------------------------------------------------------------------------------


def show_ranked(target: TunedLine, ranked: list[Measured]) -> None:
    """Prints the configurations of a line by their estimates, those that cannot run last."""
    kernel, variant = target.line
    print(f"{kernel}, variant {variant!r}:")
    for name, _ in target.calls:
        print(f"  at {name}")
    for one in sorted(ranked, key=lambda one: one.share):
        times = ", ".join(f"{ms * 1e3:.1f} µs" for ms in one.milliseconds)
        mark = " (pinned)" if one is ranked[0] else ""
        print(f"  {one.failure or f'estimate {times}'}: {written(one.config)}{mark}", flush=True)


def rank(ops: list[str], shapes: Iterable[Shape], arch: int, quick: bool) -> int:
    """The program without a card."""
    estimated = estimator()
    if estimated is None:
        print(
            "there is no GPU to measure on, and nothing to estimate with: run this in a checkout "
            "of the project, whose bench folder has it; --list prints what would be tried",
            file=sys.stderr,
        )
        return 2
    print(f"there is no GPU: nothing is measured. Estimates for sm_{arch}, see docs/profile.md:")
    failed = False
    for op in ops:
        with launch.recording(arch):
            calls = list(calls_of(op, shapes, "cpu"))
        for target in targets(calls, arch):
            ranked = tune(target, arch, quick, estimated)
            show_ranked(target, ranked)
            failed |= bool(ranked[0].failure)
    return int(failed)


def show(target: TunedLine, measured: list[Measured], arch: int) -> None:
    """Prints what was measured of a line, and the line to put into configs.py."""
    kernel, variant = target.line
    chosen = best(measured)
    print(f"{kernel}, variant {variant!r}:")
    for index, (name, _) in enumerate(target.calls):
        pinned, other = measured[0].milliseconds[index], chosen.milliseconds[index]
        print(f"  {name}: pinned {pinned * 1e3:.1f} µs, best {other * 1e3:.1f} µs")
    refused = [one for one in measured if one.failure]
    print(f"  {len(measured)} configurations, of which {len(refused)} do not run")
    for one in refused:
        print(f"    {written(one.config)}: {one.failure}")
    if chosen.config != target.pinned:
        entries = {**configs.CONFIGS[kernel][variant], arch: chosen.config}
        text = ", ".join(f"{a}: {written(config)}" for a, config in sorted(entries.items()))
        print(f"  {variant!r}: {{{text}}},")
    else:
        print(f"  keep {written(target.pinned)}")


def show_unreached(reached: Iterable[Line], ops: list[str]) -> None:
    """Prints the lines of the table that no shape reaches, if all ops were asked for."""
    if set(ops) == set(OPS):
        lines = [(kernel, v) for kernel, lines in configs.CONFIGS.items() for v in lines]
        for kernel, variant in sorted(set(lines) - set(reached), key=repr):
            print(f"{kernel}, variant {variant!r}: no shape reaches it")


def show_candidates(target: TunedLine, quick: bool) -> None:
    kernel, variant = target.line
    print(f"{kernel}, variant {variant!r}: pinned {written(target.pinned)}")
    for name, _ in target.calls:
        print(f"  at {name}")
    for config in target.candidates(quick):
        print(f"  {written(config)}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m cmpose.kernels.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("op", nargs="*", help=f"of {', '.join(OPS)}; all by default")
    parser.add_argument("--quick", action="store_true", help="fewer candidates, ViT-B only")
    parser.add_argument("--json", type=Path, help="write what is faster, for CMPOSE_CONFIGS")
    parser.add_argument("--list", action="store_true", help="print the candidates, run nothing")
    parser.add_argument("--arch", type=int, help="without a card: for which (default 89)")
    options = parser.parse_args(arguments)
    for op in options.op:
        if op not in OPS:
            parser.error(f"op must be of {', '.join(OPS)}, got {op!r}")
    has_card = torch.cuda.is_available()
    if options.arch and has_card and not options.list:
        parser.error("--arch is for --list; what is measured is the card at hand")
    if options.json and not has_card and not options.list:
        parser.error("--json writes what was measured, and there is no GPU to measure on")
    shapes = SHAPES[:1] if options.quick else SHAPES
    ops = options.op or list(OPS)
    reached: list[Line] = []
    arch = options.arch or launch.INTERPRETER_ARCH
    if options.list:
        for op in ops:
            with launch.recording(arch):
                calls = list(calls_of(op, shapes, "meta"))
            for target in targets(calls, arch):
                show_candidates(target, options.quick)
                reached.append(target.line)
        show_unreached(reached, ops)
        return 0
    if not has_card:
        return rank(ops, SHAPES[:1], arch, options.quick)
    card = torch.cuda.get_device_properties(torch.cuda.current_device())
    arch = card.major * 10 + card.minor
    chosen: dict[Line, Config] = {}
    for op in ops:
        for target in targets(list(calls_of(op, shapes, "cuda")), arch):
            if target.line in reached:
                continue  # ops share kernels: the shapes of the first op that uses one decide
            reached.append(target.line)
            measured = tune(target, arch, options.quick)
            show(target, measured, arch)
            if best(measured).config != target.pinned:
                chosen[target.line] = best(measured).config
    show_unreached(reached, ops)
    if options.json:
        notes = {"card": card.name, "torch": torch.__version__, "triton": triton.__version__}
        faster = overrides.dumped(chosen, arch, **notes)
        options.json.write_text(json.dumps(faster, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
