"""What lies behind a benchmark's accuracies: who has which classes, what each got, what the coefficients learn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fedmerge.benchmark import drawings
from fedmerge.benchmark.collecting import DIVISION, Benchmark, Setting, place, sources_of
from fedmerge.benchmark.contests import drawn, is_ours, told
from fedmerge.pages import Plate
from fedmerge.runs import Result
from fedmerge.tables import NOTHING, clean

MOST_LABEL_PANELS = 8
MOST_MAPS = 3


class Divided(NamedTuple):
    """A setting with one of its partitions, and the file that holds it."""

    setting: Setting
    partition: Mapping[str, Any]
    source: str


def map_plates(benchmark: Benchmark) -> Iterator[Plate]:
    """Yield the figures of labels, classes and coefficients.

    Args:
        benchmark: its runs.
    """
    divided = _divided(benchmark)
    if divided:
        yield _labels(_thinned(divided, MOST_LABEL_PANELS))
        yield from _classes(benchmark, _thinned(divided, MOST_MAPS))
    yield from _coefficients(benchmark)


def _divided(benchmark: Benchmark) -> dict[str, Divided]:
    """For each division of images, by its title, a setting that has a partition."""
    found: dict[str, Divided] = {}
    for title, settings in _grouped(benchmark, [DIVISION, "data"]).items():
        for setting in settings:
            if title not in found and (partition := setting.partition()) is not None:
                found[title] = Divided(setting, *partition)
    return found


def _grouped(benchmark: Benchmark, names: Sequence[str]) -> dict[str, list[Setting]]:
    """The settings by a title of what varies in `names`; of each those of few rounds and usual clients first."""
    names = [name for name in names if name in benchmark.varying]
    usual = Counter(setting.config.clients for setting in benchmark.settings)
    found: dict[str, list[Setting]] = {}
    for setting in sorted(benchmark.settings, key=lambda each: [place(name, each) for name in names]):
        found.setdefault(told(setting, names), []).append(setting)
    return {
        title: sorted(settings, key=lambda each: (each.config.rounds, -usual[each.config.clients]))
        for title, settings in found.items()
    }


def _thinned(chosen: Mapping[str, Any], most: int) -> dict[str, Any]:
    """As many of the entries as can be shown, the first and the last among them."""
    titles = list(chosen)
    return {
        titles[at]: chosen[titles[at]]
        for at in np.linspace(0, len(titles) - 1, min(most, len(titles))).round().astype(int)
    }


def _labels(divided: Mapping[str, Divided]) -> Plate:
    lines = [
        [str(client), title, ", ".join(map(str, counts)), f"{sum(counts):,}"]
        for title, each in divided.items()
        for client, counts in enumerate(each.partition["label_counts"])
    ]
    return Plate(
        "labels",
        "Who has which classes",
        "Training images of each class (rows) at each client (columns), the first seed of a run for each division: the "
        "fuller the cell, the more; the shade goes with the root of the count. Other seeds divide them anew.",
        drawings.divisions_figure({title: each.partition for title, each in divided.items()}),
        ["Client", "division", "images of each class", "all"],
        lines,
        [each.source for each in divided.values()],
        sources_of([each.setting for each in divided.values()])[1],
    )


def _classes(benchmark: Benchmark, divided: Mapping[str, Divided]) -> Iterator[Plate]:
    names = drawn(benchmark.settings)
    panels = {
        title: [row for name in names if (row := each.setting.row(name)) is not None and row.class_accuracies]
        for title, each in divided.items()
    }
    panels = {title: rows for title, rows in panels.items() if rows}
    if not panels:
        return
    classes = divided[next(iter(panels))].partition["classes"]
    lines = [
        [
            clean(row.method),
            title,
            *(NOTHING if share is None else f"{100 * share:.1f}" for share in row.class_accuracies),
        ]
        for title, rows in panels.items()
        for row in rows
    ]
    yield Plate(
        "classes",
        "Accuracy by class",
        "Accuracy in percent on the images of each class, mean over the seeds. A method can have a fair mean and have "
        "lost a class.",
        drawings.classes_by_setting_figure(panels, classes),
        ["Method", "setting", *map(clean, classes)],
        lines,
        *sources_of([divided[title].setting for title in panels]),
    )


class Learned(NamedTuple):
    """Coefficients that a result tells, and what they are to be seen beside."""

    setting: Setting
    result: Result
    shares: Mapping[str, Any]
    labels: np.ndarray | None
    classes: list[str]


def _coefficients(benchmark: Benchmark) -> Iterator[Plate]:
    """The coefficients of the strongest form of NP Merge that tells them, for a setting of each division."""
    ours = [name for name in drawn(benchmark.settings) if is_ours(name)]
    found: dict[str, Learned] = {}
    for title, settings in _grouped(benchmark, [DIVISION, "init"]).items():
        learned = next((each for each in (_learned(setting, ours) for setting in settings) if each is not None), None)
        if learned is not None:
            found[title] = learned
    if not found:
        return
    shown: dict[str, Learned] = _thinned(found, MOST_MAPS)
    together = [
        f"{_correlation(each)}".replace("-", "\N{MINUS SIGN}") + (f" ({title})" if title else "")
        for title, each in shown.items()
        if each.labels is not None and "classes" in each.shares and each.labels.std() > 0
    ]
    correlated = f" Their correlation over classes and clients: {', '.join(together)}." if together else ""
    methods = ", ".join(dict.fromkeys(clean(each.result["method"]) for each in shown.values()))
    lines = [
        [
            clean(name),
            title,
            ", ".join(f"{share:.3f}" for share in alpha),
            f"{100 * each.shares['explained'][name]:.0f} %",
        ]
        for title, each in shown.items()
        for name, alpha in each.shares["tensors"].items()
    ]
    panels = {title: (each.shares, each.labels) for title, each in shown.items()}
    yield Plate(
        "coefficients",
        "What the coefficients learn",
        f"What the merged model of {methods} took from each client: least squares coefficients of each layer's tensor, "
        "which sum to 1 (blue: more than an equal share, orange: less); beside them those of the last layer's rows, "
        f"which are the classes, and the clients' shares of the images of each class.{correlated} The table says how "
        "much of the way from the mean the coefficients of a tensor explain; the rest is finer than tensors.",
        drawings.coefficients_figure(panels, next(iter(shown.values())).classes),
        ["Tensor", "setting", "coefficients of the clients", "explained"],
        lines,
        *sources_of([each.setting for each in shown.values()]),
    )


def _correlation(learned: Learned) -> str:
    assert learned.labels is not None
    both = np.stack([np.array(learned.shares["classes"]).ravel(), learned.labels.ravel()])
    both -= both.mean(1, keepdims=True)
    return f"{(both[0] @ both[1]) / max(np.linalg.norm(both[0]) * np.linalg.norm(both[1]), 1e-12):.2f}"


def _learned(setting: Setting, methods: list[str]) -> Learned | None:
    """The coefficients of the first method, and of its first seed, that tells them."""
    for result in (result for method in methods for result in setting.results if result["method"] == method):
        shares = (result.get("diagnostics") or {}).get("shares")
        if shares is None:
            continue
        partition = setting.partition(result["seed"])
        if partition is None:
            return Learned(setting, result, shares, None, list(map(str, range(len(shares.get("classes", ()))))))
        counts = np.array(partition[0]["label_counts"], dtype=float).T
        labels = (counts / np.maximum(counts.sum(1, keepdims=True), 1))[:, shares["clients"]]
        return Learned(setting, result, shares, labels, partition[0]["classes"])
    return None
