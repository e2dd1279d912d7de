"""What the command prints: progress on stderr, results on stdout."""

from __future__ import annotations

import json
import logging
import sys
from types import TracebackType
from typing import TYPE_CHECKING

from rich import console as rich_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fedmerge.summary import BASELINE

if TYPE_CHECKING:
    from pathlib import Path

    from fedmerge.runs import Run


class Console:
    """The output of one command.

    Args:
        quiet: print errors alone.
        as_json: print the results as JSON and nothing else.

    Attributes:
        failed: whether a method has failed.
    """

    def __init__(self, *, quiet: bool, as_json: bool) -> None:
        self.quiet, self.as_json = quiet, as_json
        self.failed = False
        self._errors = rich_console.Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._errors,
            transient=True,
            disable=quiet or as_json or not self._errors.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Console:
        ours = logging.getLogger("fedmerge")
        self._before = ours.level, ours.propagate
        ours.setLevel(logging.INFO)
        ours.propagate = False
        self._warnings = logging.StreamHandler()
        self._warnings.setLevel(logging.ERROR if self.quiet or self.as_json else logging.WARNING)
        self._warnings.addFilter(lambda record: record.exc_info is None and record.levelno < logging.ERROR)
        ours.addHandler(self._warnings)
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        ours = logging.getLogger("fedmerge")
        ours.removeHandler(self._warnings)
        ours.level, ours.propagate = self._before

    def hush_flower(self) -> None:
        """Keep Flower's log of its rounds out of the terminal, once Flower is imported; it goes to the run's log."""
        for handler in [item for item in logging.getLogger("flwr").handlers if type(item).__name__ != "FileHandler"]:
            logging.getLogger("flwr").removeHandler(handler)

    def progress(self, task: str, done: int, total: int) -> None:
        """Show how far a task is; a finished one goes away."""
        if task not in self._tasks:
            self._tasks[task] = self._bars.add_task(task, total=total)
        self._bars.update(self._tasks[task], completed=done, total=total)
        if done >= total:
            self._bars.remove_task(self._tasks.pop(task))

    def finish(self, run: Run, baseline: str = BASELINE) -> None:
        """Write a run's report, and print its results."""
        from fedmerge.report import write_report
        from fedmerge.summary import summarize
        from fedmerge.tables import text_table
        from fedmerge.words import repeat_command

        results = run.results()
        page = write_report(run, baseline)
        rows = summarize(results, run.settings.get("seeds", ()))
        self.failed = self.failed or any(row.errors for row in rows)
        repeat = repeat_command(run.settings)
        if self.as_json:
            content = {"run": str(run.path), "report": str(page), "repeat": repeat, "results": results}
            sys.stdout.write(json.dumps(content) + "\n")
        elif not self.quiet:
            output = rich_console.Console()
            output.print(text_table(rows, baseline))
            output.print(
                f"\nrun folder  {run.path}\nreport      {page}\nrepeat      {repeat}", soft_wrap=True, highlight=False
            )

    def finish_benchmark(self, folder: Path, baseline: str) -> None:
        """Write the report of a folder of runs, and print what came out."""
        from fedmerge.benchmark.collecting import collect
        from fedmerge.benchmark.page import findings, write_benchmark_report

        benchmark = collect(folder)
        page, found = write_benchmark_report(benchmark, baseline), findings(benchmark)
        self.failed = self.failed or any(row.errors for setting in benchmark.settings for row in setting.rows)
        unfinished = {run.name: list(dict.fromkeys(text for _, _, text in run.missing)) for run in benchmark.runs}
        unfinished = {name: lacks for name, lacks in unfinished.items() if lacks}
        if self.as_json:
            content = {
                "folder": str(folder),
                "report": str(page),
                "findings": findings(benchmark),
                "unfinished": unfinished,
            }
            sys.stdout.write(json.dumps(content) + "\n")
        elif not self.quiet:
            output = rich_console.Console()
            for sentence in found:
                output.print(sentence, highlight=False, markup=False)
            for name, lacks in unfinished.items():
                output.print(f"unfinished  {name}: {', '.join(lacks)}", style="red", highlight=False, markup=False)
            output.print(f"\nreport      {page}", soft_wrap=True, highlight=False, markup=False)
