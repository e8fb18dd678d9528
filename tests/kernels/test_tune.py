"""The tuning program, as far as it runs without a card, and the file of overrides it writes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from cmpose.kernels import configs, launch, overrides, tune
from cmpose.kernels.configs import c, config
from cmpose.kernels.launch import Config, arch_of
from tests.kernels.compile_check import OPS

# -- candidates -----------------------------------------------------------------------------------


def test_candidates_are_the_neighbours() -> None:
    pinned = c(4, 2, ROWS=16, BLOCK_D=64)
    candidates = tune.candidates("any", pinned)
    assert pinned not in candidates
    assert len({repr(one) for one in candidates}) == len(candidates)
    for one in candidates:
        assert list(one.blocks) == ["ROWS", "BLOCK_D"]
        assert one.blocks["ROWS"] in (8, 16, 32)
        assert one.blocks["BLOCK_D"] in (32, 64, 128)
        assert one.num_warps in (2, 4, 8)
        assert one.num_stages in (1, 2, 3)
    assert c(8, 3, ROWS=32, BLOCK_D=64) in candidates
    assert c(2, 2, ROWS=32, BLOCK_D=128) not in candidates  # eight times as much a warp
    quick = tune.candidates("any", pinned, quick=True)
    assert len(quick) == 8
    assert all(one in candidates for one in quick)
    straight = tune.candidates("any", pinned, loops=False)
    assert {one.num_stages for one in straight} == {2}
    assert c(8, 2, ROWS=32, BLOCK_D=64) in straight


def test_candidates_at_the_ends() -> None:
    candidates = tune.candidates("any", c(1, BLOCK=1), quick=True)
    assert sorted(candidates, key=repr) == sorted(
        [c(1, BLOCK=2), c(2, BLOCK=1), c(1, 2, BLOCK=1)], key=repr
    )
    assert all(one.num_warps <= 16 for one in tune.candidates("any", c(16, BLOCK=4096)))
    assert tune.candidates("any", c(4), loops=False) == [c(2), c(8)]


@pytest.mark.parametrize("kernel", overrides.RANGES)
def test_candidates_stay_where_the_kernel_works(kernel: str) -> None:
    for line in configs.CONFIGS[kernel].values():
        for pinned in line.values():
            assert overrides.allowed(kernel, pinned)
            candidates = tune.candidates(kernel, pinned)
            assert candidates
            assert all(overrides.allowed(kernel, one) for one in candidates)
            beyond = pinned._replace(num_warps=overrides.RANGES[kernel]["num_warps"][1] * 2)
            assert not overrides.allowed(kernel, beyond)


def test_ranges_name_fields_that_are_there() -> None:
    for kernel, ranges in overrides.RANGES.items():
        for line in configs.CONFIGS[kernel].values():
            for pinned in line.values():
                assert set(ranges) <= {*pinned.blocks, "num_warps", "num_stages"}


# -- a kernel to tune -----------------------------------------------------------------------------


@triton.jit
def copy_kernel(x_ptr, y_ptr, size, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """y ← x, except that it is wrong on purpose where CHUNK is not 16."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    for _ in range(1):
        x = tl.load(x_ptr + index, mask=index < size, other=0)
        tl.store(y_ptr + index, x + (CHUNK - 16), mask=index < size)


def copied(x: Tensor) -> Tensor:
    pinned = config("copy", None, arch_of(x))
    if pinned.num_warps == 8:
        raise RuntimeError("out of resource: shared memory\nand more")
    y = torch.empty_like(x)
    grid = (triton.cdiv(x.numel(), pinned.blocks["BLOCK"]),)
    launch.launch(copy_kernel, grid, x, y, x.numel(), config=pinned)
    other = config("other", 7, arch_of(x))
    launch.launch(copy_kernel, (1,), x, y, min(x.numel(), 32), config=other)
    return y


TABLE: overrides.Table = {
    "copy": {None: {80: c(4, BLOCK=32, CHUNK=16), 90: c(4, BLOCK=64, CHUNK=16)}},
    "other": {7: {80: c(4, BLOCK=32, CHUNK=16)}},
}


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(configs, "CONFIGS", copy.deepcopy(TABLE))


@pytest.fixture
def target(table: None, device: str) -> tune.TunedLine:
    x = torch.arange(100.0, device=device)
    first, second = tune.targets([("copy 100", lambda: copied(x))], 89)
    assert second.line == ("other", 7)
    return first


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """Replaces the card's clock: a launch takes one millisecond for each of its programs."""
    configurations = []

    def do_bench(function: Callable[[], None], **options: Any) -> float:
        assert options["return_mode"] == "median"
        with launch.recording(89) as launches:
            function()
        function()
        [launched] = launches
        configurations.append(launched.config)
        return float(launched.grid[0])

    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return configurations


