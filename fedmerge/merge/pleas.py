"""PLeaS: after a permutation, each linear layer's weights solve the least squares of the clients' mean features.

Nasery, Hayase, Koh, Oh: PLeaS: Merging Models with Permutations and Least Squares, CVPR 2025, arXiv 2407.02447. With
X_k the inputs of a layer in the aligned model k, the merged layer maps their mean to the mean of what the models make
of them: min_W ‖X̄ W − Σ_k X_k W_k / K‖², on images without labels. What differs: the aligner is the user's choice
(`activations+pleas`), all units are matched, a ridge draws to the mean of the weights, and its strength is chosen by
the protocol. What is not linear is averaged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from fedmerge.layers import from_matrix, linear_layers, matrix, observing, rows
from fedmerge.merge.average import mean_state
from fedmerge.merge.choice import Setting, choose_setting
from fedmerge.merge.regmean import ridge_solution
from fedmerge.problem import Merged, Problem, Update
from fedmerge.state import StateDict
from fedmerge.train import predict

BATCH = 64


@dataclass(frozen=True)
class PLeaS:
    """Solve each linear layer's least squares on the server's images.

    Attributes:
        ridges: pulls toward the mean of the weights, relative to the mean of the inputs' second moments, to choose
            from; the first is the default. Greater than 0.
    """

    ridges: tuple[float, ...] = (1e-2, 1e-4, 1e-3, 1e-1, 1.0, 1e-6)

    def __post_init__(self) -> None:
        if not self.ridges or not all(0 < ridge < math.inf for ridge in self.ridges):
            raise ValueError(f"ridges must be numbers greater than 0, at least one, got {self.ridges}")

    def __call__(self, problem: Problem, updates: Sequence[Update], *, generator: torch.Generator) -> Merged:
        """Choose the ridge and solve."""
        images = problem.learn.images
        states = [update.state for update in updates]
        mean = mean_state(states)
        systems = normal_equations(problem.model, states, mean, images)

        def merge(ridge: float) -> dict[str, Tensor]:
            merged = {name: tensor.clone() for name, tensor in mean.items()}
            for name, (gram, cross) in systems.items():
                merged |= from_matrix(matrix(name, mean) + ridge_solution(gram, cross, ridge), name, mean)
            return merged

        found = choose_setting(problem, [Setting({"ridge": ridge}, partial(merge, ridge)) for ridge in self.ridges])
        used = max(found.server_examples, len(images))
        return Merged(found.states, used, found.server_labels, diagnostics=found.diagnostics)


@torch.no_grad()
def normal_equations(
    model: nn.Module, states: Sequence[StateDict], mean: Mapping[str, Tensor], images: Tensor
) -> dict[str, tuple[Tensor, Tensor]]:
    """Return X̄ᵀ X̄ and X̄ᵀ (Σ_k X_k W_k / K − X̄ W̄) of each linear layer, in float64, by its weight's name.

    Args:
        model: the architecture.
        states: the models, in one basis, at least one.
        mean: their mean, with the weights W̄.
        images: (examples, …), on the states' device.
    """
    layers = linear_layers(model)
    sums: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in torch.split(images, BATCH):
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        for state in states:
            seen: dict[str, list[Tensor]] = {}
            with observing(layers, lambda name, given, seen=seen: seen.setdefault(name, []).append(given)):  # type: ignore[misc]
                predict(model, state, batch)
            for name, calls in seen.items():
                found = torch.cat([rows(layers[name], given) for given in calls]).double() / len(states)
                product = found @ matrix(name, state)
                inputs[name] = inputs[name] + found if name in inputs else found
                outputs[name] = outputs[name] + product if name in outputs else product
        for name, found in inputs.items():
            missing = outputs[name] - found @ matrix(name, mean)
            gram, cross = found.T @ found, found.T @ missing
            before = sums.get(name)
            sums[name] = (gram, cross) if before is None else (before[0] + gram, before[1] + cross)
    return sums
