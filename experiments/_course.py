"""Figures of what a merge does to models: coefficients by label shares, losses along paths, and weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedmerge.figures import LINES, THEME, WIDTH, styled
from fedmerge.summary import Difference

DASHES: tuple[Any, ...] = ("-", "--", ":")

Line = Sequence[tuple[float, Difference]]
"""Places on the horizontal axis, and a value with its interval there."""


def scatter_figure(panels: Mapping[str, tuple[Sequence[float], Sequence[float]]], across: str, up: str) -> Figure:
    """Draw points side by side in panels, and a line through the means of tenths of the horizontal axis.

    Args:
        panels: by title, the points' places across, in [0, 1], and up.
        across: what the horizontal axis is.
        up: what the vertical axis is.
    """
    with styled():
        figure = Figure(figsize=(WIDTH, 2.9), layout="constrained")
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (title, (x, y)) in zip(grid, panels.items(), strict=True):
            places, values = np.array(x), np.array(y)
            bins = np.minimum((10 * places).astype(int), 9)
            axes.plot(places, values, ".", color=THEME["ours"], alpha=0.35, markersize=5, markeredgewidth=0)
            filled = [number for number in range(10) if (bins == number).any()]
            means = [values[bins == number].mean() for number in filled]
            axes.plot(
                [places[bins == number].mean() for number in filled],
                means,
                color=THEME["ink"],
                marker="o",
                markersize=4,
                linewidth=1.2,
            )
            axes.set_title(title, loc="left", fontsize=8.5, color=THEME["muted"])
            axes.set_xlim(-0.03, 1.03)
            axes.grid(color=THEME["rule"], linewidth=0.6)
        figure.supxlabel(across, fontsize=8.5, color=THEME["muted"])
        figure.supylabel(up, fontsize=8.5, color=THEME["muted"])
    return figure


def paths_figure(panels: Mapping[str, tuple[str, Mapping[str, Line]]], up: str) -> Figure:
    """Draw values along paths with bands of their intervals, each panel with a legend of its own.

    Args:
        panels: by title, what the horizontal axis is, and lines by name.
        up: what the vertical axes are.
    """
    with styled():
        figure = Figure(figsize=(WIDTH, 3.2), layout="constrained")
        grid = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, (across, lines)) in zip(grid, panels.items(), strict=True):
            for number, (name, line) in enumerate(lines.items()):
                places = np.array([place for place, _ in line])
                mean = np.array([found.mean for _, found in line])
                half = np.array([found.half_width or 0.0 for _, found in line])
                look = {"color": LINES[number], "linestyle": DASHES[number % len(DASHES)]}
                axes.fill_between(places, mean - half, mean + half, color=LINES[number], alpha=0.15, linewidth=0)
                axes.plot(places, mean, label=name, linewidth=1.6, **look)
            for place in (0, 1):
                axes.axvline(place, color=THEME["muted"], linewidth=0.7)
            axes.set_title(title, loc="left", fontsize=8.5, color=THEME["muted"])
            axes.set_xlabel(across)
            axes.set_ylim(bottom=0)
            axes.grid(axis="y", color=THEME["rule"], linewidth=0.8)
            axes.legend(loc="best", frameon=False, fontsize=7.5)
        figure.supylabel(up, fontsize=8.5, color=THEME["muted"])
    return figure


def distributions_figure(tensors: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """Draw how the numbers of each tensor are distributed, a panel for each tensor and a curve for each of its sources.

    Args:
        tensors: by name, the numbers of each source.
    """
    names = list(next(iter(tensors.values())))
    with styled():
        columns = 3
        rows = -(-len(tensors) // columns)
        figure = Figure(figsize=(WIDTH, 0.4 + 1.6 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, (title, sources) in zip(grid.flat, tensors.items(), strict=False):
            reach = max(float(np.quantile(np.abs(values), 0.995)) for values in sources.values())
            edges = np.linspace(-reach, reach, 61)
            for number, values in enumerate(sources.values()):
                heights, _ = np.histogram(values, edges, density=True)
                axes.stairs(heights, edges, color=LINES[number], linestyle=DASHES[number], linewidth=1.2)
            axes.set_title(title, loc="left", fontsize=8.5, color=THEME["muted"])
            axes.set_yticks([])
        for axes in grid.flat[len(tensors) :]:
            axes.set_axis_off()
        handles = [Line2D([], [], color=LINES[number], linestyle=DASHES[number]) for number in range(len(names))]
        figure.legend(handles, names, loc="outside upper left", ncols=len(names), frameon=False)
    return figure
