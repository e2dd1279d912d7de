"""Several rounds against one: accuracy by round and by bytes, of the runs of a benchmark that train more than once."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from fedmerge.benchmark import drawings
from fedmerge.benchmark.collecting import ROUNDS, Benchmark, Setting, sources_of
from fedmerge.benchmark.contests import drawn, is_ours, phrase, ranked
from fedmerge.benchmark.drawings import Curve
from fedmerge.config import Config
from fedmerge.pages import Plate
from fedmerge.runs import Result
from fedmerge.settings import Value
from fedmerge.summary import BASELINE, Difference, with_interval
from fedmerge.tables import NOTHING, clean, size

ROUND_SETTINGS = (ROUNDS, "local-epochs", "proximal-mu", "upload-dtype")
"""Settings that are the method's here: runs that differ in these alone share a panel."""
MOST_LINES = 8
CAPTION = (
    "Mean accuracy over the seeds that finished a round, with 95 % intervals. Methods of one round, on the same "
    "clients, are single marks."
)


class Point(NamedTuple):
    """Where a method is after a round: accuracy, and the bytes sent to and by all clients up to then."""

    round: int
    found: Difference
    num_bytes: float | None


class Course(NamedTuple):
    """A method's points in their order, and the setting that they are of."""

    points: Sequence[Point]
    method: str
    setting: Setting


def courses(benchmark: Benchmark) -> dict[str, dict[str, Course]]:
    """Return the courses of methods by panel and line, of panels in which some run has several rounds.

    Args:
        benchmark: its runs.
    """
    panels: dict[str, list[Setting]] = {}
    for setting in benchmark.settings:
        names = [name for name in benchmark.varying if name not in ROUND_SETTINGS]
        panels.setdefault(", ".join(phrase(name, setting.values[name]) for name in names), []).append(setting)
    found = {
        title: _lines(members, benchmark.varying)
        for title, members in panels.items()
        if any(each.config.rounds > 1 for each in members)
    }
    return {title: lines for title, lines in found.items() if lines}


def round_plates(benchmark: Benchmark) -> Iterator[Plate]:
    """Yield the figures of accuracy by round and by bytes.

    Args:
        benchmark: its runs.
    """
    found = courses(benchmark)
    if not found:
        return
    lines = [
        [
            name,
            *([title] if len(found) > 1 else []),
            str(point.round),
            f"{100 * point.found.mean:.2f}",
            _half(point),
            _size(point),
        ]
        for title, members in found.items()
        for name, course in members.items()
        for point in course.points
    ]
    headings = ["Method", *(["panel"] if len(found) > 1 else []), "round", "accuracy, %", "± 95 %", "sent until then"]
    settings = list(
        {id(course.setting): course.setting for members in found.values() for course in members.values()}.values()
    )
    rounds = {
        title: [
            _curve(name, course, [(point.round, point.found) for point in course.points])
            for name, course in members.items()
        ]
        for title, members in found.items()
    }
    order = ranked(benchmark)
    figure = drawings.curves_figure(rounds, "round", order=order, apart=False)
    yield Plate("rounds", "Accuracy against rounds", CAPTION, figure, headings, lines, *sources_of(settings))
    sent = {
        title: [
            _curve(
                name, course, [(math.log10(point.num_bytes), point.found) for point in course.points if point.num_bytes]
            )
            for name, course in members.items()
            if all(point.num_bytes for point in course.points)
        ]
        for title, members in found.items()
    }
    sent = {title: curves for title, curves in sent.items() if curves}
    if sent:
        places = [x for curves in sent.values() for curve in curves for x, _ in curve.points]
        steps = [base * 10**power for power in range(16) for base in (1, 2, 5)]
        ticks = {
            math.log10(step): size(step).replace(".0", "")
            for step in steps
            if min(places) <= math.log10(step) <= max(places)
        }
        what = "sent by and to all clients until then"
        figure = drawings.curves_figure(sent, what, order=order, ticks=ticks, apart=False)
        yield Plate("bytes", "Accuracy against bytes", CAPTION, figure, headings, lines, *sources_of(settings))


