"""Ray's actors: how long it takes until the first client's reply, and whether they all have something to do.

The first reply is of a fresh Python process that imports, loads its images, starts Ray and trains one client of one
image; against it, a process that starts Ray with one actor, which imports torch and answers. A round of unequal clients
is busy if the seconds that clients say they trained fill what the actors had: their number times the round's seconds,
sending and receiving included. Seconds of the wall all, so other programs on the machine slow both alike.
"""

from __future__ import annotations

import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from _measure import Row, Timing, main, tree_seconds
from flwr.app import Message
from rounds import COMMON, run_rounds

from fedmerge import federation
from fedmerge.config import Config
from fedmerge.outcomes import Outcome
from fedmerge.problem import Update
from fedmerge.raygrid import RayGrid
from fedmerge.simulation import simulation

CORES = 2
TINY = COMMON.replace(model="mlp@0.05", partition="iid", clients=10, client_examples=10)
UNEQUAL = COMMON.replace(model="cnn", client_examples=20_000)


class Busy:
    """What a round's clients say they trained, beside what its actors had.

    Args:
        grid: whose rounds are timed.
    """

    def __init__(self, grid: RayGrid) -> None:
        self.shares: list[float] = []
        self.wall = 0.0
        self._send = grid.send_and_receive
        grid.send_and_receive = self.send  # type: ignore[method-assign]

    def send(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send and receive, and note how long it took."""
        began = time.perf_counter()
        replies = list(self._send(messages, timeout=timeout))
        self.wall = time.perf_counter() - began
        return replies

    def __call__(self, _: int, updates: Sequence[Update], rejected: Sequence[str], outcome: Outcome) -> None:
        """Note the round that has ended."""
        self.shares.append(sum(update.metrics["seconds"] for update in updates) / (CORES * self.wall))


def busy(config: Config, rounds: int) -> list[float]:
    """Return, for each round but the first, which share of the actors' time was training.

    Args:
        config: the federation's.
        rounds: that count.
    """
    with simulation(config, federation.load(config), num_cpus=CORES) as grid:
        seen = Busy(grid)
        run_rounds(grid, config, seen, rounds + 1)
    return seen.shares[1:]


def first_reply(data: str, actors: int) -> None:
    """Train one round and print, as JSON, the seconds of this process tree until its first client answered."""
    config = TINY.replace(data=data)
    told: list[float] = []
    with simulation(config, federation.load(config), num_cpus=actors) as grid:
        pull = grid.pull_messages

        def noted(message_ids: Iterable[str]) -> Iterable[Message]:
            replies = list(pull(message_ids))
            if replies:
                told.append(tree_seconds())
            return replies

        grid.pull_messages = noted  # type: ignore[method-assign]
        run_rounds(grid, config, lambda *_: None, 1)
    print(json.dumps(told[0]))


def bare_ray() -> None:
    """Print, as JSON, the seconds of this process tree until an actor that has imported torch has answered."""
    import ray

    class Actor:
        def answer(self) -> str:
            import torch

            return str(torch.__version__)

    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    actor: Any = ray.remote(num_cpus=1)(Actor)
    ray.get(actor.remote().answer.remote())
    print(json.dumps(tree_seconds()))
    ray.shutdown()


def benchmark(quick: bool) -> list[Row]:
    """Return the rows."""
    data = "digits" if quick else "fashion-mnist"
    asked = {"bare Ray, one actor": ["bare"], "one actor": [data, "1"], "an actor for each of two cores": [data, "2"]}
    found: dict[str, list[float]] = {name: [] for name in asked}
    for _ in range(1 if quick else 5):
        for name, arguments in asked.items():
            command = [sys.executable, __file__, "--first", *arguments]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            found[name].append(float(done.stdout.splitlines()[-1]))
    timings = {name: Timing(tuple(seconds), tuple(seconds)) for name, seconds in found.items()}
    floor = timings["bare Ray, one actor"]
    rows = [
        _row(f"first reply: {name}", f"{timing.milliseconds} CPU ms", timing.over(floor))
        for name, timing in timings.items()
    ]
    for clients in [4] if quick else (10, 100):
        config = UNEQUAL.replace(clients=clients, data=data, client_examples=40 if quick else UNEQUAL.client_examples)
        shares = busy(config, 1 if quick else 4)
        told = f"{statistics.median(shares):.3f} ({min(shares):.3f} to {max(shares):.3f})"
        rows.append(_row(f"actors' time that is training: cnn, {clients} clients, Dirichlet(0.3)", told, ""))
    return rows


def _row(what: str, found: str, ratio: str) -> Row:
    return {"what": what, "found": found, "/ bare Ray": ratio}


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.WARNING)
    if sys.argv[1:3] == ["--first", "bare"]:
        bare_ray()
    elif sys.argv[1:2] == ["--first"]:
        torch.set_num_threads(1)
        first_reply(sys.argv[2], int(sys.argv[3]))
    else:
        main(__doc__, benchmark)
