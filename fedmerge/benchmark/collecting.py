"""A benchmark folder: runs at any depth below it, brought together by the settings in which they differ.

Runs of equal settings are one `Setting`, whatever their methods, seeds and machines: a run that adds methods, or seeds,
to another's clients joins it. Methods are compared within a setting, seed by seed. What was to be there and is not (a
seed that was not run, a round that was not reached) is told by method, and is no part of a mean.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedmerge.config import Config
from fedmerge.methods import method_name
from fedmerge.outcomes import SEPARATOR
from fedmerge.runs import Result, Run, RunError
from fedmerge.settings import Value, key
from fedmerge.summary import Row, summarize
from fedmerge.words import repeat_command

logger = logging.getLogger(__name__)

NOT_SETTINGS = frozenset(
    [
        *("out", "data_dir", "ray_address", "client_cpus", "client_gpus", "timeout", "device", "threads"),
        *("seed", "align", "merge", "client_statistics", "min_completed"),
        *("partition", "alpha", "server_limit", "server_labels"),  # told by the derived ones
    ]
)
"""Fields of the configuration by which settings do not differ: the machine's, and what is a method's or a seed's."""
DIVISION, IMAGES, LABELS, ROUNDS = "division", "server-images", "server-labels", "rounds"
"""Derived settings: partition and α in one; how many of the server's images are used, and labelled; and the rounds."""

BY_ALPHA = ("dirichlet", "dirichlet-equal", "quantity")
UNLIKE, ALIKE = ("disjoint", "shards", "80-20"), ("iid", "same")
"""Partitions whose clients differ more, and less, than those of a Dirichlet distribution."""


@dataclass(frozen=True)
class Found:
    """A run of a benchmark.

    Attributes:
        path: its folder.
        name: that folder below the benchmark's, with slashes.
        settings: the content of its config.json.
        config: the federation.
        results: its lines.
    """

    path: Path
    name: str
    settings: Mapping[str, Any]
    config: Config
    results: Sequence[Result]

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that it was to have."""
        return tuple(self.settings.get("methods") or [method_name(self.config.align, self.config.merge)])

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds that it was to have."""
        return tuple(self.settings.get("seeds") or [self.config.seed])

    @property
    def missing(self) -> Iterator[tuple[str, int, str]]:
        """What it was to have and has not: method, seed and what is missing."""
        last = {(result["method"], result["seed"]): result for result in sorted(self.results, key=_round)}
        for method in dict.fromkeys((*self.methods, *(method for method, _ in last if SEPARATOR not in method))):
            for seed in self.seeds:
                result = last.get((method, seed))
                if result is None:
                    yield method, seed, f"seed {seed} not run"
                elif result["status"] == "ok" and result["round"] < self.config.rounds:
                    yield method, seed, f"seed {seed} stopped after round {result['round']} of {self.config.rounds}"


@dataclass(frozen=True)
class Setting:
    """What all runs of equal settings found.

    Attributes:
        values: the settings, derived ones among them.
        runs: sorted by name.
        results: the lines of all, one for each method, seed and round.
        rows: their summary, with a row for each method that has no result yet.
        missing: by method, what it was to have and has not.
    """

    values: Mapping[str, Value]
    runs: tuple[Found, ...]
    results: tuple[Result, ...]
    rows: tuple[Row, ...]
    missing: Mapping[str, tuple[str, ...]]

    @property
    def config(self) -> Config:
        """The federation of the first run."""
        return self.runs[0].config

    def row(self, method: str) -> Row | None:
        """Return a method's row, if it has any finished seed."""
        return next((row for row in self.rows if row.method == method and row.accuracies), None)

    def partition(self, seed: int | None = None) -> tuple[dict[str, Any], str] | None:
        """Return who has which images, and the file that tells it; None for models that were trained elsewhere.

        Args:
            seed: whose; None: of the first seed that has one.
        """
        for run in self.runs:
            for number in run.seeds if seed is None else [seed]:
                file = f"partitions/seed-{number}.json"
                if (run.path / file).is_file():
                    return Run(run.path).read_json(file), f"{run.name}/{file}"
        return None


@dataclass(frozen=True)
class Benchmark:
    """The runs of a folder.

    Attributes:
        path: the folder.
        runs: sorted by name.
        settings: sorted by what varies.
        varying: the names of the settings in which the runs differ; labels that are as many as images are not named.
    """

    path: Path
    runs: tuple[Found, ...]
    settings: tuple[Setting, ...]
    varying: tuple[str, ...]

    @property
    def common(self) -> dict[str, Value]:
        """The settings that all runs share."""
        first, *others = (setting.values for setting in self.settings)
        return {name: value for name, value in first.items() if all(other[name] == value for other in others)}

    @property
    def methods(self) -> tuple[str, ...]:
        """All methods, in the order in which the settings have them."""
        return tuple(dict.fromkeys(row.method for setting in self.settings for row in setting.rows))

    @property
    def seeds(self) -> tuple[int, ...]:
        """All seeds."""
        return tuple(sorted({seed for run in self.runs for seed in run.seeds}))


