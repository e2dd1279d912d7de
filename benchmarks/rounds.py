"""A round of a simulation on Ray, against the bare loop over the same clients: one process, one thread, plain PyTorch.

Rounds of both follow each other. Ours counts the CPU time of the whole process tree, from the last merged model to the
next: messages, training in the actors, FedAvg. What is not of a round is left out: start, evaluation, the run folder.
With one image a client there is next to nothing to train: what is left over is what a client costs by itself.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import _pfl
import torch
from _flower import app_of
from _measure import Row, Timing, interleaved, main, tree_seconds
from flwr.app import ConfigRecord, Context
from flwr.serverapp import Grid
from torch.nn import functional

from fedmerge import federation, models
from fedmerge.batched import Training, fit_many
from fedmerge.config import Config
from fedmerge.federation import Federation
from fedmerge.machine import reproducible
from fedmerge.orders import Order, workspace
from fedmerge.seeds import derive
from fedmerge.simulation import simulation
from fedmerge.sitedata import ImageFormat
from fedmerge.strategy import OneShotMerge, OnRound
from fedmerge.wire import arrays_from_state

FIRST = 3
"""Rounds that do not count: actors start, and all processes get memory from the system that they keep."""

Measure = Callable[[Config, int], tuple[Timing, Timing]]

COLUMNS = ("round, CPU ms", "bare loop, CPU ms", "ratio", "more, CPU ms a client", "round, wall s")
COMMON = Config(
    data="fashion-mnist",
    split="development",
    local_epochs="1",
    init="shared",
    align="identity",
    merge="fedavg",
    screen="off",
    min_client_examples=1,
    client_metrics=False,
)


@dataclass
class Rounds:
    """What is measured after each merge.

    Attributes:
        floor: trains all clients in this process.
        ours: CPU and wall seconds of each round of ours.
        bare: of each run of the floor.
    """

    floor: Callable[[], object]
    ours: list[tuple[float, float]] = field(default_factory=list)
    bare: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.before = _now()

    def __call__(self, *_: object) -> None:
        """Note the round that has ended, and run the floor."""
        after = _now()
        self.ours.append((after[0] - self.before[0], after[1] - self.before[1]))
        began = time.process_time(), time.perf_counter()
        self.floor()
        self.bare.append((time.process_time() - began[0], time.perf_counter() - began[1]))
        self.before = _now()

    def timings(self) -> tuple[Timing, Timing]:
        """Return ours and the floor, but for the first rounds."""
        ours, bare = [zip(*measurements[FIRST:], strict=True) for measurements in (self.ours, self.bare)]
        return Timing(*map(tuple, ours)), Timing(*map(tuple, bare))


def bare_loop(config: Config, examples: Federation) -> Callable[[], object]:
    """Return a loop over the clients that trains each for an epoch, as one would write it without a framework.

    Args:
        config: the federation's configuration.
        examples: its images, which the loop has in memory.
    """
    model = _model(config, examples)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = [examples.client(number) for number in range(config.clients)]

    def run() -> None:
        for client in data:
            model.load_state_dict(start)
            optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum, foreach=True)
            for index in torch.split(torch.randperm(len(client)), config.batch_size):
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(client.images[index]), client.labels[index])
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()

    model.train()
    return run


def measured(config: Config, repeats: int) -> tuple[Timing, Timing]:
    """Return ours and the bare loop, round by round; the first rounds do not count.

    Args:
        config: the federation's configuration.
        repeats: rounds that count.
    """
    examples = federation.load(config)
    rounds = Rounds(bare_loop(config, examples))
    with simulation(config, examples) as grid:
        run_rounds(grid, config, rounds, repeats + FIRST)
    return rounds.timings()


def measured_trainer(config: Config, repeats: int) -> tuple[Timing, Timing]:
    """Return the training alone, in this process and without a message, and the bare loop in turn with it.

    Args:
        config: the federation's configuration; its clients train side by side in groups of `batched_clients`.
        repeats: of both.
    """
    examples = federation.load(config)
    start = _model(config, examples).state_dict()
    orders = [Order(config, examples, number, 1, start) for number in _largest_first(examples)]
    data = {order.partition_id: order.part(torch.device("cpu")) for order in orders}
    size = config.batched_clients

    def ours() -> None:
        with reproducible(), workspace(config, examples) as model:
            for first in range(0, len(orders), size):
                group = orders[first : first + size]
                fit_many(
                    model,
                    [Training(start, data[one.partition_id], one.recipe, one.chance("round")) for one in group],
                )

    found = interleaved({"ours": ours, "bare": bare_loop(config, examples)}, repeats=repeats)
    return found["ours"], found["bare"]


def measured_under_flower(config: Config, repeats: int) -> tuple[Timing, Timing]:
    """Return what `measured` does, of the same clients and strategy under Flower's own simulation engine.

    Args:
        config: the federation's configuration.
        repeats: rounds that count.
    """
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    rounds = Rounds(bare_loop(config, federation.load(config)))
    server = ServerApp()

    @server.main()
    def serve(grid: Grid, _: Context) -> None:
        run_rounds(grid, config, rounds, repeats + FIRST)

    run_simulation(server, app_of(config), config.clients, backend_config={"client_resources": {"num_cpus": 1}})
    return rounds.timings()


def measured_under_pfl(config: Config, repeats: int) -> tuple[Timing, Timing]:
    """Return what `measured` does, of the same clients' images under pfl.

    Args:
        config: the federation's configuration.
        repeats: rounds that count.
    """
    examples = federation.load(config)
    rounds = Rounds(bare_loop(config, examples))
    data = [examples.client(number) for number in range(config.clients)]
    _pfl.run(config, _model(config, examples), data, repeats + FIRST, rounds)
    return rounds.timings()


def run_rounds(grid: Grid, config: Config, rounds: OnRound, count: int) -> None:
    """Run rounds over a grid.

    Args:
        grid: reaches the clients.
        config: the federation's configuration.
        rounds: told of each merge.
        count: how many.
    """
    examples = federation.load(config)
    model = _model(config, examples)
    strategy = OneShotMerge(
        model,
        examples.server.images,
        examples.server.labels,
        align=config.align,
        merge=config.merge,
        screen=config.screen,
        min_completed=config.clients,
        min_train_nodes=config.clients,
        on_round=rounds,
        ttl=config.timeout,
    )
    told = ConfigRecord(ImageFormat.of(examples.dataset).to_mapping())
    strategy.start(grid, initial_arrays=arrays_from_state(model.state_dict()), num_rounds=count, train_config=told)


def benchmark(quick: bool) -> list[Row]:
    """Return a row for each federation."""
    tiny = COMMON.replace(model="mlp@0.05", partition="iid")
    mlp = COMMON.replace(model="mlp", clients=100, client_examples=20_000)
    cases: dict[str, tuple[Measure, Config]] = {
        "cnn, Dirichlet(0.3)": (measured, mlp.replace(model="cnn")),
        "mlp, Dirichlet(0.3)": (measured, mlp),
        "mlp, Dirichlet(0.3), 10 side by side": (measured, mlp.replace(batched_clients=10)),
        "mlp, Dirichlet(0.3), 10 side by side, the training alone": (measured_trainer, mlp.replace(batched_clients=10)),
    }
    for clients in (10, 100, 1_000, 10_000):
        config = tiny.replace(clients=clients, client_examples=clients)
        cases[f"mlp@0.05, 1 image each, {clients} clients"] = measured, config
    for clients in (100, 1_000):
        config = tiny.replace(clients=clients, client_examples=clients, batched_clients=50)
        cases[f"mlp@0.05, 1 image each, {clients} clients, 50 side by side"] = measured, config
    for clients in (20, 100):
        config = tiny.replace(clients=clients, client_examples=clients)
        cases[f"mlp@0.05, 1 image each, {clients} clients, Flower's engine"] = measured_under_flower, config
    for model in ("cnn", "mlp"):
        cases[f"{model}, Dirichlet(0.3), pfl"] = measured_under_pfl, mlp.replace(model=model)
    cases["mlp@0.05, 1 image each, 100 clients, pfl"] = measured_under_pfl, config
    if quick:
        few = COMMON.replace(clients=4, client_examples=4, partition="iid", data="digits")
        side = few.replace(batched_clients=2)
        cases = {
            "alone": (measured, few),
            "2 side by side": (measured, side),
            "the training alone": (measured_trainer, side),
            "pfl": (measured_under_pfl, few),
        }
    rows: list[Row] = []
    for name, (measure, config) in cases.items():
        if measure is measured_under_pfl and not _pfl.installed():
            rows.append({"federation": name, **dict.fromkeys(COLUMNS, "not installed")})
            continue
        repeats = 5 if "cnn" in name or config.clients > 1_000 else 15 if config.client_examples > 100 else 61
        ours, bare = measure(config, 1 if quick else repeats)
        pairs = list(zip(ours.cpu, bare.cpu, strict=True))
        over = sorted((mine - floor) / config.clients for mine, floor in pairs)[len(pairs) // 2]
        wall = sorted(ours.wall)[len(ours.wall) // 2]
        cells = (ours.milliseconds, bare.milliseconds, ours.over(bare), f"{1e3 * over:.2f}", f"{wall:.2f}")
        rows.append({"federation": name, **dict(zip(COLUMNS, cells, strict=True))})
    return rows


def _largest_first(examples: Federation) -> list[int]:
    return sorted(range(len(examples.partition)), key=lambda number: -len(examples.partition[number]))


def _model(config: Config, examples: Federation) -> torch.nn.Module:
    shape, num_classes = examples.dataset.shape, len(examples.classes)
    return models.create(config.model, shape=shape, num_classes=num_classes, seed=derive(config.seed, "init"))


def _now() -> tuple[float, float]:
    return tree_seconds(), time.perf_counter()


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.WARNING)
    main(__doc__, benchmark)
