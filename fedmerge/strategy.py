"""OneShotMerge: a Flower strategy that aligns the clients' models and learns how to merge them.

In any Flower app, three lines:

    from fedmerge.strategy import OneShotMerge
    strategy = OneShotMerge(model, images, labels)          # the server's held-out data
    result = strategy.start(grid, initial_arrays=ArrayRecord(model.state_dict()), num_rounds=1)

It only adapts: replies become updates (`fedmerge.wire`), `fedmerge.oneshot` merges them. Replies that cannot be used
are left out by name, and fewer good ones than `min_completed` fail the round with every reason.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg
from torch import Tensor, nn

from fedmerge import mixed, oneshot
from fedmerge.goingon import GoingOn
from fedmerge.machine import choose_device
from fedmerge.methods import parse_method
from fedmerge.metrics import PARTITION_ID, average_metrics, finite_scalars, sender
from fedmerge.outcomes import Outcome
from fedmerge.problem import Examples, Problem, Progress, Update, silent
from fedmerge.rounds import RoundFailed as RoundFailed
from fedmerge.rounds import model_to_send, wait_for_nodes
from fedmerge.sampling import Sample, drawn
from fedmerge.seeds import derive
from fedmerge.state import StateDict
from fedmerge.train import laid_out, predict
from fedmerge.wire import (
    SERVER_ROUND,
    MalformedUpdate,
    arrays_from_state,
    state_from_arrays,
    update_from_records,
)

logger = logging.getLogger(__name__)

OnRound = Callable[[int, Sequence[Update], Sequence[str], Outcome], None]
"""Called after a merge with the round, the updates, why others were left out, and the outcome."""


class OneShotMerge(FedAvg):
    """Align the clients' models, merge them on the server's data, and broadcast the result in the next round.

    Args:
        model: the architecture; its weights are not used.
        images: (examples, …) the server's held-out images, preprocessed as the clients' are.
        labels: (examples,) their classes, -1 where one is not known; None: none is.
        align: name of the aligner.
        merge: name of the merger.
        screen: "auto" to leave out clients whose models are of no use, or "off".
        seed: of the merge, and of the choice of clients where `fraction_train` is below 1.
        batch_size: examples in a step of a learned merge.
        low_memory: keep in files what a merge only reads, and tie its coefficients by channel.
        min_completed: fewer good updates than this fail the round.
        send_arrays_first_round: False where clients start from initialisations of their own.
        anchor: what the first round sends is no start: clients fit their units to it (`fedmerge.anchor`).
        on_round: called after each merge.
        ttl: seconds after which Flower gives up on a client; None: Flower's default.
        connect_timeout: seconds to wait for the minimum of nodes before a round; then it starts with those that are
            there, if they are `min_completed`.
        device: where the merge runs: "auto", "cpu", "cuda" or "cuda:N".
        progress: called on long work.
        sample: draws the clients of a round; None: `fraction_train` of the nodes, by their ids.
        others: architectures that clients may have and the server has not, by the names that these clients declare; in
            later rounds such clients get their family's merged model (`fedmerge.mixed`).
        fedavg: the arguments of FedAvg. `min_available_nodes` is by default `min_train_nodes`, and
            `fraction_evaluate` is 0.

    Raises:
        ValueError: if there is no image, or the images do not fit the model.
        ConfigurationError: if the merger learns from labels, and none is known.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        align: str = "auto",
        merge: str = "np",
        screen: str = "auto",
        seed: int = 0,
        batch_size: int = 32,
        low_memory: bool = False,
        min_completed: int = 2,
        send_arrays_first_round: bool = True,
        anchor: bool = False,
        on_round: OnRound | None = None,
        ttl: float | None = None,
        connect_timeout: float = 3600.0,
        device: str = "auto",
        progress: Progress = silent,
        sample: Sample | None = None,
        others: Mapping[str, nn.Module] | None = None,
        **fedavg: Any,
    ) -> None:
        fedavg = {"train_metrics_aggr_fn": average_metrics, "evaluate_metrics_aggr_fn": average_metrics, **fedavg}
        fedavg.setdefault("min_available_nodes", fedavg.get("min_train_nodes", 2))
        fraction_evaluate = fedavg.pop("fraction_evaluate", 0.0)
        super().__init__(**fedavg)
        self.fraction_evaluate = fraction_evaluate  # set here: FedAvg warns of a 0 that is our default
        if fraction_evaluate == 0:
            self.min_evaluate_nodes = 0
        where = choose_device(device)
        model = copy.deepcopy(model).to(where).eval()
        data = (Examples.unlabelled(images) if labels is None else Examples(images, labels)).to(where)
        self.problem = Problem(
            model=model,
            data=laid_out(model, data),
            seed=seed,
            batch_size=batch_size,
            low_memory=low_memory,
            progress=progress,
            others={name: copy.deepcopy(other).to(where).eval() for name, other in (others or {}).items()},
        )
        state = self.problem.model.state_dict()
        self.num_classes = predict(self.problem.model, state, self.problem.data.images[:1]).shape[1]
        parse_method(f"{align}+{merge}")  # what is wrong is told before clients train
        oneshot.check_needs(merge, labels=bool(self.problem.data.known.any()))
        if self.problem.others:
            mixed.check_mixed(align, merge)
        self.align, self.merge, self.screen, self.seed = align, merge, screen, seed
        self.min_completed = min_completed
        self.send_arrays_first_round = send_arrays_first_round
        self.anchor = anchor
        self.on_round = on_round
        self.ttl = ttl
        self.connect_timeout = connect_timeout
        self._sample = sample
        self._asked: frozenset[int] = frozenset()
        self._nodes: dict[int, int] = {}
        self._going_on = GoingOn()

    def summary(self) -> None:
        """Log the strategy's settings."""
        logger.info("\t├──> Merge: align '%s', merge '%s', seed %d", self.align, self.merge, self.seed)
        data = self.problem.data
        known = int(data.known.sum())
        logger.info("\t│\t├── Server's examples: %d, %d labelled, on %s", len(data), known, data.images.device)
        logger.info("\t│\t└── Updates needed in a round: %d", self.min_completed)
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Make the round's messages, to every node or to a share of them that the seed chooses; or `RoundFailed`.

        Args:
            server_round: the round, from 1.
            arrays: the model.
            config: what else the clients are told; it is not changed.
            grid: gives the nodes, for which it waits.
        """
        if self.fraction_train == 0:
            return []
        node_ids = wait_for_nodes(
            grid,
            max(self.min_available_nodes, self.min_train_nodes),
            least=self.min_completed,
            timeout=self.connect_timeout,
        )
        if self._sample is not None:
            chosen = self._sample.nodes(server_round, node_ids, grid)
        else:
            size = max(int(len(node_ids) * self.fraction_train), self.min_train_nodes)
            chosen = drawn(node_ids, size, seed=self.seed, server_round=server_round)
        content = RecordDict({self.configrecord_key: ConfigRecord(told := {**config, SERVER_ROUND: server_round})})
        if server_round > 1 or self.send_arrays_first_round:
            content[self.arrayrecord_key] = arrays
        if server_round > 1 or (self.send_arrays_first_round and not self.anchor):
            start = state_from_arrays(arrays, self.problem.model.state_dict())
            start = {name: tensor.to(self.problem.data.images.device) for name, tensor in start.items()}
            self.problem = self.problem.changed(start=start)
        self._asked = frozenset(chosen)
        of_others = self._going_on.contents(told, self.configrecord_key, self.arrayrecord_key)
        contents = {self._nodes[client]: found for client, found in of_others.items()}
        return [Message(contents.get(node_id, content), node_id, MessageType.TRAIN, ttl=self.ttl) for node_id in chosen]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Merge the round's updates.

        Args:
            server_round: the round, from 1.
            replies: of the clients, in any order.

        Returns:
            The merged model, and the merge's scalar diagnostics with the means of the clients' metrics.

        Raises:
            RoundFailed: if there are too few good updates, or the merge gives an ensemble.
        """
        good, rejected = self._read(server_round, replies)
        updates = [update for update, _ in good]
        outcome = mixed.merge_federation(
            self.problem,
            updates,
            align=self.align,
            merge=self.merge,
            screen=self.screen,
            seed=derive(self.seed, "merge", server_round),
        )
        state = model_to_send(outcome, self.merge)
        self._going_on = self._going_on.after(self.problem, updates, outcome)
        if self.on_round is not None:
            self.on_round(server_round, updates, rejected, outcome)
        metrics = self.train_metrics_aggr_fn([content for _, content in good], self.weighted_by_key)
        metrics.update(finite_scalars({**outcome.diagnostics, "merge-seconds": outcome.seconds}))
        return arrays_from_state(state), metrics

    def read_replies(self, server_round: int, replies: Iterable[Message]) -> tuple[list[Update], list[str]]:
        """Return the good updates by partition id, and why others were left out; or `RoundFailed` if they are few.

        Args:
            server_round: the round, from 1.
            replies: of the clients, in any order.
        """
        good, rejected = self._read(server_round, replies)
        return [update for update, _ in good], rejected

    def read_update(self, reply: Message, expected: Mapping[str, StateDict] | None = None) -> Update:
        """Return a reply's update, checked against the model.

        Args:
            reply: with content; a node that does not tell its partition id is known by its node id.
            expected: state dicts of the architectures by name, the server's by ""; None: those that the strategy has.
        """
        expected = self._expected() if expected is None else expected
        return update_from_records(
            reply.content,
            expected[""],
            fallback_id=reply.metadata.src_node_id,
            num_classes=self.num_classes,
            weighted_by_key=self.weighted_by_key,
            others={name: state for name, state in expected.items() if name},
            start_of=self._start_of,
        )

    def _expected(self) -> dict[str, StateDict]:
        return {name: other.state_dict() for name, other in {"": self.problem.model, **self.problem.others}.items()}

    def _start_of(self, model: str, partition_id: int) -> StateDict | None:
        """Return what a client started from in this round, if it was not a secret of its own."""
        if partition_id in self._going_on.starts:
            return self._going_on.starts[partition_id][1]
        if model:
            return self.problem.others[model].state_dict() if self.send_arrays_first_round else None
        return self.problem.start

    def _read(self, server_round: int, replies: Iterable[Message]) -> tuple[list[tuple[Update, RecordDict]], list[str]]:
        replies = sorted(replies, key=lambda reply: reply.metadata.src_node_id)
        answered, failed = self._check_and_log_replies(replies, is_train=True, validate=False)
        rejected = [f"{reply.error.reason} (node {reply.metadata.src_node_id})" for reply in failed]
        silent_nodes = self._asked - {reply.metadata.src_node_id for reply in replies}
        rejected += [f"node {node_id} did not answer in time" for node_id in sorted(silent_nodes)]
        good: dict[int, tuple[Update, RecordDict]] = {}
        expected = self._expected()
        for reply in answered:
            node_id, content = reply.metadata.src_node_id, reply.content
            try:
                update = self.read_update(reply, expected)
            except MalformedUpdate as error:
                rejected.append(f"{sender(content, node_id)}: {error}")
                continue
            if update.partition_id in good:
                rejected.append(f"{sender(content, node_id)}: another node has answered for the same {PARTITION_ID}")
                continue
            if update.partition_id == node_id:
                logger.warning(
                    "%s tells no '%s': its place in the order of clients is random",
                    sender(content, node_id),
                    PARTITION_ID,
                )
            if restarts := update.metrics.get("restarts"):
                told = "round %d: client %d's training diverged %g times, and each time started again at half the rate"
                logger.warning(told, server_round, update.partition_id, restarts)
            good[update.partition_id] = update, content
            self._nodes[update.partition_id] = node_id
        for reason in rejected:
            logger.warning("round %d goes on without an update: %s", server_round, reason)
        if len(good) < self.min_completed:
            reasons = "".join(f"\n  {reason}" for reason in rejected)
            raise RoundFailed(
                f"round {server_round} has {len(good)} good updates, and needs {self.min_completed} "
                f"(min_completed){':' if reasons else ''}{reasons}"
            )
        return [good[partition_id] for partition_id in sorted(good)], rejected
