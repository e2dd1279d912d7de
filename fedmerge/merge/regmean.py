"""RegMean: each linear layer's weights solve the least squares of all clients' data, known by their Gram matrices.

Jin, Ren, Preotiuc-Pietro, Cheng: Dataless Knowledge Fusion by Merging Weights of Language Models, ICLR 2023, arXiv
2212.09849: W = (Σ_k G_k)⁻¹ Σ_k G_k W_k minimises Σ_k ‖X_k W − X_k W_k‖² with G_k = X_kᵀ X_k, whose entries off the
diagonal are multiplied by a factor below 1. What differs: a bias is the weight of a constant input, convolutions are
linear in their patches, the factor is chosen by the protocol, and what no client's inputs reach is drawn to the
clients' mean by a tiny ridge. All other parameters are averaged.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float64
from torch import Tensor

from fedmerge.layers import from_matrix, matrix
from fedmerge.merge.average import mean_state
from fedmerge.merge.choice import Setting, choose_setting
from fedmerge.merge.fisher import check_weights
from fedmerge.problem import Merged, Problem, Update
from fedmerge.statistics import known_statistics


@dataclass(frozen=True)
class RegMean:
    """Solve each linear layer's least squares.

    Attributes:
        weights: of the clients' mean Gram matrices: "examples" or "uniform".
        factors: of the entries off the diagonal, in [0, 1], to choose from; the first is the default.
        ridge: pull toward the mean, relative to the mean of the Gram matrix's diagonal, greater than 0.
    """

    weights: str = "examples"
    factors: tuple[float, ...] = (0.9, 0.0, 0.1, 0.5, 0.7, 1.0)
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        check_weights(self.weights)
        if not self.factors or not all(0 <= factor <= 1 for factor in self.factors):
            raise ValueError(f"factors must be numbers in [0, 1], at least one, got {self.factors}")
        if not 0 < self.ridge < math.inf:
            raise ValueError(f"ridge must be greater than 0, got {self.ridge}")

    def __call__(self, problem: Problem, updates: Sequence[Update], *, generator: torch.Generator) -> Merged:
        """Choose the factor and solve."""
        grams = known_statistics(updates, "gram", "RegMean")
        shares = [float(update.num_examples) if self.weights == "examples" else 1.0 for update in updates]
        mean = mean_state([update.state for update in updates], shares)
        layers: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        for name in grams[0]:
            center = matrix(name, mean)
            total, diagonal, full = torch.zeros_like(grams[0][name], dtype=torch.float64), 0 * center, 0 * center
            for update, gram, share in zip(updates, grams, shares, strict=True):
                deviation = matrix(name, update.state) - center
                weighted = share / sum(shares) * gram[name].double()
                total += weighted
                full += weighted @ deviation
                diagonal += weighted.diagonal()[:, None] * deviation
            layers[name] = total, full, diagonal

        def merge(factor: float) -> dict[str, Tensor]:
            merged = {name: tensor.clone() for name, tensor in mean.items()}
            for name, (total, full, diagonal) in layers.items():
                scaled = torch.lerp(total.diagonal().diag(), total, factor)
                moved = matrix(name, mean) + ridge_solution(scaled, torch.lerp(diagonal, full, factor), self.ridge)
                merged |= from_matrix(moved, name, mean)
            return merged

        settings = [Setting({"factor": factor}, partial(merge, factor)) for factor in self.factors]
        return choose_setting(problem, settings)


def ridge_solution(
    gram: Float64[Tensor, "inputs inputs"], cross: Float64[Tensor, "inputs outputs"], ridge: float
) -> Float64[Tensor, "inputs outputs"]:
    """Return (G + ρ I)⁻¹ C, with ρ the ridge times the mean of G's diagonal.

    Args:
        gram: G, positive semidefinite.
        cross: C, 0 where G is.
        ridge: greater than 0.

    Example:
        >>> ridge_solution(2 * torch.eye(2).double(), torch.ones(2, 1).double(), 1.0)
        tensor([[0.2500],
                [0.2500]], dtype=torch.float64)
    """
    strength = ridge * max(float(gram.diagonal().mean()), torch.finfo(torch.float32).tiny)
    solved: Tensor = torch.linalg.solve(
        gram + strength * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), cross
    )
    return solved
