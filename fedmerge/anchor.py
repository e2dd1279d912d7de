"""A public anchor: what clients fit their units to where the server is to see no single model.

Secure aggregation (Bonawitz, Ivanov, Kreuter, Marcedone, McMahan, Patel, Ramage, Segal, Seth: Practical Secure
Aggregation for Privacy-Preserving Machine Learning, CCS 2017) gives a server the sum of the clients' models alone. Then
it can align nothing, learn no coefficients and screen nobody. What is left is a mean, and a mean is of use if each
client brings its model into common units before it is hidden: here by weight matching (Git Re-Basin,
`fedmerge.align.weights`) with a model that everybody has, the round's broadcast. It needs no image.

Between independent initialisations an untrained anchor is little help, so the server trains one on its own images.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fedmerge.align.weights import match_weights
from fedmerge.basis import rebase
from fedmerge.problem import Examples
from fedmerge.seeds import generator as stream
from fedmerge.settings import ConfigurationError
from fedmerge.state import StateDict
from fedmerge.symmetry import symmetry
from fedmerge.train import LocalTraining, fit

ROUNDS = 100
"""Most times that all spaces are gone over."""

RECIPE = LocalTraining(epochs=30)
"""How the server trains an anchor."""


def anchored(
    model: nn.Module, state: StateDict, anchor: StateDict, images: Tensor, *, generator: torch.Generator
) -> dict[str, Tensor]:
    """Rename the units of a model so that its weights are nearest to the anchor's; its function stays.

    Args:
        model: the architecture.
        state: the client's weights.
        anchor: the public model's, of the same architecture.
        images: (examples, …), some of the size that the model takes; what is in them does not matter.
        generator: decides the order of the spaces.
    """
    spaces = symmetry(model, images)
    fixed, moving = ({name: weights[name].cpu() for name, _ in model.named_parameters()} for weights in (anchor, state))
    changes, _ = match_weights(fixed, moving, spaces, rounds=ROUNDS, generator=generator)
    return rebase(state, spaces, changes)


def trained_anchor(model: nn.Module, examples: Examples, *, seed: int) -> dict[str, Tensor]:
    """Return an anchor that the server has trained on its own labelled images.

    Args:
        model: the architecture, with the weights to start from.
        examples: the server's.
        seed: of the training.

    Raises:
        ConfigurationError: if no class is known.
    """
    labelled = examples[examples.known]
    if len(labelled) == 0:
        raise ConfigurationError(
            "--anchor needs the classes of some of the server's images (--server-labels): it trains the first round's "
            "anchor on them; or give --init shared, whose start is one"
        )
    return fit(copy.deepcopy(model), model.state_dict(), labelled, RECIPE, generator=stream(seed, "anchor"))[0]
