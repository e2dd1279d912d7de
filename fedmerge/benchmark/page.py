"""The report of a benchmark folder: one HTML page that holds all that a reader needs and loads nothing, and figures.

    FOLDER/report.html
    FOLDER/figures/division.png, .svg       accuracy against α, or how else the images are divided
    FOLDER/figures/server-labels.png, …     against each other setting in which the runs differ
    FOLDER/figures/rounds.png, bytes.png    of runs of several rounds
    FOLDER/figures/labels.png, classes.png, coefficients.png

The same folder gives the same bytes. What runs are compared, and how, is that of `benchmark` and `comparing`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fedmerge import tables
from fedmerge.benchmark.collecting import DIVISION, Benchmark, Found, Setting
from fedmerge.benchmark.contests import conclusions, is_ours, phrase
from fedmerge.benchmark.curves import curve_plates
from fedmerge.benchmark.maps import map_plates
from fedmerge.benchmark.rounds import round_plates, rounds_needed
from fedmerge.pages import render, write_figures
from fedmerge.summary import BASELINE, Row, best_single_model, paired_differences
from fedmerge.tables import NOTHING, clean, printable
from fedmerge.wholefiles import write_whole
from fedmerge.words import repeat_command


def write_benchmark_report(benchmark: Benchmark, baseline: str = BASELINE) -> Path:
    """Write FOLDER/report.html and FOLDER/figures.

    Args:
        benchmark: its runs.
        baseline: the method that the others are compared with, in each setting that has it.

    Returns:
        The page.
    """
    path = benchmark.path

    def write(name: str, content: bytes) -> None:
        write_whole(path / name, content)

    page = render(
        "benchmark",
        title=_title(benchmark),
        scenario=_scenario(benchmark),
        headline=findings(benchmark),
        headings=list(_headings(benchmark, baseline)),
        baseline=clean(baseline),
        lines=list(_lines(benchmark, baseline)),
        plates=write_figures([*curve_plates(benchmark), *round_plates(benchmark), *map_plates(benchmark)], write),
        failures=list(_failures(benchmark)),
        unfinished=list(_unfinished(benchmark)),
        runs=[_run(run) for run in benchmark.runs],
        common=[(name, clean(str(value))) for name, value in benchmark.common.items()],
        versions=_versions(benchmark),
    )
    write("report.html", page)
    return path / "report.html"


def findings(benchmark: Benchmark) -> list[str]:
    """Return what came out, in sentences.

    Args:
        benchmark: its runs.
    """
    return [*conclusions(benchmark), *rounds_needed(benchmark)]


def _title(benchmark: Benchmark) -> str:
    data = ", ".join(dict.fromkeys(clean(run.config.data) for run in benchmark.runs))
    return f"{data}: {len(benchmark.settings)} settings, {len(benchmark.methods)} methods"


def _scenario(benchmark: Benchmark) -> str:
    """What was compared, in a few sentences."""
    common, seeds = benchmark.common, benchmark.seeds
    what = [phrase(name, common[name]) for name in ("clients", DIVISION, "init", "rounds") if name in common]
    what = [*([f"model {clean(str(common['model']))}"] if "model" in common else []), *what]
    same = f" All have {', '.join(what)}." if what else ""
    differ = (
        f" They differ in {', '.join(name.replace('-', ' ') for name in benchmark.varying)}."
        if benchmark.varying
        else ""
    )
    over = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds ({', '.join(map(str, seeds))})"
    splits = dict.fromkeys(run.config.split for run in benchmark.runs)
    judged = {"test": "the test files", "development": "images cut from the training files (development)"}
    final = " and ".join(judged[split] for split in splits)
    runs = f"{len(benchmark.runs)} run{'s' * (len(benchmark.runs) != 1)} over {over}."
    return f"{runs}{same}{differ} Accuracies are on {final}. Within a setting all methods merge the same clients."


def _headings(benchmark: Benchmark, baseline: str) -> Iterator[tuple[str, bool]]:
    """The table's columns after the methods', and whether a column is sorted as words."""
    yield from (("Accuracy, %", False), (f"vs {clean(baseline)}", False))
    for name in benchmark.varying:
        words = any(isinstance(_key(setting, name, 0), str) for setting in benchmark.settings)
        yield name.replace("-", " "), words
    yield from ((text, False) for text in ("Seeds", "Images used", "Up", "Seconds"))


def _lines(benchmark: Benchmark, baseline: str) -> Iterator[dict[str, Any]]:
    """The table of all cells: for each its texts, with the numbers to sort them by."""
    for order, setting in enumerate(benchmark.settings):
        rows = setting.rows
        best = best_single_model(rows)
        names = [row.method for row in rows]
        differences = paired_differences(rows, baseline) if baseline in names else {}
        for row in rows:
            found = differences.get(row.method)
            compared = (NOTHING, None) if found is None else (tables.points(found), found.mean)
            yield {
                "row": row,
                "ours": is_ours(row.method),
                "best": row is best,
                "method": clean(row.method),
                "remarks": "; ".join(_remarks(row, best, setting)),
                "cells": [
                    (_accuracy(row), row.mean),
                    compared,
                    *((_value(setting, name), _key(setting, name, order)) for name in benchmark.varying),
                    (f"{len(row.accuracies)} of {len(row.seeds)}", len(row.accuracies)),
                    (NOTHING if row.server_examples is None else f"{row.server_examples:,}", row.server_examples),
                    (tables.size(row.bytes_up), row.bytes_up),
                    (tables.duration(row.seconds), row.seconds),
                ],
            }


def _accuracy(row: Row) -> str:
    return "missing" if row.mean is None and not row.errors else tables.percent(row)


def _remarks(row: Row, best: Row | None, setting: Setting) -> list[str]:
    covered = row.coverage
    found = [remark for remark in tables.remarks(row, best) if remark != covered]
    if row.errors:
        found.append(clean(tables.first_error(row)))
    return [*found, *setting.missing.get(row.method, ())]


def _value(setting: Setting, name: str) -> str:
    value = setting.values[name]
    number = not isinstance(value, (bool, str))
    return f"{value:,}" if isinstance(value, int) and number else f"{value:g}" if number else clean(str(value))


def _key(setting: Setting, name: str, order: int) -> Any:
    """What a column of settings is sorted by: numbers by value, divisions by how different the clients are."""
    value = setting.values[name]
    return order if name == DIVISION or isinstance(value, bool) else value


def _failures(benchmark: Benchmark) -> Iterator[dict[str, Any]]:
    for run in benchmark.runs:
        for result in run.results:
            if result["status"] != "ok":
                error = printable(result.get("error") or "no message")
                yield {"run": run.name, "method": clean(result["method"]), "seed": result["seed"], "error": error}


def _unfinished(benchmark: Benchmark) -> Iterator[tuple[str, str, str]]:
    """Runs that lack something: the run, what is missing, and of which methods."""
    for run in benchmark.runs:
        lacks: dict[str, list[str]] = {}
        for method, _, text in run.missing:
            lacks.setdefault(text, []).append(clean(method))
        for text, methods in lacks.items():
            yield run.name, text, ", ".join(methods)


def _run(run: Found) -> dict[str, Any]:
    seconds = [result["seconds"] for result in run.results if result.get("seconds") is not None]
    cells = len({(result["method"], result["seed"]) for result in run.results})
    return {
        "name": run.name,
        "page": f"{run.name}/report.html" if (run.path / "report.html").is_file() else f"{run.name}/results.jsonl",
        "command": repeat_command(run.settings),
        "seeds": ", ".join(map(str, run.seeds)),
        "cells": cells,
        "seconds": tables.duration(sum(seconds)) if seconds else NOTHING,
    }


def _versions(benchmark: Benchmark) -> list[tuple[str, str]]:
    """The versions of all runs; several where they differ."""
    told: Sequence[dict[str, str]] = [run.settings.get("versions", {}) for run in benchmark.runs]
    names = dict.fromkeys(name for versions in told for name in versions)
    return [
        (clean(name), clean(", ".join(dict.fromkeys(versions[name] for versions in told if name in versions))))
        for name in names
    ]
