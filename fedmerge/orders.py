"""What a client is asked to train: the weights and the recipe to begin with, and the update when it is done.

In between lies the training itself: of one client (`fedmerge.client`), or of many side by side (`fedmerge.together`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from fedmerge import models, privacy
from fedmerge.config import Config
from fedmerge.examples import Part
from fedmerge.federation import Federation
from fedmerge.machine import choose_device
from fedmerge.metrics import COUNT_EPSILON, DELTA, EPSILON
from fedmerge.partial import last_layers
from fedmerge.problem import Examples, Update
from fedmerge.seeds import derive, generator
from fedmerge.sgd import LocalTraining
from fedmerge.state import StateDict, num_bytes
from fedmerge.statistics import collect
from fedmerge.train import Evaluation, evaluate
from fedmerge.workspaces import lent


@dataclass(frozen=True)
class Order:
    """What a client is asked to train.

    Attributes:
        config: the federation's configuration, with the client's own model and settings.
        examples: the federation, of which only the client's part is used.
        partition_id: the client's number, from 0.
        server_round: the round, from 1.
        sent: the weights that the server sent; None: none.
        layers: how many of the model's last layers are trained, and sent; 0: all.
        declared: the name of the client's architecture where it is not the server's.
        secret: seed of all that differential privacy draws, which protects against those alone who do not know it;
            None: it comes from the run's seed, which everybody knows, so that a simulation can be repeated.
    """

    config: Config
    examples: Federation
    partition_id: int
    server_round: int
    sent: StateDict | None
    layers: int = 0
    declared: str = ""
    secret: int | None = None

    @cached_property
    def labels(self) -> Tensor:
        """The classes of the client's images, on the CPU."""
        return self.examples.client_labels(self.partition_id)

    def part(self, device: torch.device) -> Part:
        """Return the client's images on a device."""
        return self.examples.part(self.partition_id, device)

    @cached_property
    def start(self) -> StateDict:
        """The weights to start from: those that were sent, or, in a first round, an initialisation of the client's own.

        Raises:
            ValueError: if the server should have sent them.
        """
        if self.server_round == 1 and self.config.init == "independent":
            return own_start(self.config, self.examples, self.partition_id)
        if self.sent is None:
            raise ValueError(
                f"the server sent no weights to start round {self.server_round} from (--init {self.config.init})"
            )
        return self.sent

    @property
    def anchor(self) -> StateDict | None:
        """The public model that the client fits its units to; None where it sends them as they are.

        Raises:
            ValueError: if the server should have sent it.
        """
        if self.config.anchor and self.sent is None:
            raise ValueError(f"the server sent no anchor in round {self.server_round} (--anchor)")
        return self.sent if self.config.anchor else None

    @cached_property
    def moving(self) -> list[str] | None:
        """The names of the tensors that are trained; None: all."""
        return list(last_layers(self.start, self.layers)) if self.layers else None

    @cached_property
    def recipe(self) -> LocalTraining:
        """The hyper-parameters, with as many epochs as this client draws."""
        return self._recipe(self.server_round)

    def _recipe(self, server_round: int) -> LocalTraining:
        config = self.config
        low, high = config.epochs_range
        epochs = low
        if high > low:
            epochs = int(torch.randint(low, high + 1, (), generator=self.chance("epochs", server_round)))
        return LocalTraining(
            epochs=epochs,
            batch_size=config.batch_size,
            lr=config.lr,
            momentum=config.momentum,
            weight_decay=config.weight_decay,
            proximal_mu=config.proximal_mu,
            schedule=config.lr_schedule,
            warmup=config.warmup,
            augment=config.augment,
        )

    def chance(self, purpose: str, server_round: int | None = None) -> torch.Generator:
        """Return the client's generator of a round for a purpose.

        Args:
            purpose: a name.
            server_round: None: this one.
        """
        return generator(self.config.seed, "client", self.partition_id, purpose, server_round or self.server_round)

    def hidden_chance(self, purpose: str) -> torch.Generator:
        """Return the client's generator of this round for a purpose, which nobody else has where there is a secret."""
        seed = self.config.seed if self.secret is None else self.secret
        return generator(seed, "client", self.partition_id, purpose, self.server_round)

    def update(
        self,
        model: nn.Module,
        state: Mapping[str, Tensor],
        data: Callable[[], Examples],
        seconds: float,
        *,
        restarts: int = 0,
    ) -> Update:
        """Return what the client answers, on the CPU.

        Args:
            model: the architecture, on the data's device.
            state: the trained weights.
            data: gives the client's images on the model's device, if something is to be told of them.
            seconds: that the training took.
            restarts: times that it started again at half the learning rate.
        """
        config = self.config
        metrics: dict[str, float] = {"restarts": restarts} if restarts else {}
        if config.dp_noise:
            metrics |= self._privacy_spent()
        elif config.client_metrics:
            metrics |= told_of(evaluate(model, [state], data()))
        statistics: dict[str, dict[str, Tensor]] = {}
        if config.statistics:
            statistics = collect(config.statistics, model, state, data().images, generator=self.chance("statistics"))
        state = {name: tensor.cpu() for name, tensor in state.items()}
        counts = tuple(torch.bincount(self.labels, minlength=len(self.examples.classes)).tolist())
        if config.label_counts and config.label_count_noise:
            chance = self.hidden_chance("label-counts")
            counts = privacy.noised_counts(counts, config.label_count_noise, generator=chance)
            metrics[COUNT_EPSILON] = self.server_round / config.label_count_noise  # drawn anew in each round
        return Update(
            state=state,
            num_examples=len(self.labels),
            partition_id=self.partition_id,
            label_counts=counts if config.label_counts else None,
            metrics={**metrics, "seconds": seconds},
            num_bytes=num_bytes(state if self.moving is None else {name: state[name] for name in self.moving}),
            layers=self.layers,
            model=self.declared,
            statistics={kind: {name: tensor.cpu() for name, tensor in of.items()} for kind, of in statistics.items()},
        )

    def _privacy_spent(self) -> dict[str, float]:
        """Return ε and δ of the client's models of all rounds so far, as if it had trained in each of them."""
        config, size = self.config, len(self.labels)
        planned = [privacy.sampling(size, self._recipe(number + 1)) for number in range(self.server_round)]
        rate, steps, delta = planned[0][0], sum(steps for _, steps in planned), config.dp_delta or 1 / size
        spent = privacy.epsilon(noise=config.dp_noise, rate=rate, steps=steps, delta=delta)
        return {EPSILON: spent, DELTA: delta} if math.isfinite(spent) else {}


def own_start(config: Config, examples: Federation, partition_id: int) -> StateDict:
    """Return the weights that a client starts from where the server has sent it none of its architecture.

    Args:
        config: the federation's configuration, with the client's own model.
        examples: the federation, for the size of its images and the number of classes.
        partition_id: the client's number, from 0; with a shared initialisation all have the same weights.
    """
    path = ("init",) if config.init == "shared" else ("client", partition_id, "init")
    seed = derive(config.seed, *path)
    shape, num_classes = examples.dataset.shape, len(examples.classes)
    return models.create(config.model, shape=shape, num_classes=num_classes, seed=seed).state_dict()


def workspace(config: Config, examples: Federation) -> AbstractContextManager[nn.Module]:
    """Lend a model of the configuration's architecture, on its device.

    Args:
        config: the federation's configuration, with the client's own model.
        examples: as in `own_start`.
    """
    shape, num_classes = examples.dataset.shape, len(examples.classes)
    return lent(config.model, shape=shape, num_classes=num_classes, device=choose_device(config.device))


def told_of(result: Evaluation) -> dict[str, float]:
    """Return what clients tell of an evaluation."""
    return {"loss": result.loss, "accuracy": result.accuracy}
