"""Plots of an ablation study: differences to the full model, and AP against a ratio."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cmpose.evaluation.intervals import Interval, interval
from cmpose.files import write_text

COLORS = {"all": "#222222", "clean": "#2c7a51", "occluded": "#b3402e", "defocused": "#3b6fb6"}


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    """A figure and its axes.

    Args:
        width: inches.
        height: inches.
        columns: how many axes beside one another; if more than one, they come as an array.
    """
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "cmpose"  # the same numbers give the same file
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, columns, sharey=True)


def save_svg(figure: Any, path: Path) -> None:
    """Writes a figure as SVG without a date."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None})
    lines = file.getvalue().decode().splitlines()
    write_text(path, "\n".join(line.rstrip() for line in lines) + "\n")


def difference_plot(
    rows: Sequence[tuple[str, Mapping[str, Interval | None]]], subsets: Sequence[str], path: Path
) -> None:
    """AP less the full model's, as points with 95 % intervals: a row a setting, a colour a subset.

    Args:
        rows: (label, subset → difference).
        subsets: in the order drawn.
        path: SVG file.
    """
    figure, axes = new_figure(7.5, 1.0 + 0.2 * len(rows) * max(len(subsets), 2))
    for index, subset in enumerate(subsets):
        shift = (index - (len(subsets) - 1) / 2) * 0.8 / max(len(subsets), 1)
        points = [
            (row + shift, differences[subset])
            for row, (_, differences) in enumerate(rows)
            if differences.get(subset) is not None
        ]
        intervals = [(y, difference) for y, difference in points if difference is not None]
        axes.errorbar(
            [difference.mean for _, difference in intervals],
            [y for y, _ in intervals],
            xerr=[difference.half or 0.0 for _, difference in intervals],
            fmt="o",
            markersize=4,
            capsize=2,
            color=COLORS.get(subset),
            label=subset,
        )
    axes.axvline(0.0, color="#888888", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("AP − full model, 95 % interval over seeds")
    axes.legend(fontsize=7)
    save_svg(figure, path)


def ratio_plot(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, Mapping[int, float]]]]], path: Path
) -> None:
    """AP against a ratio: mean, 95 % interval, and every seed as a dot.

    Args:
        panels: by the label of the x axis, then by subset: (ratio, AP by seed), ratios ascending.
        path: SVG file.
    """
    figure, axes = new_figure(9.0, 3.8, columns=len(panels))
    for axis, (label, subsets) in zip(axes, panels.items(), strict=True):
        for index, (subset, points) in enumerate(subsets.items()):
            color = COLORS.get(subset)
            # So that the subsets' bars do not cover one another.
            shift = 0.006 * (index - (len(subsets) - 1) / 2)
            points = [(x + shift, values) for x, values in points]
            means = [(x, interval(list(values.values()))) for x, values in points]
            intervals = [(x, mean) for x, mean in means if mean is not None]
            axis.errorbar(
                [x for x, _ in intervals],
                [mean.mean for _, mean in intervals],
                yerr=[mean.half or 0.0 for _, mean in intervals],
                marker="o",
                markersize=4,
                capsize=2,
                color=color,
                label=subset,
            )
            for x, values in points:
                axis.scatter([x] * len(values), list(values.values()), s=6, color=color, alpha=0.5)
        axis.set_xlabel(label)
    axes[0].set_ylabel("AP")
    axes[0].legend(fontsize=7)
    save_svg(figure, path)
