"""Figures of a benchmark: accuracy against a setting, who has which classes, what each class and each coefficient got.

They follow `figures`: every figure belongs to nobody else, shapes repeat what colours say, and a page may replace the
theme's colours. Several panels share their axes, so that they can be compared.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fedmerge.figures import DARKEST, LINES, THEME, WIDTH, name_places, shortened, styled
from fedmerge.summary import Difference, Row

COLOURS = (*LINES[:5], LINES[6], THEME["ink"], LINES[5])
MARKERS = ("o", "D", "s", "^", "v", "P", "X", "<", ">")  # one more than colours: 72 looks differ
PANEL_HEIGHT = 2.3  # inches
TITLE_LENGTH = 80  # letters that the titles of panels side by side have together
DODGE = 0.008  # share of an axis between the marks of neighbouring methods
MOST_MARKED = 12  # points of a curve with large marks
MOST_NUMBERS = 6  # columns of a panel whose cells hold a number
MOST_LAYERS = 40  # rows that all have their names


@dataclass(frozen=True)
class Curve:
    """A method's accuracy along an axis.

    Attributes:
        name: for the legend.
        points: where on the axis, and the accuracy there, with its interval.
        ours: whether it is a form of NP Merge.
        ensemble: whether it is an ensemble.
    """

    name: str
    points: Sequence[tuple[float, Difference]]
    ours: bool = False
    ensemble: bool = False


def curves_figure(
    panels: Mapping[str, Sequence[Curve]],
    axis: str,
    *,
    order: Sequence[str] = (),
    ticks: Mapping[float, str] | None = None,
    apart: bool = True,
) -> Figure:
    """Draw curves with their intervals, one panel for each entry.

    Args:
        panels: at least one, by title.
        axis: what the horizontal axis is.
        order: names in the order of their looks, so that a method looks alike in all figures; others come after them.
        ticks: what to write where; None: numbers.
        apart: whether curves are drawn a little to the side of each other, with bars; else bands are their intervals.
    """
    shown = {curve.name: curve for curve in _all(panels)}
    ranks = {name: rank for rank, name in enumerate(dict.fromkeys((*order, *shown)))}
    names = sorted(shown, key=lambda name: (not shown[name].ours, ranks[name]))
    looks = {name: _look(ranks[name], shown[name].ours, shown[name].ensemble) for name in names}
    places = [x for curve in _all(panels) for x, _ in curve.points]
    step = DODGE * (max(places) - min(places)) if apart else 0.0
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    height = 0.5 + 0.1 * len(names) + PANEL_HEIGHT * rows * (1.2 if columns == 1 else 1)
    with styled():
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
        for axes, (title, curves) in zip(grid.flat, panels.items(), strict=False):
            wrapped = textwrap.fill(title, TITLE_LENGTH // columns)
            axes.set_title(wrapped, loc="left", fontsize=8.5, color=THEME["muted"])
            for curve in curves:
                shift = step * (names.index(curve.name) - (len(names) - 1) / 2)
                _draw(axes, curve, looks[curve.name], shift, bars=apart)
            axes.grid(axis="y", color=THEME["rule"], linewidth=0.8)
            axes.tick_params(labelbottom=True)
        for axes in grid.flat[len(panels) :]:
            axes.set_axis_off()
        means = [100 * found.mean for curve in _all(panels) for _, found in curve.points]
        room = max(1.0, 0.1 * (max(means) - min(means)))
        grid.flat[0].set_ylim(min(means) - room, max(means) + room)
        if ticks is not None:
            grid.flat[0].set_xticks(list(ticks), list(ticks.values()))
        elif all(float(place).is_integer() for place in places):
            grid.flat[0].xaxis.set_major_locator(MaxNLocator(9, integer=True, steps=[1, 2, 5, 10]))
        figure.supxlabel(axis, fontsize=8.5, color=THEME["muted"])
        figure.supylabel("accuracy, %", fontsize=8.5, color=THEME["muted"])
        handles = [Line2D([], [], label=shortened(name, 44), **looks[name]) for name in names]
        figure.legend(handles=handles, loc="outside upper left", ncols=2, frameon=False, handlelength=2.6)
    return figure


def _all(panels: Mapping[str, Sequence[Curve]]) -> list[Curve]:
    return [curve for curves in panels.values() for curve in curves]


def _draw(axes: Axes, curve: Curve, look: Mapping[str, Any], shift: float, *, bars: bool) -> None:
    x = np.array([place for place, _ in curve.points], dtype=float) + shift
    mean = np.array([100 * found.mean for _, found in curve.points])
    half = np.array([100 * (found.half_width or 0) for _, found in curve.points])
    if bars or len(x) == 1:
        axes.errorbar(x, mean, yerr=half, linestyle="", color=look["color"], elinewidth=0.9, alpha=0.6, zorder=1)
    else:
        axes.fill_between(x, mean - half, mean + half, color=look["color"], alpha=0.15, linewidth=0)
    dense = {"markersize": 3} if len(x) > MOST_MARKED else {}
    axes.plot(x, mean, **{**look, **dense})


def _look(rank: int, ours: bool, ensemble: bool) -> dict[str, Any]:
    colour = COLOURS[rank % len(COLOURS)]
    return {
        "color": colour,
        "linestyle": "-" if ours else ":" if ensemble else "--",
        "linewidth": 2.0 if ours else 1.2,
        "marker": MARKERS[rank % len(MARKERS)],
        "markersize": 5,
        "markerfacecolor": THEME["paper"] if ensemble else colour,
    }


def divisions_figure(partitions: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw how many images of each class each client has, one panel of shades for each division.

    Args:
        partitions: at least one, by title, as in `figures.labels_figure`.
    """
    columns = min(4, len(partitions))
    rows = -(-len(partitions) // columns)
    classes = max(len(partition["classes"]) for partition in partitions.values())
    with styled():
        figure = Figure(figsize=(WIDTH, 0.3 + rows * (0.5 + max(1.0, min(0.14 * classes, 4)))), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes, (title, partition) in zip(grid.flat, partitions.items(), strict=False):
            counts = np.array(partition["label_counts"], dtype=float).T
            axes.set_title(title, loc="left", fontsize=8.5, color=THEME["muted"])
            axes.imshow(
                counts,
                _toward(THEME["ours"]),
                PowerNorm(0.5, 0, max(counts.max(), 1)),
                aspect="auto",
                interpolation="none",
            )
            name_places(axes.xaxis, [str(client) for client in range(counts.shape[1])], most=12)
            first = axes in grid[:, 0]
            name_places(axes.yaxis, [shortened(name, 14) if first else "" for name in partition["classes"]], most=25)
        for axes in grid.flat[len(partitions) :]:
            axes.set_axis_off()
        figure.supxlabel("client", fontsize=8.5, color=THEME["muted"])
    return figure


def classes_by_setting_figure(panels: Mapping[str, Sequence[Row]], classes: Sequence[str]) -> Figure:
    """Draw each method's accuracy on each class, one panel of shades for each setting.

    Args:
        panels: at least one, by title: rows with accuracies by class.
        classes: the classes' names.
    """
    heights = [len(rows) for rows in panels.values()]
    longest = max(len(shortened(name, 14)) for name in classes)
    with styled():
        size = (WIDTH, 0.3 + 0.06 * longest + sum(0.32 + 0.2 * height for height in heights))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
        for axes, (title, rows) in zip(grid.flat, panels.items(), strict=True):
            shares = [[np.nan if value is None else 100 * value for value in row.class_accuracies] for row in rows]
            axes.set_title(title, loc="left", fontsize=8.5, color=THEME["muted"])
            _cells(axes, np.array(shares), _toward(THEME["ours"]), Normalize(0, 100), "{:.0f}", most=15)
            name_places(axes.yaxis, [shortened(row.method, 30) for row in rows])
            name_places(
                axes.xaxis, [shortened(name, 14) for name in classes] if axes is grid[-1, 0] else [""] * len(classes)
            )
        if longest > 3:
            for label in grid[-1, 0].get_xticklabels():
                label.set(rotation=40, ha="right", rotation_mode="anchor")
    return figure


def coefficients_figure(
    panels: Mapping[str, tuple[Mapping[str, Any], np.ndarray | None]], classes: Sequence[str]
) -> Figure:
    """Draw coefficients by layer and client, and by class and client beside the clients' shares of each class.

    Args:
        panels: at least one, by title: what `fedmerge.merge.shares` tells, and the shares (classes, clients) or None.
        classes: the classes' names.
    """
    first, _ = next(iter(panels.values()))
    height = max(1.2, min(0.13 * max(len(first["tensors"]), len(classes)), 5))
    with styled():
        figure = Figure(figsize=(WIDTH, (height + 0.5) * len(panels) + 0.3), layout="constrained")
        grid = figure.subplots(len(panels), 3, squeeze=False)
        for (left, middle, right), (title, (shares, labels)) in zip(grid, panels.items(), strict=True):
            clients = [str(client) for client in shares["clients"]]
            maps: list[tuple[Axes, str, np.ndarray | None, Sequence[str]]] = [
                (left, title or "by layer", np.array(list(shares["tensors"].values())), list(shares["tensors"])),
                (middle, "last layer, by class", np.array(shares["classes"]) if "classes" in shares else None, classes),
                (right, "shares of the images", labels, [""] * len(classes)),
            ]
            for axes, text, values, names in maps:
                if values is None:
                    axes.set_axis_off()
                    continue
                axes.set_title(shortened(text, 34), loc="left", fontsize=7.5, color=THEME["muted"])
                _cells(
                    axes,
                    values,
                    *_around(1 / len(clients), values, signed=axes is not right),
                    "{:.2f}",
                    most=MOST_NUMBERS,
                )
                name_places(axes.xaxis, clients, most=12)
                name_places(axes.yaxis, [shortened(name, 22) for name in names], most=MOST_LAYERS)
                axes.tick_params(labelsize=6.5)
        figure.supxlabel("client", fontsize=8.5, color=THEME["muted"])
    return figure


def _cells(
    axes: Axes, values: np.ndarray, colours: LinearSegmentedColormap, norm: Normalize, form: str, *, most: int
) -> None:
    """Draw values as shades, with numbers where there are few columns."""
    axes.imshow(values, colours, norm, aspect="auto", interpolation="none")
    if values.shape[1] <= most and values.shape[0] <= MOST_LAYERS:
        for (y, x), value in np.ndenumerate(values):
            text = "–" if np.isnan(value) else form.format(round(value, 2) + 0.0).replace("0.", ".").replace("-", "−")
            axes.text(x, y, text, ha="center", va="center", fontsize=6)


def _toward(colour: str) -> LinearSegmentedColormap:
    return LinearSegmentedColormap.from_list("toward", [to_rgba(colour, 0.0), to_rgba(colour, DARKEST)])


def _around(centre: float, values: np.ndarray, *, signed: bool) -> tuple[LinearSegmentedColormap, Normalize]:
    """Return shades of one colour above the centre and of another below it, alike on both sides; or from 0 to 1."""
    if not signed:
        return _toward(THEME["ours"]), Normalize(0, 1)
    reach = max(float(np.abs(values - centre).max()), 1e-6)
    ends = [
        to_rgba(LINES[1], DARKEST),
        to_rgba(LINES[1], 0.0),
        to_rgba(THEME["ours"], 0.0),
        to_rgba(THEME["ours"], DARKEST),
    ]
    shades = LinearSegmentedColormap.from_list("around", list(zip([0.0, 0.5, 0.5, 1.0], ends, strict=True)))
    return shades, Normalize(centre - reach, centre + reach)
