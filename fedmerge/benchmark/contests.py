"""Methods across the settings of a benchmark: which are drawn, who is ahead of whom, and where not.

Nothing here looks for a setting that flatters: means are over every setting that two methods share, intervals over the
seeds, and the settings that are lost are named.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedmerge.benchmark.collecting import DIVISION, IMAGES, LABELS, Benchmark, Setting
from fedmerge.merge.shares import is_mixture
from fedmerge.outcomes import SEPARATOR
from fedmerge.settings import Value
from fedmerge.summary import BASELINE, Difference, with_interval
from fedmerge.tables import clean, signed

MOST_OURS = 3
MOST_DRAWN = 8
MOST_NAMED = 6
TITLES = {LABELS: "labels", IMAGES: "server images", "init": "init", "clients": "clients"}


def is_ours(method: str) -> bool:
    """Return whether a method is a form of NP Merge."""
    return is_mixture(method.rpartition("+")[2])


def strengths(settings: Sequence[Setting], panels: Sequence[Sequence[Setting]] = ()) -> dict[str, float]:
    """Return by how much each method's accuracy is above the mean of all methods, on average over its settings.

    Left out are steps of methods, and methods that have results in less than half of the settings (of each panel).
    Settings without any form of NP Merge do not count: there, clients are only trained, or others are compared.

    Args:
        settings: at least one.
        panels: the settings in groups; default: all are one.
    """
    above: dict[str, list[float]] = {}
    for setting in settings:
        means = {row.method: row.mean for row in setting.rows if row.mean is not None and SEPARATOR not in row.method}
        centre = statistics.fmean(means.values()) if means else 0.0
        for method, mean in means.items():
            above.setdefault(method, []).append(mean - centre)
    counted = [
        [setting for setting in panel if any(is_ours(row.method) for row in setting.rows)] or panel
        for panel in panels or [settings]
    ]
    return {
        method: statistics.fmean(found)
        for method, found in above.items()
        if any(2 * sum(each.row(method) is not None for each in panel) >= len(panel) for panel in counted)
    }


def drawn(settings: Sequence[Setting], most: int = MOST_DRAWN, panels: Sequence[Sequence[Setting]] = ()) -> list[str]:
    """Return the methods that a figure shows: ours, FedAvg, the best ensemble and the strongest controls.

    Args:
        settings: of the figure.
        most: as many as can be told apart.
        panels: of the figure, if it has several.
    """
    order = _ranked(strengths(settings, panels))
    ensembles = [method for method in order if _answers_together(settings, method)]
    chosen = [method for method in order if is_ours(method)][:MOST_OURS]
    chosen += [method for method in (BASELINE, *ensembles[:1]) if method in order]
    chosen += [method for method in order if not (is_ours(method) or method in chosen or method in ensembles)]
    return sorted(chosen[:most], key=lambda method: (not is_ours(method), order.index(method)))


def ranked(benchmark: Benchmark) -> list[str]:
    """Return all methods in one order for all figures: those that a figure of all settings shows come first.

    Args:
        benchmark: its runs.
    """
    return list(dict.fromkeys((*drawn(benchmark.settings), *benchmark.methods)))


@dataclass(frozen=True)
class Contest:
    """A method against another one over all settings in which both have results.

    Attributes:
        other: what it is compared with, in words.
        difference: its accuracy minus the other's, the mean over the settings, over the seeds that most of them have.
        complete: how many settings have all of these seeds, and so a part in it.
        differences: the mean difference in each setting.
    """

    other: str
    difference: Difference
    complete: int
    differences: Sequence[tuple[Setting, float]]

    @property
    def lost(self) -> list[tuple[Setting, float]]:
        """The settings in which the other is ahead, the worst first."""
        return sorted([pair for pair in self.differences if pair[1] < 0], key=lambda pair: pair[1])

    @property
    def won(self) -> int:
        """The number of settings in which the method is ahead."""
        return sum(difference > 0 for _, difference in self.differences)


def contest(
    settings: Sequence[Setting], method: str, other: str | Callable[[Setting], str | None], name: str = ""
) -> Contest | None:
    """Return how a method does against another one; None where they share no seed.

    Args:
        settings: to look at.
        method: its name.
        other: a method, or one chosen for each setting.
        name: of the other, in words; the method's own by default.
    """
    found: list[tuple[Setting, dict[int, float]]] = []
    for setting in settings:
        rival = other if isinstance(other, str) else other(setting)
        ours, theirs = setting.row(method), setting.row(rival) if rival else None
        if ours is None or theirs is None:
            continue
        paired = {
            seed: ours.accuracies[seed] - theirs.accuracies[seed] for seed in ours.accuracies.keys() & theirs.accuracies
        }
        if paired:
            found.append((setting, paired))
    counts = Counter(seed for _, paired in found for seed in paired)
    seeds = {seed for seed, count in counts.items() if 2 * count > len(found)}
    complete = [paired for _, paired in found if seeds <= paired.keys()]
    if not (seeds and complete):
        return None
    by_seed = [statistics.fmean(paired[seed] for paired in complete) for seed in sorted(seeds)]
    means = [(setting, statistics.fmean(paired.values())) for setting, paired in found]
    return Contest(name or clean(other if isinstance(other, str) else ""), with_interval(by_seed), len(complete), means)


def best_control(setting: Setting) -> str | None:
    """Return the control of highest mean accuracy that ends in one model and finished every seed.

    Args:
        setting: whose rows are looked at.
    """
    single = [row for row in setting.rows if row.models == 1 and row.complete and not is_ours(row.method)]
    return max(single, key=lambda row: row.mean or 0.0).method if single else None


def conclusions(benchmark: Benchmark) -> list[str]:
    """Return what came out, in sentences: the strongest form of NP Merge against what it is to be compared with.

    Args:
        benchmark: its runs.
    """
    settings = benchmark.settings
    order = _ranked(strengths(settings))
    ours = next((method for method in order if is_ours(method)), None)
    if ours is None:
        return ["No form of NP Merge has results in half of its settings: there is nothing to conclude about it."]
    controls = [method for method in order if not is_ours(method)]
    single = [method for method in controls if not _answers_together(settings, method)]
    ensembles = [method for method in controls if method not in single]
    rivals: dict[str, str | Callable[[Setting], str | None]] = {BASELINE: BASELINE} if BASELINE in controls else {}
    rivals |= {f"{clean(method)}, the strongest control that is one model": method for method in single[:1]}
    rivals["each setting's best control that is one model"] = best_control
    rivals |= {f"{clean(method)}, the strongest ensemble": method for method in ensembles[:1]}
    found = [contest(settings, ours, other, name) for name, other in rivals.items()]
    there = [
        row.mean for row in (setting.row(ours) for setting in settings) if row is not None and row.mean is not None
    ]
    number = f"{len(there)} setting{'s' * (len(there) != 1)}"
    mean = f"{100 * statistics.fmean(there):.1f} %"
    first = f"{clean(ours)}, the strongest form of NP Merge here, reaches {mean} on average over {number}."
    return [first, *(_sentence(benchmark, each) for each in found if each is not None)]


def phrase(name: str, value: Value) -> str:
    """Return a setting's value with its name, unless the value says it.

    Example:
        >>> phrase("division", "α = 0.1"), phrase("server-labels", 100)
        ('α = 0.1', '100 labels')
    """
    if name in (DIVISION, "model", "data", "split"):
        return clean(str(value))
    if name == "init":
        return f"{value} init"
    if name in (LABELS, IMAGES, "clients", "rounds") and not isinstance(value, str):
        title = TITLES.get(name, name)
        return f"{value:,} {title if value != 1 else title.removesuffix('s')}"
    return clean(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}")


def told(setting: Setting, names: Sequence[str]) -> str:
    """Return a setting's values of some names, in words.

    Args:
        setting: whose values they are.
        names: of settings.
    """
    return ", ".join(phrase(name, setting.values[name]) for name in names)


def telling(names: Sequence[str], settings: Sequence[Mapping[str, Value]]) -> list[str]:
    """Return the names that it takes to tell settings apart, of those that vary together the first.

    Args:
        names: of values.
        settings: the values by name.

    Example:
        >>> telling(["model", "lr"], [{"model": "cnn", "lr": 0.1}, {"model": "mlp", "lr": 0.2}])
        ['model']
    """
    kept = list(names)
    for name in reversed(names):
        fewer = [item for item in kept if item != name]
        if _number(fewer, settings) == _number(kept, settings):
            kept = fewer
    return kept


def _sentence(benchmark: Benchmark, found: Contest) -> str:
    difference, count = found.difference, len(found.differences)
    interval = "one seed: no interval"
    if difference.half_width is not None:
        low, high = (signed(difference.mean + sign * difference.half_width) for sign in (-1, 1))
        interval = f"95 % interval {low} to {high}, {difference.seeds} seeds"
    if found.complete < count:
        interval += f", in the {found.complete} settings that have them"
    text = (
        f"{signed(difference.mean)} points ({interval}) against {found.other}; ahead in {found.won} of {count} settings"
    )
    if not found.lost:
        return f"{text}."
    names = telling(benchmark.varying, [setting.values for setting in benchmark.settings])
    named = [f"{told(setting, names) or 'all'} ({signed(mean)})" for setting, mean in found.lost[:MOST_NAMED]]
    more = f" and {len(found.lost) - MOST_NAMED} more" if len(found.lost) > MOST_NAMED else ""
    return f"{text}. Behind in: {'; '.join(named)}{more}."


def _number(names: Sequence[str], settings: Sequence[Mapping[str, Value]]) -> int:
    return len({tuple(values[name] for name in names) for values in settings})


def _ranked(found: Mapping[str, float]) -> list[str]:
    return sorted(found, key=lambda method: (-found[method], method))


def _answers_together(settings: Sequence[Setting], method: str) -> bool:
    rows = [row for row in (setting.row(method) for setting in settings) if row is not None]
    return any(row.models > 1 for row in rows)
