"""What the benchmarks share: variants timed side by side, and tables that are made from result files.

The machine may be busy: what counts is CPU time, as the median ratio of runs that followed each other.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fedmerge.machine import reproducible

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TICKS = os.sysconf("SC_CLK_TCK")

Row = Mapping[str, str]
"""Cells by column."""


@dataclass(frozen=True)
class Timing:
    """Repeated measurements of one variant.

    Attributes:
        cpu: user and system seconds of each repeat.
        wall: seconds of each repeat.
    """

    cpu: tuple[float, ...]
    wall: tuple[float, ...]

    @property
    def milliseconds(self) -> str:
        """The median CPU time."""
        return f"{1e3 * statistics.median(self.cpu):.1f}"

    def over(self, floor: Timing) -> str:
        """Return the median ratio of CPU times, with the quartiles.

        Args:
            floor: a variant of the same `interleaved`.
        """
        ratios = sorted(ours / theirs for ours, theirs in zip(self.cpu, floor.cpu, strict=True))
        quarter = len(ratios) // 4
        return f"{statistics.median(ratios):.2f} ({ratios[quarter]:.2f} to {ratios[-1 - quarter]:.2f})"


def cpu_seconds() -> float:
    """Return the user and system time of this process and its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def tree_seconds() -> float:
    """Return the user and system time of this process and all that descend from it, ended ones included."""
    children: defaultdict[int, list[int]] = defaultdict(list)
    seconds: dict[int, float] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        children[int(fields[1])].append(int(stat.parent.name))
        seconds[int(stat.parent.name)] = sum(map(int, fields[11:15])) / TICKS
    found, left = 0.0, [os.getpid()]
    while left:
        process = left.pop()
        found += seconds.get(process, 0.0)
        left += children[process]
    return found


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    each: int = 1,
    clock: Callable[[], float] = cpu_seconds,
) -> dict[str, Timing]:
    """Time variants in turn, again and again, after one run of each that does not count.

    Args:
        variants: what to run, by name.
        repeats: rounds, in each of which every variant runs.
        each: runs of a variant in a round, timed together.
        clock: CPU seconds.
    """
    cpu: dict[str, list[float]] = {name: [] for name in variants}
    wall: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    for _ in range(repeats):
        for name, run in variants.items():
            began, before = time.perf_counter(), clock()
            for _ in range(each):
                run()
            cpu[name].append((clock() - before) / each)
            wall[name].append((time.perf_counter() - began) / each)
    return {name: Timing(tuple(cpu[name]), tuple(wall[name])) for name in variants}


def main(description: str | None, benchmark: Callable[[bool], Sequence[Row]], *, device: str = "one thread") -> None:
    """Run a benchmark from the command line, print its table, and keep it in results/NAME.json unless it is quick.

    Args:
        description: the script's docstring.
        benchmark: returns the rows; called with whether to be quick, which only shows that it runs.
        device: what it runs on, beside the processor's name.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that it runs, and writes nothing")
    quick = parser.parse_args().quick
    with reproducible():  # as our programs compute
        rows = [dict(row) for row in benchmark(quick)]
    name = Path(sys.argv[0]).stem
    found = {
        "command": f"python benchmarks/{name}.py",
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "machine": f"{_processor()}, {device}",
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "rows": rows,
    }
    print(table(found))
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def table(found: Mapping[str, Any]) -> str:
    """Return a result as Markdown: its command, date and machine, and its rows.

    Args:
        found: the content of a result file.
    """
    columns = list(found["rows"][0])
    lines = [columns, ["---"] * len(columns), *(list(row.values()) for row in found["rows"])]
    versions = ", ".join(f"{name} {text}" for name, text in found["versions"].items())
    head = f"`{found['command']}`, {found['date']}, {found['machine']}, {versions}:"
    return "\n".join([head, "", *("| " + " | ".join(line) + " |" for line in lines)])


def _processor() -> str:
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
