"""The server's side of a run: rounds over a Flower grid, with everything that arrives kept in the run folder.

`serve` is the ServerApp's main: the same in Ray's simulation, under `flwr run` and across machines. `collect` is its
first half alone: one round of training without a merge, for comparing many merges of the same updates.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result
from torch import nn

from fedmerge import federation, federation_models, oneshot, results
from fedmerge.anchor import trained_anchor
from fedmerge.config import Config
from fedmerge.federation import Federation
from fedmerge.machine import reproducible
from fedmerge.methods import method_name
from fedmerge.outcomes import Outcome
from fedmerge.problem import Progress, Update, silent
from fedmerge.recording import Recall, RecordingGrid, round_of
from fedmerge.resuming import Answers
from fedmerge.runs import Run
from fedmerge.sampling import ClientsOf, Sample
from fedmerge.sitedata import ImageFormat
from fedmerge.strategy import OneShotMerge
from fedmerge.train import laid_out
from fedmerge.wire import (
    MalformedUpdate,
    arrays_from_state,
)

logger = logging.getLogger(__name__)

Load = Callable[[Config], Federation]


def serve(
    grid: Grid,
    config: Config,
    run: Run,
    *,
    load: Load = federation.load,
    recall: Recall | None = None,
    answers: Answers | None = None,
    progress: Progress = silent,
    pause: float = 0.1,
    clients_of: ClientsOf | None = None,
) -> Result:
    """Run a federation: its rounds of training and merging, each merged model evaluated and stored; or `RoundFailed`.

    Args:
        grid: reaches the clients.
        config: the federation's configuration.
        run: the run folder, which gets the partition, each update as it arrives, the merged models and the results.
        load: makes the federation of the configuration.
        recall: gives replies that are known already (resuming a run); merges are computed again, to the same bits.
        answers: instead, for nodes whose ids are not known beforehand: keeps who answers, and gives what they answered.
        progress: called on long work.
        pause: seconds between looks for new replies.
        clients_of: gives the node of each client, for drawing them; None: nodes are asked which they are.

    Returns:
        Flower's result, with the merged models' accuracy and loss by round.
    """
    oneshot.check_needs(config.merge, labels=config.num_server_labels > 0, label_counts=config.label_counts)
    with reproducible(config.threads):
        session = _Session.start(grid, config, run, load, recall, progress, pause, clients_of, answers)
        session.strategy.on_round = session.measure
        return session.strategy.start(
            session.grid,
            initial_arrays=session.initial_arrays,
            num_rounds=config.rounds,
            timeout=config.timeout,
            train_config=session.told,
            evaluate_config=session.told,
            evaluate_fn=lambda server_round, _: session.evaluations.get(server_round),
        )


def collect(
    grid: Grid,
    config: Config,
    run: Run,
    *,
    load: Load = federation.load,
    recall: Recall | None = None,
    progress: Progress = silent,
    pause: float = 0.1,
    clients_of: ClientsOf | None = None,
) -> list[Update]:
    """Run the training of one round, without a merge; or `RoundFailed`.

    Args:
        grid: reaches the clients.
        config: the federation's configuration.
        run: the run folder, which gets the partition, and each update as it arrives.
        load: makes the federation of the configuration.
        recall: gives replies that are known already.
        progress: called on long work.
        pause: seconds between looks for new replies.
        clients_of: gives the node of each client, for drawing them; None: nodes are asked which they are.

    Returns:
        The good updates, by partition id.
    """
    without = config.replace(align="identity", merge="mean")  # the merges to come are checked one by one
    session = _Session.start(grid, without, run, load, recall, progress, pause, clients_of)
    messages = session.strategy.configure_train(1, session.initial_arrays, session.told, session.grid)
    replies = session.grid.send_and_receive(messages, timeout=config.timeout)
    return session.strategy.read_replies(1, replies)[0]


@dataclass
class _Session:
    """What the rounds of a run have in common, and what they add up to."""

    config: Config
    run: Run
    federation: Federation
    model: nn.Module
    grid: RecordingGrid
    strategy: OneShotMerge
    bytes_sent_before: int = 0
    evaluations: dict[int, MetricRecord] = field(default_factory=dict)

    @property
    def told(self) -> ConfigRecord:
        """What clients with data of their own must know: how images look in the federation."""
        return ConfigRecord(ImageFormat.of(self.federation.dataset).to_mapping())

    @property
    def initial_arrays(self) -> ArrayRecord:
        """What the first round sends, if it sends a model: the shared start, or an anchor."""
        state = self.model.state_dict()
        if self.strategy.anchor:
            with reproducible(1):
                state = trained_anchor(self.model, self.federation.server, seed=self.config.seed)
        return arrays_from_state(state)

    @classmethod
    def start(
        cls,
        grid: Grid,
        config: Config,
        run: Run,
        load: Load,
        recall: Recall | None,
        progress: Progress,
        pause: float,
        clients_of: ClientsOf | None,
        answers: Answers | None = None,
    ) -> _Session:
        examples = load(config)
        run.save_partition(config.seed, examples.indices())
        model = federation_models.of_server(config, examples)
        sample = Sample(config.clients_per_round, config.seed, clients_of, config.timeout)
        strategy = OneShotMerge(
            model,
            examples.server.images,
            examples.server.labels,
            align=config.align,
            merge=config.merge,
            screen=config.screen,
            seed=config.seed,
            batch_size=config.batch_size,
            low_memory=config.low_memory,
            min_completed=config.min_completed,
            send_arrays_first_round=config.init == "shared" or config.anchor,
            anchor=config.anchor and config.init != "shared",
            ttl=config.timeout,
            connect_timeout=config.timeout,
            device=config.device,
            progress=progress,
            others=federation_models.of_others(config, examples),
            sample=sample if config.clients_per_round else None,
            min_train_nodes=config.asked,
            min_available_nodes=config.clients,
        )

        def arrived(message: Message, reply: Message) -> None:
            if reply.has_content():
                try:
                    update = strategy.read_update(reply)
                except MalformedUpdate:
                    return  # the strategy reads the reply again, and tells the reason
                if answers is not None:
                    answers.note(message.metadata.dst_node_id, update.partition_id)
                run.save_update(config.seed, round_of(message), update)

        recording = RecordingGrid(
            grid,
            arrived=arrived,
            recall=recall if answers is None else answers.recall,
            nodes=None if answers is None else answers.nodes,
            progress=progress,
            pause=pause,
        )
        return cls(config, run, examples, model, recording, strategy)

    def measure(
        self,
        server_round: int,
        updates: Sequence[Update],
        rejected: Sequence[str],
        outcome: Outcome,
    ) -> None:
        """Evaluate a merged model, and store it and its result."""
        method = method_name(self.config.align, self.config.merge)
        problem = self.strategy.problem
        lines = results.measured_with_steps(
            method=method,
            seed=self.config.seed,
            server_round=server_round,
            outcome=outcome,
            problem=problem,
            evaluation=laid_out(problem.model, self.federation.evaluation.to(problem.data.images.device)),
            updates=updates,
            bytes_down=self.grid.bytes_sent - self.bytes_sent_before,
            server_model=self.config.model,
            refused=rejected,
        )
        self.bytes_sent_before = self.grid.bytes_sent
        for result, merged in lines:
            self.run.save_model(self.config.seed, server_round, result["method"], merged.states, merged.models)
            self.run.append(result)
        self.evaluations[server_round] = MetricRecord({name: result[name] for name in ("accuracy", "loss")})
