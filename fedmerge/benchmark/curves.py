"""Accuracy against each setting in which the runs of a benchmark differ.

A figure against a setting exists where runs differ in it and agree in all others; runs that differ in more are other
panels of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from fedmerge.benchmark import drawings
from fedmerge.benchmark.collecting import DIVISION, IMAGES, LABELS, ROUNDS, Benchmark, Setting, place, sources_of
from fedmerge.benchmark.contests import drawn, is_ours, phrase, ranked, telling
from fedmerge.benchmark.drawings import Curve
from fedmerge.pages import Plate
from fedmerge.settings import Value
from fedmerge.summary import with_interval
from fedmerge.tables import NOTHING, clean

MOST_PANELS = 6

LEAST_SPAN = 4  # the greatest value over the least from which an axis is logarithmic
CAPTION = (
    "Means over the seeds, with 95 % intervals, which may leave the frame; the table compares methods on the same "
    "clients, which is sharper."
)
Rest = tuple[tuple[str, Value], ...]
"""The settings that a panel's runs share."""


class Axis(NamedTuple):
    """A setting that accuracy is drawn against: its name, the figure's title and the axis's."""

    name: str
    title: str
    label: str


AXES = (
    Axis(
        DIVISION,
        "Accuracy against how different the clients are",
        "α of the Dirichlet distribution, or another division",
    ),
    Axis(LABELS, "Accuracy against the server's labels", "labelled images of the server"),
    Axis(IMAGES, "Accuracy against the server's images", "images of the server that are used"),
    Axis("clients", "Accuracy against the number of clients", "clients"),
)


def curve_plates(benchmark: Benchmark) -> Iterator[Plate]:
    """Yield the figures of accuracy against settings.

    Args:
        benchmark: its runs.
    """
    known = {axis.name for axis in AXES} | {ROUNDS}
    others = [
        Axis(name, f"Accuracy against {name.replace('-', ' ')}", name.replace("-", " "))
        for name in benchmark.varying
        if name not in known and not isinstance(benchmark.settings[0].values[name], (str, bool))
    ]
    for axis in (*AXES, *others):
        if axis.name in benchmark.varying:
            yield from _against(benchmark, axis)


def _against(benchmark: Benchmark, axis: Axis) -> Iterator[Plate]:
    """The figure of accuracy against a setting, where there are runs for it."""
    panels, more = _panels(benchmark, axis.name)
    if not panels:
        return
    titles = telling([name for name, _ in next(iter(panels))], [dict(rest) for rest in panels])
    shown = [setting for members in panels.values() for setting in members]
    steps, ticks = _steps(shown, axis.name)
    names = drawn(shown, panels=list(panels.values()))
    curves: dict[str, list[Curve]] = {}
    lines: list[list[str]] = []
    for rest, members in panels.items():
        title = ", ".join(_phrase(name, value) for name, value in rest if name in titles)
        for name in names:
            there = [(setting, row) for setting in members if (row := setting.row(name)) is not None]
            found = [with_interval(list(row.accuracies.values())) for _, row in there]
            points = [(steps[place(axis.name, setting)], each) for (setting, _), each in zip(there, found, strict=True)]
            if points:
                ensemble = any(row.models > 1 for _, row in there)
                curves.setdefault(title, []).append(Curve(name, points, is_ours(name), ensemble))
            for (setting, row), each in zip(there, found, strict=True):
                half = NOTHING if each.half_width is None else f"{100 * each.half_width:.2f}"
                where = [clean(str(setting.values[axis.name])), *([title] if titles else [])]
                lines.append([clean(name), *where, f"{100 * each.mean:.2f}", half, row.coverage])
    headings = ["Method", axis.label, *(["panel"] if titles else []), "accuracy, %", "± 95 %", "seeds"]
    figure = drawings.curves_figure(curves, axis.label, order=ranked(benchmark), ticks=ticks)
    yield Plate(axis.name, axis.title, CAPTION + more, figure, headings, lines, *sources_of(shown))


def _panels(benchmark: Benchmark, name: str) -> tuple[dict[Rest, list[Setting]], str]:
    """The settings of each panel, by the other settings, in the axis's order; and what is said of those left out."""
    fewest = min(setting.config.rounds for setting in benchmark.settings)
    grouped: dict[Rest, list[Setting]] = {}
    for setting in sorted(benchmark.settings, key=lambda setting: place(name, setting)):
        if setting.config.rounds == fewest:  # several rounds have figures of their own
            grouped.setdefault(_rest(benchmark, setting, name), []).append(setting)
    panels = {rest: each for rest, each in grouped.items() if len({place(name, setting) for setting in each}) > 1}
    most = sorted(panels, key=lambda rest: -len(panels[rest]))[:MOST_PANELS]
    left_out = len(panels) - len(most)
    more = (
        f" {left_out} more panel{'s' * (left_out > 1)} of fewer runs: see the table of all results." if left_out else ""
    )
    order = {_rest(benchmark, setting, name): None for setting in benchmark.settings}
    return {rest: panels[rest] for rest in order if rest in most}, more


def _steps(settings: Sequence[Setting], name: str) -> tuple[dict[tuple[float, str], float], dict[float, str]]:
    """Where each value of a setting is on its axis, and what is written there; numbers of several magnitudes by log."""
    values = dict(sorted({place(name, setting): setting.values[name] for setting in settings}.items()))
    numbers = [value for value in values.values() if isinstance(value, (int, float))]
    if len(numbers) < len(values):
        steps = {at: float(step) for step, at in enumerate(values)}
        return steps, {steps[at]: clean(str(value)).removeprefix("α = ") for at, value in values.items()}
    least = min(number for number in numbers if number > 0)
    if min(numbers) >= 0 and max(numbers) >= LEAST_SPAN * least:
        steps = {at: math.log10(at[0] or least / 3) for at in values}
    else:
        steps = {at: at[0] for at in values}
    return steps, {steps[at]: _short(value) for at, value in zip(values, numbers, strict=True)}


def _short(value: float) -> str:
    """A number for a tick: thousands as k."""
    return f"{value / 1000:g}k" if value >= 1000 and value % 100 == 0 else f"{value:g}"


def _rest(benchmark: Benchmark, setting: Setting, without: str) -> Rest:
    """The other settings that vary; against images, whether all of them are labelled, or none, is one of them."""
    rest = {name: setting.values[name] for name in benchmark.varying if name != without}
    if without == IMAGES:
        images, labels = setting.values[IMAGES], setting.values[LABELS]
        rest[LABELS] = "all labelled" if labels == images else "no label" if labels == 0 else labels
    return tuple(rest.items())


def _phrase(name: str, value: Value) -> str:
    return value if name == LABELS and isinstance(value, str) else phrase(name, value)
