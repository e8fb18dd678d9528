"""bench.parity: what counts as the same learning, and the page it writes."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from bench import parity
from cmpose import provenance
from cmpose.train.float16_sums import Float16Sums
from tests.recipes import recipe
from tests.train.test_products import on_card


def curves(shift, seeds=3, steps=40, wiggle=0.0):
    """A falling plain curve a seed, 0.5 apart, and a fast one that is ``shift`` off."""
    base = np.linspace(10.0, 2.0, steps)
    signs = [1.0, -1.0, 0.3]
    return {
        parity.PLAIN: {s: list(base + 0.5 * s) for s in range(seeds)},
        "compile": {s: list(base + 0.5 * s + shift + wiggle * signs[s]) for s in range(seeds)},
    }


def test_distances_by_hand():
    assert parity.distance([1.0] * 20, [1.5] * 20) == pytest.approx(0.5)
    # Noise that alternates from step to step is averaged away; a level is not.
    assert parity.distance([1.0, -1.0] * 20, [0.0] * 40) == pytest.approx(0.0)
    assert parity.final([9.0] * 6 + [1.0, 3.0]) == pytest.approx(2.0)


def test_rounding_passes_and_another_level_does_not():
    result = parity.compare(curves(0.0, wiggle=0.01))["compile"]
    # Pairs of seeds are 0.5, 0.5 and 1 apart.
    assert result["seed_distance"] == pytest.approx(2 / 3)
    assert result["speed_distance"] == pytest.approx(0.01 * 2.3 / 3)
    assert result["passed"]
    shifted = parity.compare(curves(0.1, wiggle=0.01))["compile"]
    assert shifted["ratio"] < 1, "small beside the seeds, but always in one direction"
    assert shifted["final_difference"][0] == pytest.approx(0.101)
    assert not shifted["passed"]
    assert not parity.compare(curves(0.0, wiggle=2.0))["compile"]["passed"]


def test_one_seed_shows_no_noise(capsys):
    with pytest.raises(SystemExit, match="2"):
        parity.main(["--seeds", "1"])
    assert "give at least 2" in capsys.readouterr().err


@pytest.mark.parametrize(("shift", "status", "verdict"), [(0.0, 0, "yes"), (0.1, 1, "no")])
def test_what_is_written(tmp_path, monkeypatch, shift, status, verdict):
    config = parity.configuration.load(provenance.PROJECT / "configs" / "ablate_cpu.yaml")
    losses = curves(shift, wiggle=0.01)
    ap = {name: {seed: 40.0 + seed for seed in runs} for name, runs in losses.items()}
    monkeypatch.setattr(parity, "measure", lambda *arguments: (losses, ap, config))
    folder = tmp_path / "parity"
    shutil.copy(provenance.PROJECT / "docs" / "parity.md", tmp_path)
    assert parity.main(["--seeds", "3", "--output", str(folder)]) == status
    [record] = folder.glob("*.json")
    assert json.loads(record.read_text())["curves"]["compile"]["0"]
    page = (tmp_path / "parity.md").read_text()
    assert f"| {verdict} |" in page
    assert f"](parity/{record.stem}.svg)" in page
    assert record.with_suffix(".svg").is_file()
    assert "3 seeds, 40 steps of 4 clips each" in page


def test_products_are_a_cards_own_where_it_takes_them(monkeypatch):
    def products_of(device):
        fields = parity.variants(device, of="products").values()
        return [(own.get("train.products"), own.get("train.precision")) for own in fields]

    always, sums = [(None, None), (None, "fp16")], ("fp16_accumulate_emulated", "fp16")
    assert products_of("cpu") == [*always, ("fp8_emulated", None), sums]
    on_card(monkeypatch, "NVIDIA GeForce RTX 4090", (8, 9))
    assert products_of("cuda") == [*always, ("fp8", "bf16"), ("fp16_accumulate", "fp16")]
    on_card(monkeypatch, "NVIDIA H200", (9, 0))
    assert products_of("cuda") == [*always, ("fp8", "bf16"), sums]


def test_a_cpu_takes_a_cards_float16_products(tmp_path):
    a, b = torch.full((1, 3000), 1.0).half(), torch.full((3000, 1), 1.0).half()
    for fields, expected in (
        ({"train.precision": "fp16"}, [Float16Sums]),
        ({"train.precision": "fp16", "train.products": "fp16_accumulate_emulated"}, []),
        ({"train.precision": "fp32"}, []),
    ):
        with parity.float16_products(recipe(tmp_path, **fields)):
            assert [type(mode) for mode in _get_current_dispatch_mode_stack()] == expected
            if expected:
                assert (a @ b).item() == 3000


def test_the_page_is_what_the_committed_curves_give(tmp_path):
    shutil.copytree(provenance.PROJECT / "docs" / "parity", tmp_path / "parity")
    shutil.copy(provenance.PROJECT / "docs" / "parity.md", tmp_path)
    written = parity.write_page(tmp_path / "parity").read_text()
    assert written == (provenance.PROJECT / "docs" / "parity.md").read_text()