def rounds_needed(benchmark: Benchmark) -> Iterator[str]:
    """Say, for each panel, how many rounds FedAvg needs to reach the first round of NP Merge."""
    for title, members in courses(benchmark).items():
        ours = [course for course in members.values() if is_ours(course.method) and course.points[0].round == 1]
        rivals = {
            name: course for name, course in members.items() if course.method == BASELINE and len(course.points) > 1
        }
        if not (ours and rivals):
            continue
        first = max(ours, key=lambda course: course.points[0].found.mean)
        goal = first.points[0]
        ends = []
        for name, rival in rivals.items():
            there = next((point for point in rival.points if point.found.mean >= goal.found.mean), None)
            last = rival.points[-1]
            ends.append(
                f"{name} reaches that in round {there.round}, after {_size(there)}"
                if there
                else f"{name} is at {100 * last.found.mean:.1f} % after {last.round} rounds and {_size(last)}"
            )
        what = f"{100 * goal.found.mean:.1f} % with {_size(goal)} sent" + (f" ({title})" if title else "")
        yield f"One round of {clean(first.method)} reaches {what}; {'; '.join(ends)}."


def _lines(settings: Sequence[Setting], varying: Sequence[str]) -> dict[str, Course]:
    """The courses of a panel by name: those of several rounds, then single points of the methods that figures show."""
    several = [setting for setting in settings if setting.config.rounds > 1]
    found: dict[str, Course] = {}
    for setting in several:
        for row in setting.rows:
            results = [
                result for result in setting.results if result["method"] == row.method and result["status"] == "ok"
            ]
            if results:
                found[_name(row.method, setting, varying)] = Course(_points(results), row.method, setting)
    once = [setting for setting in settings if setting.config.rounds == 1]
    for method in drawn(once, MOST_LINES - min(len(found), MOST_LINES)) if once else ():
        for setting in once:
            results = [result for result in setting.results if result["method"] == method and result["status"] == "ok"]
            if results:
                found.setdefault(_name(method, setting, varying), Course(_points(results), method, setting))
    return found if several else {}


def _points(results: Sequence[Result]) -> list[Point]:
    points = []
    for number in sorted({result["round"] for result in results}):
        accuracies = [result["accuracy"] for result in results if result["round"] == number]
        seeds = {result["seed"] for result in results if result["round"] == number}
        until = [
            [_sent(result) for result in results if result["seed"] == seed and result["round"] <= number]
            for seed in sorted(seeds)
        ]
        totals = [sum(filter(None, sent)) for sent in until if None not in sent]
        points.append(Point(number, with_interval(accuracies), statistics.fmean(totals) if totals else None))
    return points


def _sent(result: Result) -> float | None:
    up, down = result["bytes_up"], result["bytes_down"]
    return None if up is None or down is None else up + down


def _name(method: str, setting: Setting, varying: Sequence[str]) -> str:
    """A method with what is its own of the settings that vary, as far as it is no default."""
    defaults: Mapping[str, Value] = Config().to_mapping()
    own = [name for name in ROUND_SETTINGS[1:] if name in varying and setting.values[name] != defaults[name]]
    return ", ".join([clean(method), *(phrase(name, setting.values[name]) for name in own)])


def _curve(name: str, course: Course, points: Sequence[tuple[float, Difference]]) -> Curve:
    row = course.setting.row(course.method)
    return Curve(name, points, is_ours(course.method), row is not None and row.models > 1)


def _half(point: Point) -> str:
    return NOTHING if point.found.half_width is None else f"{100 * point.found.half_width:.2f}"


def _size(point: Point) -> str:
    return size(None if point.num_bytes is None else round(point.num_bytes))
