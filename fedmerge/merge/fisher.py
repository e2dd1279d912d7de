"""Fisher merging: the mean of each parameter, weighted by how much each client's predictions hang on it.

Matena, Raffel: Merging Models with Fisher-Weighted Averaging, NeurIPS 2022, arXiv 2111.09832: θ = Σ_k λ_k F_k θ_k /
Σ_k λ_k F_k with diagonal Fishers F_k. What differs: the clients compute and send F_k, λ_k is their share of the
examples, and the floor under F_k, which draws to the plain mean, is chosen by the protocol.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fedmerge.merge.average import mean_state
from fedmerge.merge.choice import Setting, choose_setting
from fedmerge.problem import Merged, Problem, Update
from fedmerge.statistics import known_statistics

WEIGHTS = ("examples", "uniform")


@dataclass(frozen=True)
class FisherMerge:
    """Average by Fisher information.

    Attributes:
        weights: λ_k: "examples" (the clients' numbers of examples) or "uniform".
        floors: added to every F_k, in units of their mean over the parameters, to choose from; the first is the
            default. At least 0.
    """

    weights: str = "examples"
    floors: tuple[float, ...] = (1e-2, 1e-6, 1e-4, 1e-1, 1.0, 10.0)

    def __post_init__(self) -> None:
        check_weights(self.weights)
        if not self.floors or not all(0 <= floor < math.inf for floor in self.floors):
            raise ValueError(f"floors must be numbers of at least 0, at least one, got {self.floors}")

    def __call__(self, problem: Problem, updates: Sequence[Update], *, generator: torch.Generator) -> Merged:
        """Choose the floor and average."""
        pull = Pull.of(updates, self.weights, "Fisher merging")

        def merge(floor: float) -> dict[str, Tensor]:
            least = floor * pull.level or torch.finfo(torch.float64).tiny
            moves = {name: pull.force[name] / (strength + least) for name, strength in pull.strength.items()}
            return pull.moved(moves)

        return choose_setting(problem, [Setting({"floor": floor}, partial(merge, floor)) for floor in self.floors])


@dataclass(frozen=True)
class Pull:
    """How the clients' Fishers pull at the mean of their models: the gradient of Σ_k λ_k (θ − θ_k)ᵀ F_k (θ − θ_k) / 2.

    Attributes:
        mean: Σ_k λ_k θ_k, a state dict.
        force: Σ_k λ_k F_k (θ_k − mean) by parameter name, float64.
        strength: Σ_k λ_k F_k by parameter name, float64.
    """

    mean: Mapping[str, Tensor]
    force: Mapping[str, Tensor]
    strength: Mapping[str, Tensor]

    @classmethod
    def of(cls, updates: Sequence[Update], weights: str, what: str) -> Pull:
        """Return the pull of clients.

        Args:
            updates: at least one, with the statistic "fisher".
            weights: one of `WEIGHTS`.
            what: what needs it, for an error.
        """
        fishers = known_statistics(updates, "fisher", what)
        shares = [float(update.num_examples) if weights == "examples" else 1.0 for update in updates]
        mean = mean_state([update.state for update in updates], shares)
        force = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in fishers[0].items()}
        strength = {name: tensor.clone() for name, tensor in force.items()}
        for update, fisher, share in zip(updates, fishers, shares, strict=True):
            for name, tensor in fisher.items():
                weighted = share / sum(shares) * tensor.double()
                strength[name] += weighted
                force[name] += weighted * (update.state[name] - mean[name])
        return cls(mean, force, strength)

    @property
    def level(self) -> float:
        """The mean of Σ_k λ_k F_k over all parameters."""
        total = sum(float(tensor.sum()) for tensor in self.strength.values())
        return total / sum(tensor.numel() for tensor in self.strength.values())

    def moved(self, moves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the mean with some parameters moved, a fresh state dict."""
        return {
            name: (tensor + moves[name]).to(tensor.dtype) if name in moves else tensor.clone()
            for name, tensor in self.mean.items()
        }


def check_weights(weights: str) -> None:
    """Raise unless it is one of `WEIGHTS`.

    Raises:
        ValueError: names them.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