def test_a_line_is_measured_in_all_its_calls_and_alone(
    target: tune.TunedLine, timed: list[Config]
) -> None:
    assert target.line == ("copy", None)
    assert target.pinned == c(4, BLOCK=32, CHUNK=16)
    assert target.loops
    measured = tune.tune(target, 89, quick=True)
    assert measured[0].config == target.pinned
    assert measured[0].milliseconds == [4.0]
    by_config = {tune.written(one.config): one for one in measured[1:]}
    assert len(by_config) == len(measured) - 1 == 8 - 1  # no stage below one
    assert by_config["c(4, BLOCK=64, CHUNK=16)"].share == 0.5
    assert by_config["c(4, BLOCK=16, CHUNK=16)"].share == 7 / 4
    for wrong in ("c(4, BLOCK=32, CHUNK=32)", "c(4, BLOCK=32, CHUNK=8)"):
        assert by_config[wrong].failure == "its results differ"
    failure = by_config["c(8, BLOCK=32, CHUNK=16)"].failure
    assert failure == "RuntimeError: out of resource: shared memory"
    assert tune.best(measured) is by_config["c(4, BLOCK=64, CHUNK=16)"]
    # The other line's launch is never among what is timed, nor is what fails.
    assert len(timed) == len(measured) - 3
    assert configs.CONFIGS == TABLE


def test_a_small_gain_is_none() -> None:
    pinned, little, much = (
        tune.Measured(c(warps), share, [share]) for warps, share in ((4, 1.0), (2, 0.985), (8, 0.9))
    )
    assert tune.best([pinned, little]) is pinned
    assert tune.best([pinned, much, little]) is much


def test_a_pinned_configuration_that_fails_is_no_yardstick(
    table: None, device: str, timed: list[Config]
) -> None:
    x = torch.arange(9.0, device=device)
    calls = iter(range(100))

    def changing() -> Tensor:
        return copied(x) + next(calls)

    [first, _] = tune.targets([("changing", changing)], 89)
    with pytest.raises(RuntimeError, match="as it is pinned: its results differ"):
        tune.tune(first, 89, quick=True)


def test_what_it_prints_can_be_put_into_the_table(
    target: tune.TunedLine, timed: list[Config], capsys: pytest.CaptureFixture[str]
) -> None:
    measured = tune.tune(target, 90, quick=True)
    tune.show(target, measured, 90)
    text = capsys.readouterr().out
    assert "copy, variant None:" in text
    assert "copy 100: pinned" in text
    assert "c(4, BLOCK=32, CHUNK=32): its results differ" in text
    [line] = [line for line in text.splitlines() if line.endswith("},")]
    assert line == "  None: {80: c(4, BLOCK=32, CHUNK=16), 90: c(4, BLOCK=64, CHUNK=16)},"
    assert eval("{" + line + "}", {"c": c}) == {None: TABLE["copy"][None]}
    tune.show(target, measured[:1], 90)
    assert "keep c(4, BLOCK=32, CHUNK=16)" in capsys.readouterr().out


def test_agreement() -> None:
    x = torch.linspace(-1, 1, 999)
    flags = torch.tensor([True, False])
    nan = torch.tensor([1.0, float("nan")])
    assert tune.agree((x, flags, nan), (x, flags, nan))
    assert tune.agree(x, x + 2**-22)
    assert not tune.agree(x, x * 1.001)
    assert tune.agree(x.half(), (x * 1.0005).half())
    assert not tune.agree(x.half(), (x * 1.01).half())
    assert not tune.agree(flags, ~flags)
    assert not tune.agree(nan, torch.tensor([1.0, 2.0]))
    assert tune.agree(x[:0], x[:0])


def test_a_line_is_pinned_to_one_configuration_only_within(table: None) -> None:
    with tune.pinned_to(("copy", None), c(1, BLOCK=8, CHUNK=16)):
        assert all(config("copy", None, arch).blocks["BLOCK"] == 8 for arch in (80, 90, 120))
        assert config("other", 7, 80).blocks["BLOCK"] == 32
    assert configs.CONFIGS == TABLE
    with pytest.raises(KeyError), tune.pinned_to(("copy", None), c(1, BLOCK=8, CHUNK=16)):
        raise KeyError
    assert configs.CONFIGS == TABLE


# -- the program ----------------------------------------------------------------------------------


