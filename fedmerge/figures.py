"""Figures of a run, for a page and for print.

Each function returns a matplotlib `Figure` that belongs to nobody else: pyplot and its global state are not used.
Colours keep their order for colour-blind readers, shapes repeat what colours say, and every shade carries ink that can
be read on it, on white and on black: a page may replace the colours of `THEME` (as `report` does for its dark mode).
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LinearSegmentedColormap, Normalize, PowerNorm, to_rgba
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedmerge.runs import Result
from fedmerge.summary import Row, best_single_model, summarize
from fedmerge.tables import NOTHING, clean, percent

THEME = {
    "ink": "#1f2328",
    "muted": "#656d76",
    "rule": "#d8dee4",
    "paper": "#ffffff",
    "ours": "#0072b2",
    "control": "#7d7064",
}  # a page may have others for its dark mode
LINES = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7d7064")  # Okabe and Ito's palette
DASHES = ("-", "--", ":", "-.")

WIDTH = 6.4  # inches
DOTS_PER_INCH = 160
DARKEST = 0.65  # opacity of a full cell: ink can still be read on it
LABEL_HEIGHT = 0.17  # inches
NUMBER: Any = {"textcoords": "offset points", "fontsize": 7.5}
MOST_BUBBLES = 30  # clients or classes; above, a heat map
MOST_ANNOTATED = 15  # columns whose cells hold a number
MOST_NAMED = 45  # rows or columns that all have their names


def accuracy_figure(rows: Sequence[Row]) -> Figure:
    """Draw each method's mean accuracy with its standard deviation, and below it its seeds as dots.

    Args:
        rows: at least one with an accuracy.
    """
    names = [_wrapped(row.method) for row in rows]
    best = best_single_model(rows)
    with styled():
        figure, axes = _figure(0.75 + 0.31 * len(rows) + 0.1 * sum(name.count("\n") for name in names))
        for y, row in enumerate(rows):
            label = percent(row) + ("" if row.complete or row.mean is None else f"\n{row.coverage}")
            text = axes.text(1.02, y, label, transform=axes.get_yaxis_transform(), va="center", linespacing=1.1)
            text.set_fontweight("bold" if row is best else "normal")
            if row.mean is None:
                text.set_color(THEME["muted"])
                continue
            mark = _mark(row)
            if row.deviation is not None:
                axes.errorbar(100 * row.mean, y, xerr=100 * row.deviation, color=mark["color"], linewidth=1.4)
                seeds = 100 * np.array(list(row.accuracies.values()))
                axes.plot(seeds, [y + 0.33] * len(seeds), ".", markersize=5, color=mark["color"], alpha=0.6, mew=0)
            axes.plot(100 * row.mean, y, linestyle="", markersize=7, **mark)
        name_places(axes.yaxis, names, most=len(names))  # each has a line of its own
        for text, row in zip(axes.get_yticklabels(), rows, strict=True):
            text.set_fontweight("bold" if row is best else "normal")
        axes.set_ylim(len(rows) - 0.4, -0.5)
        low, high = axes.get_xlim()
        axes.set_xlim(max(0.0, low), min(100.5, high))
        axes.set_xlabel("accuracy, %")
        axes.grid(axis="x", color=THEME["rule"], linewidth=0.8)
        _legend(figure, [row for row in rows if row.mean is not None])
    return figure


def labels_figure(partition: Mapping[str, Any]) -> Figure:
    """Draw how many images of each class each client has: bubbles, or shades for many clients or classes.

    Args:
        partition: with "label_counts", classes for each client, and "classes", their names.
    """
    counts = np.array(partition["label_counts"], dtype=float)
    clients, classes = counts.shape
    bubbles = max(clients, classes) <= MOST_BUBBLES
    height = classes * (0.29 if bubbles else min(0.2, 5 / classes))
    with styled():
        figure, (top, axes) = _figure(1.25 + height, heights=(0.6, height))
        totals = counts.sum(1)
        top.bar(range(clients), totals, width=0.7, color=THEME["control"], alpha=DARKEST, linewidth=0)
        top.set_yticks([])
        top.tick_params(labelbottom=False)
        top.set_ylabel("images", rotation=0, ha="right", va="center")
        for x in range(clients) if clients <= MOST_ANNOTATED else [int(totals.argmax())]:
            top.annotate(f"{totals[x]:,.0f}", (x, totals[x]), (0, 2), ha="center", **NUMBER)
        if bubbles:
            _bubbles(axes, counts, diameter=min(72 * 0.29, 72 * 4.6 / clients))
        else:
            _shades(axes, counts.T, PowerNorm(0.5, 0, max(counts.max(), 1)), "images")
        name_places(axes.yaxis, [_wrapped(name) for name in partition["classes"]])
        name_places(axes.xaxis, [str(client) for client in range(clients)])
        axes.set_xlabel("client")
        axes.set_xlim(-0.6, clients - 0.4)
        axes.set_ylim(classes - 0.5, -0.5)
    return figure


def classes_figure(rows: Iterable[Row], classes: Sequence[str]) -> Figure:
    """Draw each method's accuracy on each class as shades, with numbers where there is room.

    Args:
        rows: at least one with accuracies by class.
        classes: the classes' names.
    """
    rows = [row for row in rows if row.class_accuracies]
    values = np.array([[np.nan if value is None else 100 * value for value in row.class_accuracies] for row in rows])
    names = [shortened(name) for name in classes]
    longest = max(map(len, names))
    with styled():
        figure, axes = _figure(0.6 + 0.06 * longest + 0.27 * len(rows))
        _shades(axes, values, Normalize(0, 100), "accuracy, %")
        name_places(axes.yaxis, [_wrapped(row.method) for row in rows])
        name_places(axes.xaxis, names)
        if longest > 3:
            for label in axes.get_xticklabels():
                label.set(rotation=40, ha="right", rotation_mode="anchor")
    return figure


def rounds_figure(results: Sequence[Result]) -> Figure:
    """Draw each method's mean accuracy after each round, over the seeds that finished the round.

    Args:
        results: of any rounds, at least one of them finished.
    """
    rounds = sorted({result["round"] for result in results})
    lines: dict[str, list[tuple[int, float]]] = {}
    for number in rounds:
        for row in summarize(result for result in results if result["round"] == number):
            if row.mean is not None:
                lines.setdefault(row.method, []).append((number, 100 * row.mean))
    with styled():
        figure, axes = _figure(max(3.0, 0.6 + LABEL_HEIGHT * len(lines)))
        looks = [(LINES[index % len(LINES)], DASHES[index // len(LINES) % len(DASHES)]) for index in range(len(lines))]
        for points, (colour, dashes) in zip(lines.values(), looks, strict=True):
            axes.plot(*zip(*points, strict=True), color=colour, linestyle=dashes, marker="o", markersize=4)
        axes.set_xticks(rounds[:: -(-len(rounds) // MOST_ANNOTATED)])
        axes.set_xlabel("round")
        axes.set_ylabel("accuracy, %")
        axes.grid(axis="y", color=THEME["rule"], linewidth=0.8)
        low, high = axes.get_ylim()
        ends = [(points[-1][1] - low) / (high - low) for points in lines.values()]
        heights = _spread(ends, gap=LABEL_HEIGHT / (figure.get_figheight() - 0.5))
        for method, height, (colour, dashes) in zip(lines, heights, looks, strict=True):
            leader = {"arrowstyle": "-", "color": colour, "linestyle": dashes, "relpos": (0, 0.5)}
            place = {"xytext": (1.06, height), "textcoords": axes.transAxes, "va": "center", "arrowprops": leader}
            axes.annotate(shortened(method, 30), lines[method][-1], **place)
    return figure


def to_png(figure: Figure) -> bytes:
    """Return a figure as PNG on white, for documents."""
    return _rendered(figure, "png", {"dpi": DOTS_PER_INCH})


def to_svg(figure: Figure) -> bytes:
    """Return a figure as SVG with its text as text; the same figure gives the same bytes."""
    return _rendered(figure, "svg", {"transparent": True, "metadata": {"Date": None, "Creator": None}})


def _rendered(figure: Figure, kind: str, options: Mapping[str, Any]) -> bytes:
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


@contextmanager
def styled() -> Iterator[None]:
    """Fonts, colours and lines of every figure; matplotlib's settings are as before after the block."""
    settings: Any = {
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "font.size": 8.5,
        "text.color": THEME["ink"],
        "text.parse_math": False,
        "axes.edgecolor": THEME["rule"],
        "axes.labelcolor": THEME["muted"],
        "axes.axisbelow": True,
        "axes.spines.left": False,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "xtick.color": THEME["rule"],
        "ytick.color": THEME["rule"],
        "xtick.labelcolor": THEME["ink"],
        "ytick.labelcolor": THEME["ink"],
        "svg.fonttype": "none",
        "svg.hashsalt": "fedmerge",
    }
    with rc_context(settings):
        yield


