"""Cycle-consistent matching: all models are permuted to one universe, each to fit all others.

Crisostomi, Fumero, Baieri, Bernard, Rodolà: C²M³: Cycle-Consistent Multi-Model Merging, NeurIPS 2024, arXiv
2405.17897. With the similarities S_pq of the units of models p and q, the permutations maximise Σ_pq ⟨P_p, S_pq P_q⟩:
going from one model to a second over any third gives what going there directly gives, and no model is special.

What differs: similarities are correlations of activations on the server's images, not inner products of weights, so
every space is a problem of its own. Its maximum is climbed from the matching with the reference; at each step the
model whose best permutation, given all others', gains most takes it (C²M³ takes Frank-Wolfe steps). So neither the
order of the models nor chance matters. In the end the universe is given the reference's order.

The correlations of all pairs take one pass of each model over the images, and memory of K² / 2 numbers for each pair of
units of a space.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from fedmerge.align.comparison import Comparison
from fedmerge.align.matching import correlations, match
from fedmerge.basis import Permutation
from fedmerge.problem import Aligned, Problem
from fedmerge.state import StateDict

LEAST_GAIN = 1e-9

Similarities = Sequence[Sequence[Float64[Tensor, "units units"]]]
"""For models p and q, the similarities of p's units (rows) and q's."""


@dataclass(frozen=True)
class Universe:
    """Permute the units of all models by the correlations of their activations in all pairs of models."""

    def __call__(
        self, problem: Problem, states: Sequence[StateDict], reference: int, *, generator: torch.Generator
    ) -> Aligned:
        """Align all models to each other, in the units' order of `states[reference]`."""
        return self.aligned(Comparison(problem, states, reference, every_pair=True))

    def aligned(self, comparison: Comparison) -> Aligned:
        """Align models that are compared already, in all pairs.

        Args:
            comparison: of the models.
        """
        spaces = comparison.problem.spaces
        changes: list[list[Permutation]] = [[] for _ in comparison.states]
        similarity = 0.0
        for joint, _ in zip(comparison.joint, spaces, strict=False):
            similarities = correlations(joint)
            found = universe(similarities, comparison.reference)
            for of_model, change in zip(changes, found, strict=True):
                of_model.append(change)
            similarity += agreement(similarities, found) / len(spaces)
        return Aligned(
            comparison.permuted(changes),
            server_examples=len(comparison.problem.learn),
            diagnostics={"matched-correlation": round(similarity, 6)},
            changes=tuple(changes),
        )


def universe(similarities: Similarities, reference: int) -> list[Permutation]:
    """Return the permutation of each model's units into one common order, the reference's.

    Args:
        similarities: of all pairs of models, symmetric.
        reference: index of the model whose order is kept.
    """
    models = range(len(similarities))
    order = [match(similarities[reference][model]).index if model != reference else None for model in models]
    size = len(similarities[reference][reference])
    indices = [torch.arange(size) if index is None else index for index in order]
    while True:
        best, gain = None, LEAST_GAIN
        for model in models:
            others = [similarities[other][model][indices[other]] for other in models if other != model]
            if others:
                scores = torch.stack(others).sum(0)
                index = match(scores).index
                gained = float(
                    scores[torch.arange(size), index].sum() - scores[torch.arange(size), indices[model]].sum()
                )
                if gained > gain:
                    best, gain = (model, index), gained
        if best is None:
            break
        indices[best[0]] = best[1]
    renaming = indices[reference].argsort()
    return [Permutation(index[renaming]) for index in indices]


def agreement(similarities: Similarities, changes: Sequence[Permutation]) -> float:
    """Return the mean similarity of the units that are one, over all pairs of different models (1 for one model)."""
    found = [
        similarities[p][q][first.index, second.index].mean()
        for p, first in enumerate(changes)
        for q, second in enumerate(changes)
        if p < q
    ]
    return float(torch.stack(found).mean()) if found else 1.0