def test_the_list_names_every_line_it_reaches(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["heatmap_loss", "warp_clips", "--list", "--arch", "90"]) == 0
    text = capsys.readouterr().out
    assert "heatmap_loss_forward, variant " in text
    line = configs.CONFIGS["warp_clips"]
    for variant in line:
        assert f"warp_clips, variant {variant!r}: pinned " in text
    assert "heatmap_loss forward, B=32 T=3 N=192 K=15 D=768 H=12, bfloat16" in text
    assert text.count("\n") > 20
    assert tune.main(["heatmap_loss", "--list", "--quick"]) == 0
    assert len(capsys.readouterr().out) < len(text)


def test_it_knows_every_op_and_says_which_lines_it_does_not_reach(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert set(tune.OPS) == set(OPS)
    assert tune.main(["--list"]) == 0
    text = capsys.readouterr().out
    for kernel, lines in configs.CONFIGS.items():
        for variant in lines:
            assert f"{kernel}, variant {variant!r}: " in text


def test_wrong_arguments(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for arguments, message in (
        (["dpc_knn"], "op must be of temporal_attention, "),
        (["--arch", "90"], "--arch is for --list"),
    ):
        with pytest.raises(SystemExit, match="2"):
            tune.main(arguments)
        assert message in capsys.readouterr().err


NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@NO_GPU
def test_without_a_card_configurations_are_ranked_by_the_estimate(
    table: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    x = torch.arange(100.0)

    def calls(shape: tune.Shape, device: str) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        assert device == "cpu"
        yield "forward", lambda: copied(x)

    def milliseconds(launches: list[launch.Launch], arch: int) -> float:
        assert arch == 90
        [one] = launches
        return 1 / one.config.blocks["BLOCK"]

    monkeypatch.setattr(tune, "OPS", {"copy_op": calls})
    monkeypatch.setattr(tune, "estimator", lambda: milliseconds)
    assert tune.main(["--quick", "--arch", "90"]) == 0
    first, *rows = capsys.readouterr().out.splitlines()
    assert first == (
        "there is no GPU: nothing is measured. Estimates for sm_90, see docs/profile.md:"
    )
    for section in "\n".join(rows).split(", variant ")[1:]:
        ranked = [row for row in section.splitlines() if "c(" in row]
        times = [float(row.split()[1]) for row in ranked if "estimate" in row]
        assert times == sorted(times)
        assert len(times) > 2
        assert sum("(pinned)" in row for row in ranked) == 1
        failed = ["RuntimeError: out of resource: shared memory" in row for row in ranked]
        assert failed == sorted(failed)  # those that cannot run come last
    assert sum("c(8, " in row for row in rows if "RuntimeError" in row) > 0

    def unknown(launches: list[launch.Launch], arch: int) -> float:
        raise ValueError("no such instruction")

    monkeypatch.setattr(tune, "estimator", lambda: unknown)
    assert tune.main(["--quick", "--arch", "90"]) == 1
    assert "  ValueError: no such instruction: c(4, BLOCK=64, " in capsys.readouterr().out


@NO_GPU
def test_without_a_card_or_the_bench_folder_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tune, "estimator", lambda: None)
    assert tune.main(["heatmap_loss"]) == 2
    assert "there is no GPU to measure on, and nothing to estimate with" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        tune.main(["heatmap_loss", "--json", "file"])
    assert "--json writes what was measured" in capsys.readouterr().err


def test_no_bench_folder_is_no_estimator(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="bench")

    monkeypatch.setattr(tune.importlib, "import_module", missing)
    assert tune.estimator() is None


def test_the_whole_program(
    table: None,
    device: str,
    timed: list[Config],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With a replaced clock and the name of a card, but with real launches."""
    x = torch.arange(100.0, device=device)

    def calls(shape: tune.Shape, device: str) -> Iterator[tuple[str, Callable[[], Tensor]]]:
        assert device == "cuda"
        yield "forward", lambda: copied(x)

    card = types.SimpleNamespace(major=8, minor=9, name="a card")
    monkeypatch.setattr(tune, "OPS", {"copy_op": calls})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    file = tmp_path / "found.json"
    assert tune.main(["--quick", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    assert "copy_op forward, B=32 T=3 N=192 K=15 D=768 H=12, bfloat16: pinned 4000.0 µs" in text
    assert "no shape reaches" not in text
    document = json.loads(file.read_text())
    assert document["card"] == "a card"
    assert document["triton"] == triton.__version__
    new = overrides.merged(TABLE, document, "found")
    assert new["copy"][None][89] == c(4, BLOCK=64, CHUNK=16)
    assert new["other"] == TABLE["other"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    assert tune.main(["heatmap_loss", "--quick", "--json", str(file)]) == 0
    assert "heatmap_loss_forward, variant " in capsys.readouterr().out
    document = json.loads(file.read_text())
    assert document["card"] == torch.cuda.get_device_name()
    overrides.merged(configs.CONFIGS, document, "found")


# -- overrides ------------------------------------------------------------------------------------


def test_what_is_written_is_read(table: None) -> None:
    faster = c(8, 3, BLOCK=128, CHUNK=64)
    written = json.loads(json.dumps(overrides.dumped({("copy", None): faster}, 89, card="a card")))
    assert written["card"] == "a card"
    new = overrides.merged(TABLE, written, "file")
    assert new["copy"][None] == {**TABLE["copy"][None], 89: faster}
    assert new["other"] == TABLE["other"]
    assert 89 not in TABLE["copy"][None]
    assert list(new["copy"][None][89].blocks) == list(faster.blocks)


def test_the_environment_names_the_file(tmp_path: Path) -> None:
    """In a new process, as users have it, for a line of the shipped table."""
    kernel, lines = next(iter(configs.CONFIGS.items()))
    variant, line = next(iter(lines.items()))
    pinned = line[min(line)]
    changed = pinned._replace(num_stages=7)
    file = tmp_path / "faster.json"
    file.write_text(json.dumps(overrides.dumped({(kernel, variant): changed}, 89)))
    code = (
        "from cmpose.kernels.configs import config;"
        f"print([config({kernel!r}, {variant!r}, arch) for arch in (80, 89)])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, overrides.VARIABLE: str(file)},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    first, second = eval(done.stdout, {"Config": Config})
    assert first == pinned
    assert second.num_stages == 7
    missing = {overrides.VARIABLE: str(tmp_path / "missing.json")}
    with pytest.raises(ValueError, match=r"CMPOSE_CONFIGS=.*missing.json cannot be read: No such"):
        overrides.load(TABLE, missing)
    file.write_text("{")
    with pytest.raises(ValueError, match=r"CMPOSE_CONFIGS=.*faster.json is not JSON: "):
        overrides.load(TABLE, {overrides.VARIABLE: str(file)})
    assert overrides.load(TABLE, {}) is TABLE


def entry(**changes: Any) -> dict[str, Any]:
    right = {"num_warps": 4, "num_stages": 1, "blocks": {"BLOCK": 32, "CHUNK": 16}}
    return {"configs": {"copy": {"None": {"89": {**right, **changes}}}}}


WRONG: list[tuple[Any, str]] = [
    ([], r"^file must be an object, got \[\]"),
    ({"config": {}}, r"^file must be an object with the key 'configs', got \['config'\]"),
    ({"configs": {"copies": {}}}, "configs.copies must be one of the kernels copy, other, got"),
    ({"configs": {"copy": {"7": {}}}}, "configs.copy must be of the variants None, got '7'"),
    ({"configs": {"copy": {"None": 3}}}, r"configs.copy\[None\] must be an object, got 3"),
    ({"configs": {"copy": {"None": {"8.9": {}}}}}, "compute capabilities such as 89, got '8.9'"),
    ({"configs": {"copy": {"None": {"89": {}}}}}, "an object of blocks, num_stages, num_warps"),
    (entry(waves=3), "an object of blocks, num_stages, num_warps, got .*'waves'"),
    (entry(num_warps=3), r"\.89\.num_warps must be a power of two from 1 to 32, got 3"),
    (entry(num_warps=64), "num_warps must be .* got 64"),
    (entry(num_warps=True), "num_warps must be .* got True"),
    (entry(num_warps="4"), "num_warps must be .* got '4'"),
    (entry(num_stages=0), "num_stages must be a whole number from 1 to 8, got 0"),
    (entry(blocks={"BLOCK": 32}), r"blocks must be an object of BLOCK, CHUNK, got \['BLOCK'\]"),
    (entry(blocks={"BLOCK": 48, "CHUNK": 16}), "blocks.BLOCK must be a power of two .* got 48"),
    (entry(blocks=[32, 16]), r"blocks must be an object, got \[32, 16\]"),
]


@pytest.mark.parametrize(("planted", "message"), WRONG, ids=[m for _, m in WRONG])
def test_a_wrong_file_is_refused(planted: Any, message: str) -> None:
    overrides.merged(TABLE, entry(), "file")
    with pytest.raises(ValueError, match=message):
        overrides.merged(TABLE, planted, "file")


def test_a_file_beyond_what_a_kernel_works_with_is_refused() -> None:
    kernel = "corrupt_tokens_forward"
    variant, line = next(iter(configs.CONFIGS[kernel].items()))
    pinned = next(iter(line.values()))
    planted = overrides.dumped({(kernel, variant): pinned._replace(num_warps=2)}, 89)
    with pytest.raises(ValueError, match=r"must be within .*'num_warps': \(1, 1\)"):
        overrides.merged(configs.CONFIGS, planted, "file")