def collect(path: Path) -> Benchmark:
    """Return the runs below a folder.

    Args:
        path: the folder.

    Raises:
        RunError: if it holds no run, or no run in it has a result.
    """
    folders = sorted(file.parent.relative_to(path).as_posix() for file in path.rglob("config.json"))
    if not folders:
        raise RunError(
            f"{path} is not a run folder and holds none (no config.json, here or below): give a run's folder, or one "
            f"of runs, as `fedmerge compare --out {path / 'NAME'}` makes them"
        )
    runs = tuple(map(_read, [path] * len(folders), folders))
    if not any(run.results for run in runs):
        raise RunError(f"none of the {len(runs)} runs in {path} has a result: finish them with --resume")
    together: dict[tuple[tuple[str, Value], ...], list[Found]] = {}
    for run in runs:
        together.setdefault(tuple(values(run.config).items()), []).append(run)
    names = list(values(runs[0].config))
    columns = {name: [dict(told)[name] for told in together] for name in names}
    twins = [name for name in (LABELS, "server-examples") if columns[name] == columns[IMAGES]]
    varying = tuple(name for name in names if name not in twins and len(set(columns[name])) > 1)
    settings = [_setting(dict(told), members) for told, members in together.items()]
    settings.sort(key=lambda setting: [place(name, setting) for name in varying])
    return Benchmark(path, runs, tuple(settings), varying)


def sources_of(settings: Iterable[Setting]) -> tuple[list[str], list[str]]:
    """Return the files of results of settings, below the benchmark, and the commands that made them.

    Args:
        settings: of a figure.
    """
    runs = {run.name: run for setting in settings for run in setting.runs}
    commands = dict.fromkeys(repeat_command(run.settings) for run in runs.values())
    return [f"{name}/results.jsonl" for name in runs], list(commands)


def values(config: Config) -> dict[str, Value]:
    """Return the settings by which runs are told apart, the derived ones first.

    Example:
        >>> told = values(Config(alpha=0.1, server_examples=50))
        >>> told["division"], told["server-labels"]
        ('α = 0.1', 50)
    """
    derived: dict[str, Value] = {
        DIVISION: division(config),
        LABELS: config.num_server_labels,
        IMAGES: config.num_server_images,
    }
    names = [item.name for item in dataclasses.fields(Config) if item.name not in NOT_SETTINGS]
    return derived | {key(name): getattr(config, name) for name in names}


def division(config: Config) -> str:
    """Return how the clients' images are divided, in a word.

    Example:
        >>> division(Config(alpha=0.3)), division(Config(partition="iid"))
        ('α = 0.3', 'iid')
    """
    if config.partition not in BY_ALPHA:
        return config.partition
    return f"{config.partition} α = {config.alpha:g}".removeprefix("dirichlet ")


def place(name: str, setting: Setting) -> tuple[float, str]:
    """Return where a setting comes in the order of its values of `name`; divisions from the most different clients on.

    Args:
        name: of the setting.
        setting: whose value it is.
    """
    value = setting.values[name]
    if name != DIVISION:
        return (math.inf, value) if isinstance(value, str) else (float(value), "")
    partition = setting.config.partition
    if partition in BY_ALPHA:
        return setting.config.alpha, partition
    return (-1.0 - UNLIKE[::-1].index(partition), "") if partition in UNLIKE else (math.inf, partition)


def _round(result: Result) -> int:
    return int(result["round"])


def _read(path: Path, folder: str) -> Found:
    run = Run.open(path / folder)
    return Found(run.path, folder, run.settings, run.config, run.results())


def _setting(told: Mapping[str, Value], runs: Sequence[Found]) -> Setting:
    results: dict[tuple[str, int, int], Result] = {}
    for result in (result for run in runs for result in run.results):
        cell = result["method"], result["seed"], _round(result)
        first = results.setdefault(cell, result)
        if first is not result and first["status"] != "ok":
            results[cell] = result
        elif first is not result and result["status"] == "ok" and first["accuracy"] != result["accuracy"]:
            logger.warning(
                "runs of equal settings (%s) have two results of %s, seed %d: the first counts",
                *(", ".join(run.name for run in runs), *cell[:2]),
            )
    done = {
        (method, seed): number if results[method, seed, number]["status"] == "ok" else math.inf
        for method, seed, number in sorted(results)
    }
    lacks: dict[tuple[str, int], str] = {}
    for run in runs:
        for method, seed, text in run.missing:
            if done.get((method, seed), 0) < run.config.rounds and (method, seed) not in lacks:
                lacks[method, seed] = text
    kept = [result for result in results.values() if (result["method"], result["seed"]) not in lacks]
    seeds = {seed for run in runs for seed in run.seeds}
    rows = summarize(kept, seeds)
    planned = dict.fromkeys((*(method for run in runs for method in run.methods), *(method for method, _ in lacks)))
    there = {row.method for row in rows}
    rows += [Row(method, tuple(sorted(seeds)), {}, {}) for method in planned if method not in there]
    return Setting(told, tuple(runs), tuple(results.values()), tuple(rows), _by_method(lacks))


def _by_method(lacks: Mapping[tuple[str, int], str]) -> dict[str, tuple[str, ...]]:
    methods: Iterable[str] = dict.fromkeys(method for method, _ in lacks)
    return {method: tuple(text for (other, _), text in lacks.items() if other == method) for method in methods}
