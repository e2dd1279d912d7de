"""What the experiments share: runs of `fedmerge` that are gone on with, and the files that documents quote."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from fedmerge.machine import num_cores
from fedmerge.runs import Run, file_name
from fedmerge.summary import Difference, Row, refused, summarize, with_interval
from fedmerge.tables import NOTHING, percent

HERE = Path(__file__).parent
EXPECTED = HERE / "expected"
FIGURES = HERE.parent / "docs" / "figures"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))}
"""Of the commands: the models that experiments define can be imported by name."""

CORES = num_cores()
CORES_OF_ONE = 5
"""That a comparison keeps busy, of five clients."""

Rows = Mapping[str, Row]
"""What a run found out, by method."""


def main(description: str | None, experiment: Callable[[str, Path], None]) -> None:
    """Run an experiment from the command line.

    Args:
        description: the script's docstring.
        experiment: called with the size, "full" or "smoke", and the folder for runs; those that are there are gone
            on with.
    """
    arguments = parser(description).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        experiment(arguments.size, arguments.out or Path(temporary))


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser of the flags that all experiments have.

    Args:
        description: the script's docstring.
    """
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--size", choices=("full", "smoke"), default="full")
    made.add_argument("--out", type=Path, help="folder for runs; those that are there already are gone on with")
    return made


def compare(command: str, out: Path, also: str = "") -> Run:
    """Run `fedmerge compare …` (or simulate) into a run folder, or finish the run that is there.

    Where there is a GPU, clients share it.

    Args:
        command: as a user would type it, without --out.
        out: the run folder.
        also: flags more, of what changes no number.

    Raises:
        RuntimeError: if something was merged without the update of a client: it is no part of a comparison.
    """
    words = shlex.split(f"{command} {also}")[1:]
    if (out / "config.json").exists():
        words = [words[0], "--resume"]
    if torch.cuda.is_available():
        words += ["--client-gpus", f"{1 / CORES:.4f}", "--batched-clients", "1"]  # each by itself, as on CPUs
    subprocess.run([sys.executable, "-m", "fedmerge", *words, "--out", str(out)], check=True, env=ENVIRONMENT)
    run = Run.open(out)
    for result in run.results():
        if lacking := refused(result):
            raise RuntimeError(f"{out}, round {result['round']}: {lacking[0]}; remove the folder, and run it again")
    return run


def compare_all(commands: Mapping[Path, str]) -> list[Run]:
    """Return the runs of several commands (see `compare`), side by side where there are cores for more than one.

    Args:
        commands: by run folder.
    """
    with ThreadPoolExecutor(max(1, CORES // CORES_OF_ONE)) as pool:
        return list(pool.map(lambda item: compare(item[1], item[0]), commands.items()))


def merge(jobs: Mapping[Path, tuple[Run, str]]) -> list[dict[str, Row]]:
    """Merge stored updates again, and return the rows by method of each job.

    Each method has a process and a run folder of its own, as many side by side as there are cores; what is there is
    not done again.

    Args:
        jobs: by the folder of the results, the run whose clients are merged and the arguments of `fedmerge merge`, of
            which the last is --methods.
    """

    def one(out: Path, run: Run, flags: Sequence[str], method: str) -> Rows:
        if not (out / "report.html").exists():
            shutil.rmtree(out, ignore_errors=True)
            words = ["merge", str(run.path), *flags, method, "--out", str(out), "--quiet"]
            subprocess.run([sys.executable, "-m", "fedmerge", *words], check=True, env=ENVIRONMENT)
        return rows_of(Run.open(out))

    with ThreadPoolExecutor(CORES) as pool:
        started = []
        for out, (run, arguments) in jobs.items():
            *flags, methods = shlex.split(arguments)
            started.append([pool.submit(one, out / file_name(name), run, flags, name) for name in methods.split(",")])
        return [{name: row for each in of_job for name, row in each.result().items()} for of_job in started]


def merged_run(out: Path, method: str) -> Run:
    """Return the run folder in which `merge` has put a method of a job.

    Args:
        out: the job's folder.
        method: of those that it merged by.
    """
    return Run.open(out / file_name(method))


def table(columns: Mapping[str, Rows], methods: Iterable[str]) -> list[str]:
    """Return the lines of a Markdown table: methods by cells, accuracy in percent, mean ± standard deviation.

    Args:
        columns: rows by method, by the cell's title.
        methods: the lines, in their order; what a cell lacks is a dash.
    """
    lines = [f"| Method | {' | '.join(columns)} |", f"| --- |{' ---: |' * len(columns)}"]
    for method in methods:
        cells = [percent(rows[method]) if method in rows else NOTHING for rows in columns.values()]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return lines


def advantage(cells: Iterable[Rows], ours: str, theirs: str) -> Difference:
    """Return by how much a method is more accurate than another, paired by cell and seed.

    Args:
        cells: rows by method, each with both.
        ours: a method.
        theirs: another.
    """
    return with_interval(
        [accuracy - rows[theirs].accuracies[seed] for rows in cells for seed, accuracy in rows[ours].accuracies.items()]
    )


def accuracies(columns: Mapping[str, Rows]) -> dict[str, dict[str, list[float]]]:
    """Return accuracies by cell and method, in the order of the seeds, for the files that documents quote."""
    return {
        title: {method: list(row.accuracies.values()) for method, row in rows.items()}
        for title, rows in columns.items()
    }


def rows_of(run: Run) -> dict[str, Row]:
    """Return a run's rows by method, of all its seeds."""
    return {row.method: row for row in summarize(run.results(), run.settings["seeds"])}


def hours(trained: Collection[Run], merged: Iterable[Rows] = ()) -> float:
    """Return the hours of one core that clients took to train, and methods to merge them.

    Args:
        trained: runs of one round.
        merged: rows by method of further merges.
    """
    updates = (update for run in trained for seed in run.settings["seeds"] for update in run.load_updates(seed))
    training = sum(float(update.metrics["seconds"]) for update in updates)
    rows = (row for found in (*merged, *map(rows_of, trained)) for row in found.values())
    return round((training + sum((row.seconds or 0) * len(row.accuracies) for row in rows)) / 3600, 2)


def mean_of(rows: Rows, method: str) -> float:
    """Return a method's mean accuracy; one that did not finish breaks the claim.

    Args:
        rows: by method.
        method: its name.
    """
    row = rows[method]
    assert row.complete, f"{method} did not finish: {dict(row.errors)}"
    assert row.mean is not None
    return row.mean


def holds(claim: str, values: Iterable[tuple[str, float]]) -> None:
    """Print a claim that was asserted, with its figures."""
    print(f"holds: {claim} (" + ", ".join(f"{name} {value:.3f}" for name, value in values) + ")")


def write(name: str, content: Mapping[str, Any], run: Run) -> None:
    """Write expected/NAME.json: what documents quote, with the versions that made it.

    Args:
        name: the experiment's.
        content: in JSON's types.
        run: one of its runs.
    """
    versions = {package: text for package, text in run.settings["versions"].items() if package != "platform"}
    EXPECTED.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**content, "versions": versions}, indent=2) + "\n"
    (EXPECTED / f"{name}.json").write_text(text, encoding="utf-8")
