"""NP Merge: the contribution of each parameter of each model is learned on the server's examples.

Orozco Camacho, Horoi, Wolf, Belilovsky: Non-Uniform Parameter-Wise Model Merging, arXiv 2412.15467. The paper merges
two models as W = α ⊙ W_A + (1 − α) ⊙ W_B, α = σ(a), with a learned by gradient descent, and more than two by successive
pairs: `PairwiseNPMerge`. `NPMerge` joins all K models at once, θ = Σ_k α_k ⊙ θ_k with Σ_k α_k = 1 and no bounds; two
models then are a pair without the sigmoid. It also ties coefficients by output channel, tensor or model, which is what
few examples want; between channels and parameters validation chooses.

No autograd graph runs through the merge: dL/dα_k = θ_k ⊙ dL/dθ, summed over what is tied.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedmerge.merge.average import mean_state
from fedmerge.merge.descent import Candidate, Schedule, check_budget, learn, split_state
from fedmerge.problem import Merged, Problem, Update
from fedmerge.state import StateDict

GROUPS = ("model", "tensor", "channel", "parameter")


@dataclass(frozen=True)
class NPMerge:
    """Joint K-way NP Merge with affine coefficients, Σ_k α_k = 1.

    Attributes:
        groups: what shares a coefficient: "model", "tensor", "channel" (of the output), "parameter", or "auto", which
            chooses between the last two.
        lrs: Adam's learning rates to choose from, in units of α; the first is the default.
        steps: most steps.
    """

    groups: str = "auto"
    lrs: tuple[float, ...] = (1e-2, 3e-3, 3e-2)
    steps: int = Schedule.steps

    def __post_init__(self) -> None:
        if self.groups not in ("auto", *GROUPS):
            raise ValueError(f"groups must be auto or one of {', '.join(GROUPS)}, got {self.groups!r}")
        check_budget(self.lrs, self.steps)

    def __call__(self, problem: Problem, updates: Sequence[Update], *, generator: torch.Generator) -> Merged:
        """Learn the coefficients, from the uniform mean."""
        states = [update.state for update in updates]
        if len(states) == 1:
            return Merged(({name: tensor.clone() for name, tensor in states[0].items()},))
        mean = mean_state(states)
        start, buffers = split_state(problem, mean)
        deviations = {name: torch.stack([state[name] - start[name] for state in states]) for name in start}
        candidates = [
            Candidate({"groups": groups}, lr, lambda groups=groups: AffineMixture(start, deviations, groups))  # type: ignore[misc]
            for groups in (("channel", "parameter") if self.groups == "auto" else (self.groups,))
            for lr in self.lrs
        ]
        schedule = Schedule(steps=self.steps)
        return learn(problem, candidates, buffers, schedule, generator=generator, task="NP Merge")


@dataclass(frozen=True)
class PairwiseNPMerge:
    """The paper's NP Merge: α = σ(a) for each parameter, starting at ½; successive pairs in the clients' order.

    Attributes:
        lrs: Adam's learning rates to choose from, in units of a; the first is the default.
        steps: most steps for each pair.
    """

    lrs: tuple[float, ...] = (3e-2, 1e-1, 3e-1)
    steps: int = Schedule.steps

    def __post_init__(self) -> None:
        check_budget(self.lrs, self.steps)

    def __call__(self, problem: Problem, updates: Sequence[Update], *, generator: torch.Generator) -> Merged:
        """Merge the first two models, then the result with the third, and so on."""
        merged = Merged(({name: tensor.clone() for name, tensor in updates[0].state.items()},))
        pairs = []
        for update in updates[1:]:
            merged = self._pair(problem, merged.state, update.state, generator)
            pairs.append(dict(merged.diagnostics))
        return replace(merged, diagnostics={"pairs": pairs})

    def _pair(self, problem: Problem, first: StateDict, second: StateDict, generator: torch.Generator) -> Merged:
        _, buffers = split_state(problem, mean_state([first, second]))
        ours, _ = split_state(problem, first)
        theirs, _ = split_state(problem, second)
        candidates = [Candidate({}, lr, lambda: SigmoidPair(ours, theirs)) for lr in self.lrs]
        schedule = Schedule(steps=self.steps)
        return learn(problem, candidates, buffers, schedule, generator=generator, task="NP Merge of a pair")


class AffineMixture:
    """θ = θ̄ + Σ_k β_k ⊙ (θ_k − θ̄), which is Σ_k α_k ⊙ θ_k with α_k = 1/K + β_k − mean(β), so that Σ_k α_k = 1.

    The gradient is that of α_k while the other models make room equally: K/(K − 1) · (θ_k − θ̄) ⊙ dL/dθ. For two models
    it is (θ_A − θ_B) ⊙ dL/dθ, the pair's.

    Args:
        mean: θ̄ by parameter name.
        deviations: θ_k − θ̄ by parameter name, (models, …).
        groups: one of `GROUPS`.
    """

    def __init__(self, mean: Mapping[str, Tensor], deviations: Mapping[str, Tensor], groups: str) -> None:
        self.mean = mean
        self.deviations = deviations
        self.groups = groups
        num_models, device = next((len(tensor), tensor.device) for tensor in deviations.values())
        self.factor = num_models / (num_models - 1)
        if groups == "model":
            dtype = next(iter(mean.values())).dtype
            self.values = [torch.zeros(num_models, dtype=dtype, device=device)]
        else:
            self.values = [tensor.new_zeros(_tied_shape(tensor.shape, groups)) for tensor in deviations.values()]

    def parameters(self) -> dict[str, Tensor]:
        """Return the mixture."""
        return {
            name: self.mean[name] + (coefficients * tensor).sum(0)
            for coefficients, (name, tensor) in zip(self._spread(), self.deviations.items(), strict=True)
        }

    def pull_back(self, gradients: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the gradients of β, summed over what is tied."""
        products = [self.factor * tensor * gradients[name] for name, tensor in self.deviations.items()]
        if self.groups == "model":
            return [torch.stack([product.flatten(1).sum(1) for product in products]).sum(0)]
        return [product.sum_to_size(value.shape) for product, value in zip(products, self.values, strict=True)]

    def coefficients(self) -> dict[str, Tensor]:
        """Return α by parameter name: (models, …), broadcastable to the parameters."""
        names = list(self.deviations)
        return {name: 1 / len(beta) + beta - beta.mean(0) for name, beta in zip(names, self._spread(), strict=True)}

    def _spread(self) -> list[Tensor]:
        if self.groups != "model":
            return self.values
        (value,) = self.values
        return [value.reshape(-1, *[1] * (tensor.ndim - 1)) for tensor in self.deviations.values()]


