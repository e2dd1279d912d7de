"""ZipIt: units are merged across models and within them, most alike first.

Stoica, Bolya, Bjorner, Ramesh, Hearn, Hoffman: ZipIt! Merging Models from Different Tasks without Training, ICLR 2024,
arXiv 2305.03053. The n units of a space in each of K models are Kn units; the two that correlate most become a group,
then the next two units or groups, until n groups are left. A group's unit is the mean of its units, and what read any
of them reads it. So a model may give up units that repeat each other, and another keep units that no one else has:
two nets that each need half of their units are merged to both, side by side.

A group correlates with another as their least alike units do. `within` (the paper's β) bounds the merges inside of
models: each may pay for that share of a K-th of all merges. `decay` (α) keeps groups small.

How it fits here: with M_k the means and U_k the readers' sums of model k's units, the merge Σ_k M_k W_k U_k is the
uniform mean of the models K M_k W_k U_k, which are returned (`fedmerge.basis.Zip`). Any merger that starts at their
mean works on them. They are the merge's parts, though, and no models: what judges or keeps a single client
(`best-client`, `ensemble`, `start=best`) is not to be used after it. The reference's units give the groups their order;
else no model is special.

What differs:
- All models are zipped at once, also more than two; within, α and the depth are chosen on the server's validation data
  (the paper's code searches them on the test set).
- A merge is "within" if both groups have units of one model, whatever else they have; each such model pays. What is
  forbidden comes last, after all that is allowed: with three models it may be all that is left.
- A positive correlation is multiplied by α for each merge that the two groups have behind them, but only if the two
  have units of one model: K copies of a unit become one group before anything else does.
- Units that never change and are equal are one unit (a dead unit leaves its place to a live one).
- BatchNorm is folded, and restored with the mean of the group's deviations (`fedmerge.folding`); the statistics are
  to be re-estimated. A space with other weights that act unit by unit is permuted.
- Partial depth: the paper zips the first layers, and keeps each model's later ones as a head of its own. A merge here
  is one model of the clients' architecture. In it the late layers are those in which clients differ, and where places
  must be shared; early layers are alike, and may be permuted alone. So `depth` is the share of the spaces that are
  zipped, counted from the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float64, Int
from torch import Tensor

from fedmerge.align.choice import Candidates
from fedmerge.align.comparison import Comparison, aligned_by_choice
from fedmerge.align.identity import Identity
from fedmerge.align.matching import correlations
from fedmerge.basis import BasisChange, Zip
from fedmerge.covariances import Joint
from fedmerge.problem import Aligned, Problem
from fedmerge.state import StateDict

FORBIDDEN = 4.0
"""Taken off the similarity of groups that may not merge: more than correlations can differ."""


@dataclass(frozen=True)
class ZipIt:
    """Merge units across and within models by the correlation of their activations.

    Each has values to choose from, the first being the default.

    Attributes:
        within: β, how much a model may merge within itself, from 0 to 1.
        decay: α, what a merge leaves of a correlation with more of the same model, above 0, at most 1.
        depth: share of the spaces, last to first, that are zipped; those before are permuted. From 0 to 1.
    """

    parts: ClassVar[bool] = True
    """What is returned are parts of a mean, and no models."""

    within: tuple[float, ...] = (0.75, 0.5)
    decay: tuple[float, ...] = (0.5, 0.8)
    depth: tuple[float, ...] = (1.0, 0.5)

    def __post_init__(self) -> None:
        for name, values in (("within", self.within), ("decay", self.decay), ("depth", self.depth)):
            if not values or not all(0 <= value <= 1 for value in values):
                raise ValueError(f"{name} must be numbers from 0 to 1, at least one, got {values}")
        if 0 in self.decay:
            raise ValueError(f"decay must be greater than 0, got {self.decay}")

    def __call__(
        self, problem: Problem, states: Sequence[StateDict], reference: int, *, generator: torch.Generator
    ) -> Aligned:
        """Return the parts of the zipped model, its units in the order of `states[reference]`."""
        if len(states) == 1:
            return Identity()(problem, states, reference, generator=generator)
        return aligned_by_choice(Comparison(problem, states, reference, every_pair=True, folded=True), self.candidates)

    def candidates(self, comparison: Comparison) -> Candidates:
        """Return the parts for each setting."""
        return {
            f"zipit:within={within:g}:decay={decay:g}:depth={depth:g}": lambda setting=(within, decay, depth): zipped(  # type: ignore[misc]
                comparison, *setting
            )
            for depth, within, decay in product(self.depth, self.within, self.decay)
        }


def zipped(comparison: Comparison, within: float, decay: float, depth: float) -> Aligned:
    """Return the models' parts in the zipped model.

    Args:
        comparison: of the models, in all pairs, with BatchNorms.
        within: β.
        decay: α.
        depth: share of the spaces to zip.
    """
    spaces = comparison.problem.spaces
    first = len(spaces) - round(depth * len(spaces))
    changes: list[list[BasisChange]] = [[] for _ in comparison.states]
    for number, dense in enumerate(comparison.folding.dense):
        if dense and number >= first:
            scores = similarities(comparison.joint[number])
            groups = in_order(zip_units(scores, within=within, decay=decay), comparison.reference)
            found: Sequence[BasisChange] = zips(groups)
        else:
            found = [of_model[number] for of_model in comparison.matches]
        for of_model, change in zip(changes, found, strict=True):
            of_model.append(change)
    return Aligned(tuple(comparison.changed(model, of_model) for model, of_model in enumerate(changes)))


def similarities(joint: Joint) -> Float64[Tensor, "models units models units"]:
    """Return the correlations of all models' units, but 1 for two that never change and have the same mean."""
    found = torch.stack([torch.stack(of_model) for of_model in correlations(joint)]).movedim(1, 2)
    still = torch.stack([variances <= 0 for variances in joint.variances])
    means = torch.stack(joint.means)
    alike = still[:, :, None, None] & still & (means[:, :, None, None] == means)
    return torch.where(alike, 1.0, found)


