"""What a run found out: one row for each method, its seeds summarised and its failures kept in sight.

A mean is only ever over the seeds that a method finished, and a row says which are missing. Methods are compared seed
by seed: the paired difference has far less noise than the difference of two means, because a seed's clients, images and
initialisations are the same for both.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedmerge.runs import Result
from fedmerge.settings import known

BASELINE = "fedavg"
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Row:
    """What a run found out about one method.

    Attributes:
        method: its name.
        seeds: all seeds of the run, finished by this method or not.
        accuracies: accuracy in [0, 1] by seed, of the seeds that it finished.
        errors: the message by seed, of the seeds that it failed.
        loss: mean over the finished seeds; None where a seed has none.
        seconds: mean over the finished seeds of the time of all their rounds.
        bytes_up: sent by all clients in all rounds of a seed; mean over the finished seeds.
        bytes_down: sent to all clients, likewise.
        server_examples: images of the server that it used; None where no seed is finished.
        server_labels: whether it used their labels.
        models: members that answer together, 1 for a single model.
        class_accuracies: mean accuracy of each class over the finished seeds that evaluated images of it; None without.
        architectures: the names of its models' architectures, where they are not all the server's.
        note: what a reader must know of it, in a few words.
        missing: how many updates of clients its rounds did without, by seed, of the finished seeds that lack any.
    """

    method: str
    seeds: tuple[int, ...]
    accuracies: Mapping[int, float]
    errors: Mapping[int, str]
    loss: float | None = None
    seconds: float | None = None
    bytes_up: int | None = None
    bytes_down: int | None = None
    server_examples: int | None = None
    server_labels: bool = True
    models: int = 1
    class_accuracies: tuple[float | None, ...] = ()
    architectures: tuple[str, ...] = ()
    note: str = ""
    missing: Mapping[int, int] = field(default_factory=dict)

    @property
    def mean(self) -> float | None:
        """Mean accuracy over the finished seeds, or None."""
        return statistics.fmean(self.accuracies.values()) if self.accuracies else None

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation of the accuracy over the finished seeds, or None for fewer than two."""
        return statistics.stdev(self.accuracies.values()) if len(self.accuracies) > 1 else None

    @property
    def complete(self) -> bool:
        """Whether every seed of the run is finished."""
        return len(self.accuracies) == len(self.seeds)

    @property
    def coverage(self) -> str:
        """How many of the run's seeds are finished, in words."""
        return f"{len(self.accuracies)} of {len(self.seeds)} seeds"

    @property
    def aligned(self) -> bool:
        """Whether the method is ALIGNER+MERGER; the others are controls."""
        return "+" in self.method.split(":")[0]


@dataclass(frozen=True)
class Difference:
    """A method's accuracy minus the baseline's, over the seeds that both finished.

    Attributes:
        mean: of the differences, in [-1, 1].
        half_width: of the 95 % Student t interval of that mean; None for one seed.
        seeds: how many seeds.
    """

    mean: float
    half_width: float | None
    seeds: int


def summarize(results: Iterable[Result], seeds: Iterable[int] = ()) -> list[Row]:
    """Return a row for each method, in the order in which the results name them.

    The last round of a seed counts. A seed that stopped in an earlier round than the method's other seeds is unfinished
    and no part of the mean.

    Args:
        results: of any methods, seeds and rounds, as `Run.results` gives them.
        seeds: the seeds that the run was to have, where some may have no result yet.
    """
    methods: dict[str, dict[int, list[Result]]] = {}
    for result in results:
        methods.setdefault(result["method"], {}).setdefault(result["seed"], []).append(result)
    every = sorted({*seeds}.union(*methods.values()))
    return [_row(method, cells, tuple(every)) for method, cells in methods.items()]


def _row(method: str, cells: Mapping[int, Sequence[Result]], seeds: tuple[int, ...]) -> Row:
    rounds = {seed: sorted(cells[seed], key=lambda result: result["round"]) for seed in sorted(cells)}
    last_round = max(results[-1]["round"] for results in rounds.values())
    errors = {
        seed: results[-1].get("error") or "no message"
        for seed, results in rounds.items()
        if results[-1]["status"] != "ok"
    }
    finished = {
        seed: results for seed, results in rounds.items() if seed not in errors and results[-1]["round"] == last_round
    }
    final = [results[-1] for results in finished.values()]

    def total(name: str) -> float | None:
        done = [[result[name] for result in results if result["status"] == "ok"] for results in finished.values()]
        return _mean([None if None in values else sum(values) for values in done])

    up, down = total("bytes_up"), total("bytes_down")
    by_class = [result["per_class_accuracy"] for result in final]
    return Row(
        method=method,
        seeds=seeds,
        accuracies={seed: results[-1]["accuracy"] for seed, results in finished.items()},
        errors=errors,
        loss=_mean([result["loss"] for result in final]),
        seconds=total("seconds"),
        bytes_up=None if up is None else round(up),
        bytes_down=None if down is None else round(down),
        server_examples=final[0]["server_examples"] if final else None,
        server_labels=all(result["server_labels"] for result in final),
        models=max((result["models"] for result in final), default=1),
        class_accuracies=_mean_by_class(by_class) if None not in by_class else (),
        architectures=tuple(dict.fromkeys(name for result in final for name in result.get("architectures", ()))),
        note=final[0].get("note", "") if final else "",
        missing={
            seed: count
            for seed, results in finished.items()
            if (count := sum(len(refused(result)) for result in results))
        },
    )


def refused(result: Result) -> list[str]:
    """Return why clients have no part in a result: an update each that could not be used, or did not come."""
    found: list[str] = (result.get("diagnostics") or {}).get("refused", [])
    return found


def paired_differences(rows: Sequence[Row], baseline: str = BASELINE) -> dict[str, Difference]:
    """Return each other method's difference to the baseline, for methods that share a finished seed with it.

    A `baseline` that is not among the rows is a ConfigurationError.
    """
    known("baseline", baseline, [row.method for row in rows])
    reference = next(row for row in rows if row.method == baseline).accuracies
    differences = {}
    for row in rows:
        paired = [row.accuracies[seed] - reference[seed] for seed in row.accuracies if seed in reference]
        if row.method == baseline or not paired:
            continue
        differences[row.method] = with_interval(paired)
    return differences


def with_interval(values: Sequence[float]) -> Difference:
    """Return the mean of values, one for each seed, with its 95 % Student t interval.

    Args:
        values: at least one.
    """
    from scipy.stats import t

    half_width = None
    if len(values) > 1:
        quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
        half_width = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return Difference(statistics.fmean(values), half_width, len(values))


def best_single_model(rows: Sequence[Row]) -> Row | None:
    """Return the row of highest mean accuracy that finished every seed, and is one model of the server's architecture.

    The first of equals; None if there is none, or a single row, which is no choice.
    """
    single = [row for row in rows if row.models == 1 and row.complete and not row.architectures]
    return max(single, key=lambda row: row.mean or 0.0, default=None) if len(rows) > 1 else None


def _mean_by_class(by_seed: Sequence[Sequence[float | None]]) -> tuple[float | None, ...]:
    """Mean over the seeds whose evaluation has images of the class."""
    return tuple(_mean([value for value in values if value is not None]) for values in zip(*by_seed, strict=True))


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean, or None for no values or a missing one."""
    present = [value for value in values if value is not None]
    return statistics.fmean(present) if present and len(present) == len(values) else None
