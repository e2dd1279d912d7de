"""The app on Ray, in this process: a Flower grid whose nodes are clients that take turns on Ray actors.

    with simulation(config, examples) as grid:
        serve(grid, config, run)

Actors are built once, and share the federation's images in Ray's object store. Ray starts with the first message: a
resumed run that has all its updates needs none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp.strategy import Result

from fedmerge import federation, flower
from fedmerge.config import Config
from fedmerge.federation import Federation
from fedmerge.problem import Progress, Update, silent
from fedmerge.raygrid import RayGrid, partition_of
from fedmerge.recording import Recall, round_of
from fedmerge.runs import Run
from fedmerge.sampling import drawn
from fedmerge.server import collect, serve
from fedmerge.together import group_size
from fedmerge.wire import update_to_records


@contextmanager
def simulation(
    config: Config,
    examples: Federation | None = None,
    *,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
) -> Iterator[RayGrid]:
    """Give a grid of clients on Ray; at the end, what was started is shut down.

    Args:
        config: the federation's configuration, with the clients' CPUs and GPUs and the cluster's address.
        examples: the federation; None if `RayGrid.load` brings it.
        num_cpus: CPUs of a Ray that is started here; None: this machine's.
        num_gpus: GPUs of a Ray that is started here, which need not exist; None: this machine's.
    """
    grid = RayGrid(config, num_cpus=num_cpus, num_gpus=num_gpus)
    if examples is not None:
        grid.load(config, examples)
    try:
        with flower.identity():
            yield grid
    finally:
        grid.close()


def simulate(config: Config, run: Run, *, progress: Progress = silent, resume: bool = False) -> Result:
    """Run a federation on Ray.

    Args:
        config: the federation's configuration.
        run: the run folder.
        progress: called on long work.
        resume: take the updates that the run folder has instead of training them again.
    """
    examples = federation.load(config)
    recall = recall_from(run, config) if resume else None
    with simulation(config, examples) as grid:
        return serve(
            grid, config, run, load=lambda _: examples, recall=recall, progress=progress, pause=0, clients_of=nodes_of
        )


def train_clients(
    config: Config, run: Run, *, grid: RayGrid, progress: Progress = silent, resume: bool = False
) -> list[Update]:
    """Train the clients of one seed on Ray, without a merge.

    Args:
        config: the federation's configuration.
        run: the run folder.
        grid: a running simulation, which gets this configuration's federation.
        progress: called on long work.
        resume: take the updates that the run folder has instead of training them again.
    """
    examples = federation.load(config)
    recall = recall_from(run, config) if resume else None
    grid.load(config, examples)
    return collect(
        grid, config, run, load=lambda _: examples, recall=recall, progress=progress, pause=0, clients_of=nodes_of
    )


def nodes_of(node_ids: Sequence[int]) -> dict[int, int]:
    """Return the node of each client of a simulation."""
    return {node_id - flower.FIRST_NODE_ID: node_id for node_id in node_ids}


def recall_from(run: Run, config: Config) -> Recall:
    """Return what answers a training message by the update that the run folder has, if it has one.

    Where clients train side by side, to the same bits with the same others alone, that is if it has all of the round's.
    """
    together = group_size(config, 0) > 1

    def complete(server_round: int) -> bool:
        asked = drawn(range(config.clients), config.asked, seed=config.seed, server_round=server_round)
        return all(run.has_update(config.seed, server_round, client) for client in asked)

    def recall(message: Message) -> RecordDict | None:
        if message.metadata.message_type != MessageType.TRAIN:
            return None
        place = config.seed, round_of(message), partition_of(message)
        if not run.has_update(*place) or (together and not complete(round_of(message))):
            return None
        float16 = config.client_devices[place[2]].float16
        return update_to_records(run.load_update(*place), upload_dtype="float16" if float16 else config.upload_dtype)

    return recall
