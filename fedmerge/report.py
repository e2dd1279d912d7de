"""The report of a run: figures, and one HTML page that holds all that a reader needs and loads nothing.

    RUN/report.html
    RUN/figures/accuracy.png, .svg      by method
    RUN/figures/rounds.png, .svg        by round, of a run with several
    RUN/figures/classes.png, .svg       by class
    RUN/figures/labels.png, .svg        which client has which classes

The same run gives the same bytes. The numbers are those of `summary`, the sentences those of `words`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedmerge import summary, tables
from fedmerge.pages import Plate, render, write_figures
from fedmerge.runs import Result, Run, RunError
from fedmerge.summary import BASELINE, Row
from fedmerge.tables import NOTHING, clean, printable
from fedmerge.words import headline, privacy, repeat_command, scenario, title

MOST_ENTRIES = 200  # of a method's diagnostics on the page
MOST_ITEMS = 8  # of a list in them


def write_report(run: Run, baseline: str = BASELINE) -> Path:
    """Write RUN/report.html and RUN/figures.

    A run whose every method failed gets a page that says so, with the messages.

    Args:
        run: the run folder.
        baseline: the method that the others are compared with, if the run has it.

    Returns:
        The page.

    Raises:
        RunError: if the run has no results at all.
    """
    settings, config, results = run.settings, run.config, run.results()
    command = repeat_command(settings)
    if not results:
        raise RunError(f"{run.path} has no results: finish the run, or repeat it with `{command}`")
    rows = summary.summarize(results, settings.get("seeds", ()))
    seeds = rows[0].seeds
    partition = _first_partition(run, seeds)
    page = render(
        "report",
        title=title(config),
        scenario=" ".join([scenario(config, seeds, partition), *privacy(config, results)]),
        command=command,
        headline=headline(rows, baseline),
        shown=summary.best_single_model(rows) or (rows[0] if len(rows) == 1 and rows[0].accuracies else None),
        plates=write_figures(_plates(results, rows, partition, [command]), run.write),
        failures=[_failure(result) for result in results if result["status"] != "ok"],
        left_out=list(_left_out(results)),
        diagnostics=list(_diagnostics(results, seeds)),
        changed=sorted(config.to_mapping(changed_only=True)),
        config={name: _text(value) for name, value in config.to_mapping().items()},
        settings=settings,
        seeds=seeds,
        **_results_table(rows, baseline),
    )
    return run.write("report.html", page)


def _first_partition(run: Run, seeds: Sequence[int]) -> dict[str, Any] | None:
    """The first partition that the run has, and which; None for models that were trained elsewhere."""
    for seed in seeds:
        source = f"partitions/seed-{seed}.json"
        if (run.path / source).is_file():
            content = run.read_json(source)
            return {**content, "source": source, "seed": seed}
    return None


def _results_table(rows: Sequence[Row], baseline: str) -> dict[str, Any]:
    """The page's main table: headings, and for each row its texts with the numbers to sort them by."""
    best = summary.best_single_model(rows)
    differences = summary.paired_differences(rows, baseline) if baseline in [row.method for row in rows] else {}
    lines = []
    for row in rows:
        found = differences.get(row.method)
        compared = (NOTHING, None) if found is None else (tables.points(found), found.mean)
        cells = [
            (tables.percent(row), row.mean),
            *([compared] if differences else []),
            (NOTHING if row.loss is None else f"{row.loss:.3f}", row.loss),
            (tables.duration(row.seconds), row.seconds),
            (tables.size(row.bytes_up), row.bytes_up),
            (tables.size(row.bytes_down), row.bytes_down),
            (NOTHING if row.server_examples is None else str(row.server_examples), row.server_examples),
        ]
        lines.append(
            {
                "row": row,
                "method": clean(row.method),
                "remarks": "; ".join(tables.remarks(row, best)),
                "cells": cells,
            }
        )
    compared_with = [f"vs {clean(baseline)}"] if differences else []
    headings = ["Method", "Accuracy, %", *compared_with, "Loss", "Seconds", "Up", "Down", "Server images"]
    return {"best": best, "headings": headings, "lines": lines, "baseline": clean(baseline) if differences else ""}


