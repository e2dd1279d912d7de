"""Maps from the coordinates that a descent moves to the parameters of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from fedmerge.merge.adam import Adam


class Coordinates(Protocol):
    """A map from coordinates c to the parameters θ(c) of a model, which knows how to take a step."""

    names: list[str]
    """Names of the parameters whose gradients a step needs."""

    values: list[Tensor]
    """What `parameters` depends on, linearly or nearly so: their mean over steps may be put in their place."""

    def parameters(self) -> dict[str, Tensor]:
        """Return θ(c) by parameter name; the tensors may change with the next step."""

    def step(self, gradients: Mapping[str, Tensor], rule: Adam) -> None:
        """Move the coordinates in place by a step of Adam, whose moments they keep.

        Args:
            gradients: dL/dθ by parameter name.
            rule: the same in every step.
        """


class Pulled:
    """Coordinates that torch's Adam moves along their gradients."""

    names: list[str]
    values: list[Tensor]
    optimizer: torch.optim.Optimizer | None = None

    def pull_back(self, gradients: Mapping[str, Tensor]) -> list[Tensor | None]:
        """Return dL/dc, one tensor for each of `values`, from dL/dθ; None for one that is not moved in this step."""
        raise NotImplementedError

    def project(self) -> None:
        """Bring the coordinates, after a step, back to where they may be, in place."""

    def step(self, gradients: Mapping[str, Tensor], rule: Adam) -> None:
        """Move the coordinates."""
        self.optimizer = self.optimizer or rule.optimizer(self.values)
        for value, gradient in zip(self.values, self.pull_back(gradients), strict=True):
            value.grad = gradient
        self.optimizer.step()
        self.project()


class Weights(Pulled):
    """The weights themselves are the coordinates: fine-tuning.

    Args:
        start: parameters by name.
        moving: names of those that are coordinates; the others stay as they are. Default: all.
    """

    def __init__(self, start: Mapping[str, Tensor], moving: Sequence[str] | None = None) -> None:
        self.names = list(start) if moving is None else list(moving)
        self.values = [start[name].detach().clone() for name in self.names]
        self.start = start

    def parameters(self) -> dict[str, Tensor]:
        """Return the weights."""
        return {**self.start, **dict(zip(self.names, self.values, strict=True))}

    def pull_back(self, gradients: Mapping[str, Tensor]) -> list[Tensor | None]:
        """Return the gradients as they are."""
        return [gradients[name] for name in self.names]
