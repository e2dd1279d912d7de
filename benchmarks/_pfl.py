"""Rounds of FedAvg by pfl, an optional peer: Apple's simulator, github.com/apple/pfl-research, of which 0.6 is known.

Clients train one after the other in this process, as in the bare loop; unlike it, pfl does not shuffle their images.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmerge.config import Config
from fedmerge.problem import Examples


def installed() -> bool:
    """Return whether pfl can be imported."""
    return importlib.util.find_spec("pfl") is not None


class Client(nn.Module):
    """A model with the methods that pfl asks for.

    Args:
        model: the architecture.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy."""
        return functional.cross_entropy(self.model(images), labels)

    def metrics(self, *_: Tensor) -> dict[str, float]:
        """Return nothing: no client is evaluated."""
        return {}


def run(config: Config, model: nn.Module, data: Sequence[Examples], count: int, ended: Callable[[], object]) -> None:
    """Run rounds in which all clients train.

    Args:
        config: the recipe.
        model: the start.
        data: of each client.
        count: how many rounds.
        ended: called after each.
    """
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm import FederatedAveraging, NNAlgorithmParams
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel

    class Ended(TrainingProcessCallback):  # type: ignore[misc]
        def after_central_iteration(self, *_: object, **__: object) -> tuple[bool, object]:
            ended()
            return False, Metrics()

    def optimizer(parameters: object, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr, momentum=config.momentum, foreach=True)  # type: ignore[arg-type]

    federation = FederatedDataset.from_slices(
        {client: [own.images, own.labels] for client, own in enumerate(data)},
        get_user_sampler("minimize_reuse", list(range(len(data)))),
    )
    model = Client(model).train()
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=count,
            evaluation_frequency=count + 1,
            train_cohort_size=len(data),
            val_cohort_size=None,
        ),
        SimulatedBackend(federation, federation, postprocessors=[WeightByDatapoints()]),
        PyTorchModel(model, optimizer, torch.optim.SGD(model.parameters(), lr=1.0)),
        NNTrainHyperParams(
            local_batch_size=config.batch_size,
            local_num_epochs=int(config.local_epochs),
            local_learning_rate=config.lr,
        ),
        callbacks=[Ended()],
        send_metrics_to_platform=False,
    )
