"""Many rounds on Ray with clients that come and go: memory stays flat, and nothing is left behind."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
import ray
from flwr.app import Message

from fedmerge import federation
from fedmerge.config import Config
from fedmerge.recording import RecordingGrid, round_of
from fedmerge.runs import Run
from fedmerge.server import serve
from fedmerge.simulation import simulation

PAGE = os.sysconf("SC_PAGE_SIZE")
CLIENTS = 5


class Unsteady(RecordingGrid):
    """A grid whose clients are there in some rounds, and gone in others: at least two are there."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        chance = random.Random(round_of(messages[0]))
        there = set(chance.sample(range(len(messages)), chance.randint(2, len(messages))))
        ids = iter(super().push_messages([message for place, message in enumerate(messages) if place in there]))
        return [next(ids) if place in there else "" for place in range(len(messages))]


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def children() -> set[int]:
    """The processes below this one, Ray's and their clients' among them."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text()
        except OSError:  # it has ended
            continue
        if text.rpartition(")")[2].split()[0] != "Z":
            parents[int(stat.parent.name)] = int(text.rpartition(")")[2].split()[1])
    found: set[int] = set()
    below = {os.getpid()}
    while below:
        below = {process for process, parent in parents.items() if parent in below} - found
        found |= below
    return found


@pytest.mark.parametrize(
    "rounds", [pytest.param(12, marks=pytest.mark.slow), pytest.param(200, marks=pytest.mark.long)]
)
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_rounds_with_clients_that_come_and_go_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    config = Config(
        clients=CLIENTS, rounds=rounds, local_epochs="1", align="identity", merge="mean", screen="off", threads=1
    )
    run = Run.create(tmp_path / "run", "simulate", config)
    examples = federation.load(config)
    before = children()
    memory: list[int] = []
    files: list[int] = []
    processes: list[int] = []
    save = Run.append

    def measured(run: Run, result: dict[str, object]) -> None:
        save(run, result)
        gc.collect()
        memory.append(resident())
        files.append(open_files())
        processes.append(len(children()))

    monkeypatch.setattr(Run, "append", measured)
    with simulation(config, examples, num_cpus=2) as grid:
        serve(Unsteady(grid, arrived=lambda *_: None), config, run, load=lambda _: examples, pause=0.01)
    counts = [len(run.load_updates(0, number)) for number in range(1, rounds + 1)]
    assert len(memory) == rounds
    assert min(counts) >= 2
    assert len(set(counts)) > 1, "clients were to come and go"
    start, end = rounds // 4, rounds // 2
    assert max(memory[end:]) - max(memory[start:end]) < 20e6, memory
    assert max(files[start:]) <= max(files[:start]) + 2, files
    assert max(processes[start:]) <= max(processes[:start]) + 1, processes
    assert not ray.is_initialized()
    assert children() <= before
