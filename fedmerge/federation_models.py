"""The architectures of a federation: the server's, and those that clients may have beside it (`--models`)."""

from __future__ import annotations

import torch
from torch import nn

from fedmerge import models
from fedmerge.config import Config
from fedmerge.federation import Federation
from fedmerge.seeds import derive


def of_server(config: Config, examples: Federation) -> nn.Module:
    """Return the server's architecture, initialised as clients are that start from one shared initialisation.

    Args:
        config: the federation's configuration.
        examples: the federation, for the size of its images and the number of classes.
    """
    return _create(config.model, config, examples)


def of_others(config: Config, examples: Federation, device: torch.device | str = "cpu") -> dict[str, nn.Module]:
    """Return the architectures that clients have and the server has not, by name.

    Args:
        config: the federation's configuration.
        examples: as in `of_server`.
        device: where they go.
    """
    return {name: _create(name, config, examples).to(device) for name in config.other_models}


def _create(name: str, config: Config, examples: Federation) -> nn.Module:
    shape, num_classes = examples.dataset.shape, len(examples.classes)
    return models.create(name, shape=shape, num_classes=num_classes, seed=derive(config.seed, "init"))