def _plates(
    results: Sequence[Result], rows: Sequence[Row], partition: Mapping[str, Any] | None, commands: Sequence[str]
) -> Iterator[Plate]:
    from fedmerge import figures

    source = ["results.jsonl"]
    finished = [row for row in rows if row.accuracies]
    if finished and len(rows) > 1:
        yield Plate(
            "accuracy",
            "Accuracy by method",
            "Mean accuracy over the seeds (large mark), ± one sample standard deviation (line), and each seed (dots). "
            "Blue circles are aligned merges, brown diamonds controls; a hollow mark is an ensemble, which runs all "
            "its members on each image.",
            figures.accuracy_figure(rows),
            ["Method", *(f"seed {seed}, %" for seed in rows[0].seeds), "mean ± deviation, %"],
            [
                [clean(row.method), *(_share(row.accuracies.get(seed)) for seed in row.seeds), tables.percent(row)]
                for row in rows
            ],
            source,
            commands,
        )
    if finished and len({result["round"] for result in results}) > 1:
        yield Plate(
            "rounds",
            "Accuracy by round",
            "Mean accuracy after each round, over the seeds that finished it.",
            figures.rounds_figure(results),
            ["Method", "seed", "round", "accuracy, %"],
            [
                [clean(result["method"]), str(result["seed"]), str(result["round"]), _share(result["accuracy"])]
                for result in results
                if result["status"] == "ok"
            ],
            source,
            commands,
        )
    by_class = [row for row in rows if row.class_accuracies]
    if by_class:
        classes = partition["classes"] if partition else list(map(str, range(len(by_class[0].class_accuracies))))
        yield Plate(
            "classes",
            "Accuracy by class",
            "Accuracy in percent on the images of each class, mean over the seeds: a method can have a fair mean and "
            "have lost a class.",
            figures.classes_figure(by_class, classes),
            ["Method", *map(clean, classes)],
            [[clean(row.method), *map(_share, row.class_accuracies)] for row in by_class],
            source,
            commands,
        )
    if partition:
        counts = partition["label_counts"]
        several = " Other seeds divide them anew." if len(rows[0].seeds) > 1 else ""
        yield Plate(
            "labels",
            "Who has which classes",
            f"Training images of each class at each client, seed {partition['seed']}: the larger the bubble or the "
            f"fuller the cell, the more. The bars above are all images of a client.{several}",
            figures.labels_figure(partition),
            ["Client", *map(clean, partition["classes"]), "all"],
            [[str(client), *(f"{count:,}" for count in row), f"{sum(row):,}"] for client, row in enumerate(counts)],
            [partition["source"]],
            commands,
        )


def _failure(result: Result) -> dict[str, Any]:
    error = printable(result.get("error") or "no message")
    return {"method": clean(result["method"]), "seed": result["seed"], "round": result["round"], "error": error}


def _left_out(results: Sequence[Result]) -> Iterator[tuple[str, str, str]]:
    """The clients that a merge was made without: client, reason, and where; alike ones of several methods once."""
    found: dict[tuple[str, str], list[str]] = {}
    for result in results:
        diagnostics = result.get("diagnostics") or {}
        without = [("", reason) for reason in summary.refused(result)]
        for client, reason in (*without, *diagnostics.get("screen", {}).get("left-out", {}).items()):
            place = f"seed {result['seed']}, round {result['round']}"
            found.setdefault((f"{place}, client {client}" if client else place, reason), []).append(result["method"])
    for (place, reason), methods in found.items():
        yield clean(place), clean(reason), ", ".join(clean(method) for method in methods)


def _diagnostics(results: Sequence[Result], seeds: Sequence[int]) -> Iterator[tuple[str, list[tuple[str, list[str]]]]]:
    """For each method that has any: names and, by seed, texts of its last round's diagnostics."""
    for method in dict.fromkeys(result["method"] for result in results):
        last = {
            result["seed"]: dict(_leaves(result.get("diagnostics") or {}))
            for result in sorted(results, key=lambda result: result["round"])
            if result["method"] == method
        }
        names = list(dict.fromkeys(name for leaves in last.values() for name in leaves))
        entries = [(name, [last.get(seed, {}).get(name, "") for seed in seeds]) for name in names[:MOST_ENTRIES]]
        if len(names) > MOST_ENTRIES:
            entries.append((f"and {len(names) - MOST_ENTRIES} more in results.jsonl", [""] * len(seeds)))
        if entries:
            yield clean(method), entries


def _leaves(value: object, name: str = "") -> Iterator[tuple[str, str]]:
    """The names and texts of what a tree of JSON's types holds; a list of plain values is one of them."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name} / {clean(str(key))}" if name else clean(str(key)))
    elif isinstance(value, list) and any(isinstance(item, (Mapping, list)) for item in value):
        for index, item in enumerate(value):
            yield from _leaves(item, f"{name} {index}")
    else:
        yield name, _text(value)


def _text(value: object) -> str:
    if isinstance(value, list):
        more = f", … ({len(value)} values)" if len(value) > MOST_ITEMS else ""
        return ", ".join(map(_text, value[:MOST_ITEMS])) + more
    if isinstance(value, bool):
        return "yes" if value else "no"
    return NOTHING if value is None else f"{value:.4g}" if isinstance(value, float) else clean(str(value))


def _share(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.2f}"
