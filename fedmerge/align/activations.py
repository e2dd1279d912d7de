"""Activation matching: units that correlate most over the server's images are the same unit.

Li, Yosinski, Clune, Lipson, Hopcroft: Convergent Learning: Do Different Neural Networks Learn the Same
Representations?, ICLR 2016, arXiv 1511.07543; Ainsworth, Hayase, Srinivasa: Git Re-Basin, ICLR 2023, arXiv 2209.04836,
section 3.1. The permutation of each feature space maximises the sum of the correlations (a linear assignment). The
spaces come from tracing the model, and a space is matched at its last node before pooling.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fedmerge.basis import Permutation, rebase
from fedmerge.features import Moments, moments
from fedmerge.problem import Aligned, Problem
from fedmerge.state import StateDict


@dataclass(frozen=True)
class Activations:
    """Permute the units by the correlation of their activations."""

    def __call__(
        self,
        problem: Problem,
        states: Sequence[StateDict],
        reference: int,
        *,
        generator: torch.Generator,
    ) -> Aligned:
        """Align all models to `states[reference]` by the activations on the server's images."""
        images = problem.learn.images
        compared = moments(problem.model, problem.spaces, states, reference, images)
        aligned = []
        matched: list[float] = []
        for index, (state, of_model) in enumerate(zip(states, compared, strict=True)):
            if index == reference:
                aligned.append({name: tensor.clone() for name, tensor in state.items()})
                continue
            changes = []
            for found in of_model:
                scores = correlation(found)
                change = match(scores)
                changes.append(change)
                matched.append(float(scores[torch.arange(len(scores)), change.index].mean()))
            aligned.append(rebase(state, problem.spaces, changes))
        mean = sum(matched) / len(matched) if matched else 1.0
        return Aligned(tuple(aligned), server_examples=len(images), diagnostics={"matched-correlation": round(mean, 6)})


def correlation(found: Moments) -> Float64[Tensor, "units units"]:
    """Return the correlations of the reference's units (rows) with the other's; 0 for a unit that never changes."""
    scales = [covariance.diagonal().clamp(min=0).sqrt() for covariance in (found.reference, found.other)]
    inverse = [torch.where(scale > 0, 1 / scale, 0.0) for scale in scales]
    return inverse[0][:, None] * found.cross * inverse[1]


def match(scores: Float64[Tensor, "units units"]) -> Permutation:
    """Return the permutation of the columns that maximises the sum of the diagonal.

    Args:
        scores: finite; rows are the reference's units, columns the other model's.

    Example:
        >>> match(torch.tensor([[0.1, 0.9], [0.8, 0.2]])).index
        tensor([1, 0])
    """
    _, columns = linear_sum_assignment(scores.numpy(), maximize=True)
    return Permutation(torch.from_numpy(columns))