def _figure(height: float, heights: Sequence[float] = ()) -> tuple[Figure, Any]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    if heights:
        return figure, figure.subplots(len(heights), sharex=True, height_ratios=heights)
    return figure, figure.subplots()


def name_places(axis: Axis, names: Sequence[str], *, most: int = MOST_NAMED) -> None:
    """Write the names along an axis; of more than `most`, only some."""
    step = 1 if len(names) <= most else -(-len(names) // (most // 2))
    places = range(0, len(names), step)
    axis.set_ticks(places, [names[place] for place in places])
    axis.set_tick_params(length=0)


def _bubbles(axes: Axes, counts: np.ndarray, diameter: float) -> None:
    """Draw a bubble for each cell, its area in proportion to its count; `diameter` in points is the largest's."""
    x, y = np.nonzero(counts)
    areas = (0.9 * diameter) ** 2 * counts[x, y] / max(counts.max(), 1)
    axes.scatter(x, y, s=areas, color=THEME["ours"], alpha=0.75, linewidth=0)
    axes.grid(color=THEME["rule"], linewidth=0.6)
    if counts.shape[0] <= MOST_ANNOTATED // 2:
        for left, down in zip(x, y, strict=True):
            place = (diameter / 2 + 3, 0)
            axes.annotate(
                f"{counts[left, down]:,.0f}", (left, down), place, va="center", color=THEME["muted"], **NUMBER
            )


def _shades(axes: Axes, values: np.ndarray, norm: Normalize, label: str) -> None:
    """Draw cells in one colour, the fuller the more; with numbers where there is room, or a scale beside them."""
    annotated = values.shape[1] <= MOST_ANNOTATED and values.shape[0] <= MOST_BUBBLES
    colours = [to_rgba(THEME["ours"], 0.0), to_rgba(THEME["ours"], DARKEST if annotated else 1.0)]
    colormap = LinearSegmentedColormap.from_list("shades", colours)
    image = axes.imshow(values, colormap, norm, aspect="auto", interpolation="none")
    if annotated:
        for (y, x), value in np.ndenumerate(values):
            axes.text(x, y, NOTHING if np.isnan(value) else f"{value:.0f}", ha="center", va="center", fontsize=8)
        for y in range(1, values.shape[0]):
            axes.axhline(y - 0.5, color=THEME["paper"], linewidth=1.5)
        for x in range(1, values.shape[1]):
            axes.axvline(x - 0.5, color=THEME["paper"], linewidth=1.5)
    else:
        scale = axes.figure.colorbar(image, ax=axes, label=label, pad=0.02, fraction=0.04)
        scale.outline.set_visible(False)


def _mark(row: Row) -> dict[str, Any]:
    colour = THEME["ours" if row.aligned else "control"]
    face = THEME["paper"] if row.models > 1 else colour
    return {"color": colour, "marker": "o" if row.aligned else "D", "markerfacecolor": face, "markeredgewidth": 1.4}


def _legend(figure: Figure, rows: Iterable[Row]) -> None:
    kinds = {(not row.aligned, row.models > 1): row for row in rows}
    handles = []
    for (control, ensemble), row in sorted(kinds.items(), key=lambda kind: kind[0]):
        label = ("control" if control else "aligned and merged") + (", ensemble" if ensemble else "")
        handles.append(Line2D([], [], linestyle="", markersize=6, label=label, **_mark(row)))
    figure.legend(handles=handles, loc="outside upper left", ncols=4, frameon=False, handletextpad=0.2)


def _wrapped(name: str, width: int = 26) -> str:
    """Break a long name where it has a space, + : , / - or _."""
    lines = [""]
    for part in re.findall(r"[^ +:,/_-]*[ +:,/_-]?", clean(name)):
        if lines[-1] and len(lines[-1] + part.rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def shortened(name: str, width: int = 24) -> str:
    """Return a name of at most `width` characters."""
    name = clean(name)
    return name if len(name) <= width else name[: width - 1].rstrip() + "…"


def _spread(heights: Sequence[float], gap: float) -> list[float]:
    """Move heights apart until neighbours are `gap` apart, in their order."""
    spread = np.array(heights)
    for _ in range(200):
        for low, high in pairwise(np.argsort(heights, kind="stable")):
            overlap = max(0.0, gap - (spread[high] - spread[low]))
            spread[low] -= overlap / 2
            spread[high] += overlap / 2
    return [float(height) for height in spread]
