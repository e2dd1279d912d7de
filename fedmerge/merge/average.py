"""Averages of the clients' weights.

FedAvg: McMahan, Moore, Ramage, Hampson, Agüera y Arcas: Communication-Efficient Learning of Deep Networks from
Decentralized Data, AISTATS 2017, arXiv 1602.05629. Unlike it, and unlike Flower's, integer buffers are not averaged
(they are the first client's), and BatchNorm statistics are re-estimated on the server's images, if it has any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.calibrate import calibrate, has_statistics
from fedmerge.problem import Merged, Problem, Update
from fedmerge.state import StateDict


@dataclass(frozen=True)
class Average:
    """A weighted mean of the clients' models.

    Attributes:
        weights: "examples" (FedAvg: by the clients' numbers of examples) or "uniform".
        calibrate: re-estimate BatchNorm statistics on the server's images; otherwise they are averaged too.
    """

    weights: str = "uniform"
    calibrate: bool = True

    def __post_init__(self) -> None:
        if self.weights not in ("examples", "uniform"):
            raise ValueError(f"weights must be 'examples' or 'uniform', got {self.weights!r}")

    def __call__(
        self,
        problem: Problem,
        updates: Sequence[Update],
        *,
        generator: torch.Generator,
    ) -> Merged:
        """Average the updates."""
        shares = [float(update.num_examples) if self.weights == "examples" else 1.0 for update in updates]
        merged = mean_state([update.state for update in updates], shares)
        if not (self.calibrate and has_statistics(problem.model)):
            return Merged((merged,))
        images = problem.learn.images
        return Merged((calibrate(problem.model, merged, images),), server_examples=len(images))


def mean_state(states: Sequence[StateDict], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Return the weighted mean of state dicts: θ₀ + Σ_k w_k (θ_k − θ₀), exact where all are equal.

    Args:
        states: at least one, of one architecture.
        weights: non-negative, not all 0; they are normalised. Default: equal.

    Returns:
        A fresh state dict; integer tensors are the first state's.

    Raises:
        ValueError: if the weights are unusable.

    Example:
        >>> mean_state([{"w": torch.tensor([1.0])}, {"w": torch.tensor([4.0])}], [2, 1])
        {'w': tensor([2.])}
    """
    weights = [1.0] * len(states) if weights is None else list(weights)
    total = sum(weights)
    if len(weights) != len(states) or min(weights) < 0 or not 0 < total < float("inf"):
        raise ValueError(f"expected {len(states)} weights, none negative and not all 0, got {weights}")
    first, *others = states
    result = {name: tensor.detach().clone() for name, tensor in first.items()}
    for name, tensor in result.items():
        if tensor.is_floating_point():
            for state, weight in zip(others, weights[1:], strict=True):
                tensor += (state[name] - first[name]) * (weight / total)
    return result
