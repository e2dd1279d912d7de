"""The paper's mixture of two models, W = α ⊙ W_A + (1 − α) ⊙ W_B with α = σ(a) (see `fedmerge.merge.nonuniform`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedmerge.merge import kernels
from fedmerge.merge.adam import Adam, first_step
from fedmerge.merge.directions import Moments


class SigmoidPair:
    """θ = σ(a) ⊙ A + (1 − σ(a)) ⊙ B, from a = 0.

    Args:
        first: A by parameter name.
        second: B by parameter name.
    """

    def __init__(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
        self.names = list(first)
        self.weights = {name: torch.lerp(second[name], tensor, 0.5).contiguous() for name, tensor in first.items()}
        self.values = list(self.weights.values())
        self.theta = {name: tensor.view(1, -1) for name, tensor in self.weights.items()}
        self.first, self.second = (
            {name: model[name].contiguous().view(1, -1) for name in first} for model in (first, second)
        )
        self.moments = {name: Moments.zeros(tensor) for name, tensor in self.theta.items()}
        self.raw = {name: torch.zeros_like(tensor) for name, tensor in self.theta.items()}
        self.steps = first_step(self.values[0])

    def parameters(self) -> dict[str, Tensor]:
        """Return the mixture; the next step changes it."""
        return self.weights

    def coefficients(self) -> dict[str, Tensor]:
        """Return σ(a) by parameter name."""
        return {name: raw.sigmoid().view_as(self.weights[name]) for name, raw in self.raw.items()}

    def step(self, gradients: Mapping[str, Tensor], rule: Adam) -> None:
        """Move a, and mix."""
        self.steps += 1
        rates = rule.rates(self.steps)
        for name, theta in self.theta.items():
            gradient = gradients[name].contiguous().view(1, -1)
            kernels.pair(
                theta, self.moments[name], gradient, self.raw[name], self.first[name], self.second[name], rates
            )