def zip_units(
    scores: Float64[Tensor, "models units models units"], *, within: float, decay: float
) -> Int[Tensor, "models units"]:
    """Return the group of each unit of each model, by greedy merging: as many groups as a model has units.

    A similarity can only fall by a merge. So each group's best one is kept as it once was, and computed again only when
    the group seems to be the best of all: a merge takes a few passes over the groups, not over their pairs.

    Args:
        scores: similarities of all units, symmetric.
        within: β.
        decay: α.
    """
    models, size = scores.shape[:2]
    count = models * size
    flat = scores.reshape(count, count).numpy()
    least = (flat + flat.T) / 2  # a product may be rounded otherwise than its mirror image, and the order decides
    np.fill_diagonal(least, -np.inf)
    members = np.repeat(np.eye(models, dtype=bool), size, axis=0)
    merges = count - size
    budgets = np.full(models, int(within * merges / models + 1e-9))
    groups, sizes = np.arange(count), np.ones(count)
    best = least.max(axis=1)

    def row_of(group: int) -> np.ndarray:
        shared = members & members[group]
        positive = np.maximum(least[group], 0)
        repeated = shared.any(axis=1) & (least[group] > 0)
        found: np.ndarray = np.where(repeated, positive * decay ** (sizes + sizes[group] - 2), least[group])
        found[(shared & (budgets <= 0)).any(axis=1)] -= FORBIDDEN
        return found

    for _ in range(merges):
        while True:
            first = int(best.argmax())
            row = row_of(first)
            second = int(row.argmax())
            if row[second] == best[first]:
                break
            best[first] = row[second]
        first, second = sorted((first, second))
        budgets -= members[first] & members[second]
        members[first] |= members[second]
        sizes[first] += sizes[second]
        least[first] = least[:, first] = np.minimum(least[first], least[second])
        least[second] = least[:, second] = least[first, first] = -np.inf
        best[first], best[second] = max(best[first], best[second]), -np.inf
        groups[groups == second] = first
    _, numbers = np.unique(groups, return_inverse=True)
    return torch.from_numpy(numbers).reshape(models, size)


def in_order(groups: Int[Tensor, "models units"], reference: int) -> Int[Tensor, "models units"]:
    """Return the groups renumbered: by their first unit of the reference, in the free places where they have none.

    Args:
        groups: as from `zip_units`.
        reference: index of the model whose order is kept.
    """
    size = groups.shape[1]
    place: dict[int, int] = {}
    for unit, group in enumerate(groups[reference].tolist()):
        place.setdefault(group, unit)
    free = iter(sorted(set(range(size)) - set(place.values())))
    for group in range(size):
        if group not in place:
            place[group] = next(free)
    return torch.tensor([place[group] for group in range(size)])[groups]


def zips(groups: Int[Tensor, "models units"]) -> list[Zip]:
    """Return each model's basis change.

    Args:
        groups: the group of each unit of each model.
    """
    sizes = groups.flatten().bincount(minlength=groups.shape[1]).double()
    return [Zip(of_model, (len(groups) / sizes)[of_model]) for of_model in groups]
