"""Flower's own strategies as mergers: the clients' updates are handed to them as the replies of a first round.

What is Flower's is computed by Flower. Integer buffers stay out of it, BatchNorm statistics are re-estimated as after
every merge, and the server learning rate is chosen by the protocol. A strategy's state does not outlive the merge, so
moments and momentum are those of a first round.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg
from torch import Tensor

from fedmerge import flower
from fedmerge.merge.average import mean_state
from fedmerge.merge.choice import Setting, choose_setting
from fedmerge.merge.descent import split_state
from fedmerge.merge.taskvectors import SCALES, check_scales, start_of
from fedmerge.problem import Merged, Problem, Update
from fedmerge.settings import ConfigurationError
from fedmerge.wire import ARRAYS, METRICS, NUM_EXAMPLES, arrays_from_state

ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "FedMedian": (),
    "FedTrimmedAvg": ("beta",),
    "Krum": ("num_malicious_nodes",),
    "MultiKrum": ("num_malicious_nodes", "num_nodes_to_select"),
    "Bulyan": ("num_malicious_nodes",),
}
"""The robust strategies, with the arguments that each of them takes."""


@dataclass(frozen=True)
class Adaptive:
    """A step of a server optimizer from the clients' start along their mean update.

    Reddi, Charles, Zaheer, Garrett, Rush, Konečný, Kumar, McMahan: Adaptive Federated Optimization, ICLR 2021, arXiv
    2003.00295.

    Attributes:
        strategy: "FedAdam", "FedYogi" or "FedAdagrad".
        rates: server learning rates to choose from; the first is the default.
    """

    strategy: str
    rates: tuple[float, ...] = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4)

    def __post_init__(self) -> None:
        check_scales(self.rates)

    def __call__(self, problem: Problem, updates: Sequence[Update], *, generator: torch.Generator) -> Merged:
        """Choose the learning rate and take the step."""
        start = start_of(problem, f"Flower's {self.strategy}")
        name = "eta" if self.strategy != "FedAvgM" else "server_learning_rate"

        def merge(rate: float) -> dict[str, Tensor]:
            return aggregated(_strategy(self.strategy, {name: rate}), problem, updates, start)

        return choose_setting(problem, [Setting({"rate": rate}, partial(merge, rate)) for rate in self.rates])


@dataclass(frozen=True)
class Momentum(Adaptive):
    """A scaled step from the clients' start to their mean; in a first round its momentum has no part in it.

    Hsu, Qi, Brown: Measuring the Effects of Non-Identical Data Distribution for Federated Visual Classification, 2019,
    arXiv 1909.06335.

    Attributes:
        strategy: "FedAvgM".
        rates: server learning rates to choose from; the first, 1, is FedAvg.
    """

    strategy: str = "FedAvgM"
    rates: tuple[float, ...] = SCALES


@dataclass(frozen=True)
class Robust:
    """An aggregate that some malicious or odd clients cannot move far.

    Yin, Chen, Ramchandran, Bartlett, ICML 2018, arXiv 1803.01498 (median, trimmed mean); Blanchard, El Mhamdi,
    Guerraoui, Stainer, NIPS 2017, arXiv 1703.02757 (Krum); El Mhamdi, Guerraoui, Rouault, ICML 2018, arXiv 1802.07927
    (Bulyan).

    Attributes:
        strategy: one of `ARGUMENTS`.
        beta: share of the clients that is cut off at each end, in [0, 0.5).
        num_malicious_nodes: clients to be guarded against.
        num_nodes_to_select: clients that MultiKrum averages.
    """

    strategy: str
    beta: float = 0.2
    num_malicious_nodes: int = 0
    num_nodes_to_select: int = 3

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 0.5:
            raise ValueError(f"beta must be in [0, 0.5), got {self.beta}")
        if self.num_malicious_nodes < 0 or self.num_nodes_to_select < 1:
            raise ValueError(
                "num_malicious_nodes must be at least 0 and num_nodes_to_select at least 1, got "
                f"{self.num_malicious_nodes} and {self.num_nodes_to_select}"
            )
        for item in fields(self)[1:]:
            if item.name not in ARGUMENTS[self.strategy] and getattr(self, item.name) != item.default:
                raise ValueError(f"Flower's {self.strategy} has no {item.name}: leave it out")

    def __call__(self, problem: Problem, updates: Sequence[Update], *, generator: torch.Generator) -> Merged:
        """Aggregate the updates."""
        arguments = {name: getattr(self, name) for name in ARGUMENTS[self.strategy]}
        strategy = _strategy(self.strategy, arguments)
        return choose_setting(problem, [Setting({}, partial(aggregated, strategy, problem, updates))])


def aggregated(
    strategy: FedAvg, problem: Problem, updates: Sequence[Update], start: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return what a strategy makes of the clients' parameters, as a fresh state dict with the mean of their buffers.

    Args:
        strategy: a new one.
        problem: the architecture.
        updates: at least one.
        start: the parameters that the round started from, for strategies that step from there.

    Raises:
        ConfigurationError: if the strategy gives nothing, as Bulyan does for few clients.
    """
    mean = mean_state([update.state for update in updates])
    if start is not None:
        strategy.fraction_train = 0.0  # so that the strategy keeps the start, and asks no node
        strategy.configure_train(1, arrays_from_state(start), ConfigRecord(), None)  # type: ignore[arg-type]
    with flower.identity():
        found, _ = strategy.aggregate_train(1, [_reply(problem, update) for update in updates])
    if found is None:
        raise ConfigurationError(
            f"Flower's {type(strategy).__name__} makes nothing of {len(updates)} clients: it needs more of them, or a "
            "lower num_malicious_nodes (Bulyan: 4 times that and 3 clients)"
        )
    arrays = {name: torch.from_numpy(array.numpy()) for name, array in found.items()}
    return {name: arrays[name].to(tensor) if name in arrays else tensor.clone() for name, tensor in mean.items()}


def _strategy(name: str, arguments: Mapping[str, Any]) -> FedAvg:
    made: FedAvg = getattr(importlib.import_module("flwr.serverapp.strategy"), name)(**arguments)
    return made


def _reply(problem: Problem, update: Update) -> Message:
    parameters, _ = split_state(problem, update.state)
    metrics = MetricRecord({NUM_EXAMPLES: update.num_examples})
    content = RecordDict({ARRAYS: arrays_from_state(parameters), METRICS: metrics})
    return Message(content, dst_node_id=flower.SERVER_NODE_ID, message_type=MessageType.TRAIN)