class SigmoidPair:
    """θ = σ(a) ⊙ A + (1 − σ(a)) ⊙ B, from a = 0.

    Args:
        first: A by parameter name.
        second: B by parameter name.
    """

    def __init__(self, first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
        self.first = first
        self.second = second
        self.values = [torch.zeros_like(tensor) for tensor in first.values()]

    def parameters(self) -> dict[str, Tensor]:
        """Return the mixture."""
        return {
            name: torch.lerp(self.second[name], tensor, value.sigmoid())
            for value, (name, tensor) in zip(self.values, self.first.items(), strict=True)
        }

    def pull_back(self, gradients: Mapping[str, Tensor]) -> list[Tensor]:
        """Return (A − B) ⊙ dL/dθ ⊙ σ(a)(1 − σ(a))."""
        found = []
        for value, (name, tensor) in zip(self.values, self.first.items(), strict=True):
            share = value.sigmoid()
            found.append((tensor - self.second[name]) * gradients[name] * share * (1 - share))
        return found


def _tied_shape(shape: Sequence[int], groups: str) -> tuple[int, ...]:
    """Return the shape (models, …) of the coefficients of a stack of parameters."""
    kept = {"tensor": 1, "channel": 2, "parameter": len(shape)}[groups]
    return tuple(size if dim < kept else 1 for dim, size in enumerate(shape))
