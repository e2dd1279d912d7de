"""FedFisher, diagonal form: the way from the mean of the clients to their Fisher-weighted mean, stopped by validation.

Jhunjhunwala, Wang, Joshi: FedFisher: Leveraging Fisher Information for One-Shot Federated Learning, AISTATS 2024, arXiv
2403.12329. The server descends Σ_k λ_k (θ − θ_k)ᵀ F_k (θ − θ_k) from FedAvg's model and keeps the step with the best
validation result: what the Fishers do not know of stays at FedAvg, where Fisher merging divides small numbers by small
ones. What differs: the descent of a diagonal quadratic has a closed form, so its time is chosen and no step is taken:
θ(t) = mean + (1 − exp(−t F)) ⊙ (optimum − mean), F = Σ_k λ_k F_k. The paper's code takes up to thousands of steps that
are scaled as Adam's are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fedmerge.merge.choice import Setting, choose_setting
from fedmerge.merge.fisher import Pull, check_weights
from fedmerge.problem import Merged, Problem, Update


@dataclass(frozen=True)
class FedFisher:
    """Descend towards the Fisher-weighted mean.

    Attributes:
        weights: λ_k: "examples" (the clients' numbers of examples) or "uniform".
        times: of the descent, in units of one over the mean of F over the parameters, to choose from; the first is the
            default. At least 0, at which it is the mean.
    """

    weights: str = "examples"
    times: tuple[float, ...] = (10.0, 0.1, 1.0, 100.0, 1e3, 1e4)

    def __post_init__(self) -> None:
        check_weights(self.weights)
        if not self.times or not all(0 <= time < math.inf for time in self.times):
            raise ValueError(f"times must be numbers of at least 0, at least one, got {self.times}")

    def __call__(self, problem: Problem, updates: Sequence[Update], *, generator: torch.Generator) -> Merged:
        """Choose the time and go."""
        pull = Pull.of(updates, self.weights, "FedFisher")
        tiny = torch.finfo(torch.float64).tiny

        def merge(time: float) -> dict[str, Tensor]:
            rate = time / (pull.level or 1.0)
            shares = {name: -torch.expm1(-rate * strength) for name, strength in pull.strength.items()}
            return pull.moved(
                {name: share * pull.force[name] / (pull.strength[name] + tiny) for name, share in shares.items()}
            )

        return choose_setting(problem, [Setting({"time": time}, partial(merge, time)) for time in self.times])
