"""The explaining picture: every panel shows what it says, for every kind of model."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from cmpose.viz import labels
from cmpose.viz.draw import JOINT_COLORS, cluster_colors
from cmpose.viz.explain import explain_figure
from cmpose.viz.record import read_record
from cmpose.viz.tokens import Tokens

GRID = (16, 12)
N = GRID[0] * GRID[1]


def explain(arguments, **options):
    """``explain_figure`` with the tokens' arguments among the others; None when all are absent."""
    token_fields = {
        name[7:]: value for name, value in arguments.items() if name.startswith("tokens.")
    }
    rest = {name: value for name, value in arguments.items() if not name.startswith("tokens.")}
    return explain_figure(
        **rest, **options, tokens=Tokens(**token_fields) if token_fields else None
    )


def arguments(seed=0, n=4, clusters=32):
    rng = np.random.default_rng(seed)
    keypoints = rng.uniform(20, 170, (15, 2))
    y, x = np.mgrid[:64, :48]
    heatmaps = np.exp(
        -((x - keypoints[:, 0, None, None] / 4) ** 2 + (y - keypoints[:, 1, None, None] / 4) ** 2)
        / 8
    )
    scores = rng.random((15, N))
    order = np.argsort(-scores, axis=1)
    causal = np.sort(rng.permutation(N)[: 15 * n])
    noncausal = np.setdiff1d(np.arange(N), causal)
    return {
        "crop": rng.integers(0, 255, (256, 192, 3), np.uint8),
        "heatmaps": heatmaps,
        "keypoints": keypoints,
        "scores": rng.random(15),
        "tokens.grid": GRID,
        "tokens.scores": scores / scores.sum(axis=1, keepdims=True),
        "tokens.top": order[:, :n],
        "tokens.causal": causal,
        "tokens.noncausal": noncausal,
        "tokens.assignment": rng.integers(0, clusters, len(noncausal)),
        "tokens.centers": rng.choice(len(noncausal), clusters, replace=False),
    }


def has_color(image, color, tolerance=12):
    return bool((np.abs(image.astype(int) - np.array(color)).max(axis=2) <= tolerance).any())


def test_texts_are_drawn_once():
    """Drawing them took longer than all else in a picture."""
    explain(arguments(), title="clip 3")
    drawn = labels._ink.cache_info().misses
    again = explain(arguments(), title="another clip")
    assert labels._ink.cache_info().misses == drawn + 1
    assert (again != explain(arguments(), title="clip 3")).any()


def test_writes_one_picture(tmp_path):
    path = tmp_path / "new" / "explain.png"
    image = explain(arguments(), title="clip 3", path=path)
    assert image.shape == (1000, 1600, 3)
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(cv2.imread(str(path))[..., ::-1], image)
    # Nothing temporary, and the record that `cmpose report` reads.
    assert sorted(e.name for e in path.parent.iterdir()) == ["explain.json", "explain.png"]
    assert read_record(path.with_suffix(".json"))["title"] == "clip 3"
    for color in JOINT_COLORS:  # in the colour key, and in the causal map's frames
        assert has_color(image[:, 1400:], color)
    np.testing.assert_array_equal(image, explain(arguments(), title="clip 3"))


def test_panels_follow_their_arguments():
    base = explain(arguments())
    large, small = slice(100, 548), slice(620, 980)

    def changed(change):
        image = explain({**arguments(), **change})
        return (image != base).any(axis=2)

    example = arguments()
    heat = changed({"heatmaps": example["heatmaps"][::-1]})
    assert heat[large, 370:706].any()
    assert not heat[large, 720:].any()
    top = changed({"tokens.top": (example["tokens.top"] + 1) % N})
    assert top[small].any()
    assert not top[large].any()
    clusters = changed({"tokens.assignment": (example["tokens.assignment"] + 1) % 32})
    assert clusters[large, 1070:1406].any()
    assert not clusters[small].any()
    assert not clusters[large, :1070].any()
    assert changed({"scores": np.zeros(15)})[large, 1420:].any()


@pytest.mark.parametrize("fine", ["causal_only", "off"])
def test_models_without_clusters_or_tokens(fine):
    example = arguments()
    full = explain(example)
    absent = ["tokens.assignment", "tokens.centers"]
    if fine == "off":
        absent += [
            "tokens.grid",
            "tokens.scores",
            "tokens.top",
            "tokens.causal",
            "tokens.noncausal",
        ]
    image = explain({key: value for key, value in example.items() if key not in absent})
    np.testing.assert_array_equal(image[100:548, :706], full[100:548, :706])
    assert (image[100:548, 1070:1406] != full[100:548, 1070:1406]).any()


def test_other_shapes():
    """A tiny model's crop, a joint that is nowhere, heatmaps of nothing."""
    example = arguments()
    example["crop"] = example["crop"][:128, :96]
    example["heatmaps"] = np.zeros((15, 32, 24))
    example["keypoints"] = np.full((15, 2), np.nan)
    example["scores"] = np.zeros(15)
    assert explain(example).shape == (1000, 1600, 3)


def test_cluster_colours_differ():
    colors = cluster_colors(32)
    assert len(np.unique(colors, axis=0)) == 32
    assert cluster_colors(0).shape == (0, 3)


BAD = {
    "crop": ({"crop": np.zeros((8, 8))}, r"crop must be uint8 \[H, W, 3\], got float64"),
    "keypoints": ({"keypoints": np.zeros((17, 2))}, r"keypoints must have shape \(15, 2\)"),
    "scores": ({"scores": np.zeros(17)}, r"scores must have shape \(15,\)"),
    "heatmaps": ({"heatmaps": np.zeros((17, 4, 4))}, r"heatmaps must be \[15, h, w\]"),
    "grid": ({"tokens.grid": (8, 6)}, r"tokens.scores must be \[15, 48\] for grid \(8, 6\)"),
    "top": ({"tokens.top": np.zeros((14, 4), int)}, r"tokens.top must be \[15, n\]"),
    "range": ({"tokens.causal": np.array([192])}, r"tokens.causal must be in 0..191, got 192..192"),
    "only centers": ({"tokens.assignment": None}, "come together, give both or neither"),
    "tokens.assignment": (
        {"tokens.assignment": np.zeros(3, int)},
        r"tokens.assignment must have noncausal's shape",
    ),
    "cluster": ({"tokens.centers": np.array([0])}, r"tokens.assignment must be in 0..0, got 0..31"),
    "centre": (
        {"tokens.centers": np.arange(101, 133)},
        r"centers must be in 0..131, got 101..132",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_errors(case):
    change, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        explain({**arguments(), **change})
