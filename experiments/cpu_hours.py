"""Claim: all tables take 15 CPU hours at most (the goal was 12).

    python experiments/cpu_hours.py --out FOLDER    # the first seed of every table again; what is there is kept
    python experiments/cpu_hours.py --size smoke    # two commands on digits; what CI runs

The commands that made the tables (experiments/expected/*.json) are run again for their first seed, and the CPU time of
all their processes is counted: training on Ray, merging, start and report. Seeds differ in little but chance, so an
experiment takes as much for each of its seeds, but for the start, which is that of commands with nearly nothing to do
and counts once for all seeds of a command. Clients that several experiments share count for the first of them by name.
A `merge` is run on each run before it in its list, as in the experiments (but for one of `unlabelled.py`, which takes
one of two). Not counted are what experiments do without a command (`hostile.py`) and the papers' VGG-11, which was
trained on a GPU. At full size it writes experiments/expected/cpu_hours.json.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from _run import CORES, ENVIRONMENT, EXPECTED, holds, main, write

from fedmerge.runs import Run

MOST = 15.0
"""Hours of CPU time, of all experiments."""

INTERVAL = 0.5
"""Seconds between two looks at what the processes have used: Ray's do not tell when they end."""

ON_A_GPU = "--model vgg11 "
SEEDS = re.compile(r"--seeds (\d+)((?:,\d+)*)")
START = [
    "fedmerge compare --clients 2 --local-epochs 1 --server-examples 100 --seeds 0,1 --methods fedavg",
    "fedmerge merge RUN --methods mean --out NEW",
]
"""Commands with nearly nothing to do: a comparison and a merge."""


@dataclass(frozen=True)
class Job:
    """A command for one seed.

    Attributes:
        words: without --out.
        out: its run folder.
    """

    words: str
    out: Path

    def seconds(self) -> float:
        """Return the CPU seconds of all its processes, which run now unless they did before."""
        counted = self.out / "cpu-seconds.json"
        if not counted.exists():
            shutil.rmtree(self.out, ignore_errors=True)
            words = [sys.executable, "-m", "fedmerge", *self.words.split()[1:], "--out", str(self.out), "--quiet"]
            spent: dict[psutil.Process, float] = {}
            with psutil.Popen(words, env=ENVIRONMENT) as process:
                while process.poll() is None:
                    for one in (process, *process.children(recursive=True)):
                        with suppress(psutil.Error):  # it has just ended
                            spent[one] = sum(one.cpu_times()[:2])
                    time.sleep(INTERVAL)
            if process.returncode:
                raise RuntimeError(f"{self.words} ended with {process.returncode}")
            counted.write_text(json.dumps(sum(spent.values())), encoding="utf-8")
        found: float = json.loads(counted.read_text(encoding="utf-8"))
        return found


def commands_in(content: Any) -> Iterator[str]:
    """Return the commands in a file's content, in their order."""
    if isinstance(content, str) and content.startswith("fedmerge "):
        yield content
    elif isinstance(content, (Mapping, list)):
        for part in content.values() if isinstance(content, Mapping) else content:
            yield from commands_in(part)


def jobs_of(commands: Sequence[str], out: Path) -> list[list[Job]]:
    """Return the jobs that train clients, and those that merge them again, for the first seed.

    Args:
        commands: of an experiment.
        out: folder for the runs.
    """
    trained: list[Job] = []
    merged: list[Job] = []
    for words in (SEEDS.sub(r"--seeds \1", command).removesuffix(" --out NEW") for command in commands):
        if ON_A_GPU in words:
            continue
        if " RUN " not in words:
            trained.append(Job(words, out / _short(words)))
        else:
            merged += [
                Job(words.replace(" RUN ", f" {run.out} "), run.out.with_name(f"{run.out.name}-{_short(words)}"))
                for run in trained
            ]
    return [trained, merged]


def _short(words: str) -> str:
    return hashlib.sha256(words.encode()).hexdigest()[:12]


def cpu_hours(size: str, out: Path) -> None:
    """Run the first seeds, add up their CPU time, and at full size write it.

    Args:
        size: "full" or "smoke".
        out: folder for the runs.
    """
    files = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(EXPECTED.glob("*.json"))}
    listed = {name: list(commands_in(content)) for name, content in files.items() if size == "full"} or {"smoke": START}
    listed = {"start": START, **{name: commands for name, commands in listed.items() if commands}}
    jobs = {name: jobs_of(commands, out) for name, commands in listed.items()}
    with ThreadPoolExecutor(CORES) as pool:
        for step in (0, 1):
            list(pool.map(Job.seconds, {job.out: job for parts in jobs.values() for job in parts[step]}.values()))
    starts = [job.seconds() for [job] in jobs.pop("start")]
    counted: set[Path] = set()
    hours: dict[str, float] = {}
    for name, parts in jobs.items():
        seeds = max(found[2].count(",") + 1 for command in listed[name] if (found := SEEDS.search(command)))
        new = [
            (job, 0.0 if job.words.startswith("fedmerge simulate") else start)  # of one seed, each with its start
            for start, part in zip(starts, parts, strict=True)
            for job in {job.out: job for job in part if job.out not in counted}.values()
        ]
        counted |= {job.out for job, _ in new}
        hours[name] = sum(seeds * job.seconds() - (seeds - 1) * start for job, start in new) / 3600
    total = sum(hours.values())
    holds("hours of CPU time", [*hours.items(), ("in all", total)])
    assert 0 < total <= MOST
    if size == "full":
        rows = [*((f"`{name}.py`", spent) for name, spent in hours.items()), ("in all", total)]
        table = ["| Experiment | CPU hours |", "| --- | ---: |", *(f"| {name} | {spent:.1f} |" for name, spent in rows)]
        rounded = {name: round(spent, 2) for name, spent in hours.items()}
        content = {"command": "python experiments/cpu_hours.py", "hours": rounded, "table": table}
        write("cpu_hours", content, Run.open(jobs["one_round"][0][0].out))


if __name__ == "__main__":
    main(__doc__, cpu_hours)
