"""What the aligners by dense basis changes share: moments, folded BatchNorms, and the restored models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedmerge.align.activations import correlation, match
from fedmerge.basis import BasisChange, Linear, Permutation, Transport, rebase
from fedmerge.features import Moments, moments
from fedmerge.folding import FoldedNorm, Folding, Target, fold, restore
from fedmerge.problem import Problem
from fedmerge.spaces import Axis
from fedmerge.state import StateDict

SMALLEST_SPREAD = 1e-6


@dataclass(frozen=True)
class Comparison:
    """Models compared on the server's images, ready for any dense change; the costly parts are computed once.

    Attributes:
        problem: the server's side.
        states: the models.
        reference: index of the model whose basis is kept.
    """

    problem: Problem
    states: Sequence[StateDict]
    reference: int

    @cached_property
    def folding(self) -> Folding:
        """What can be folded."""
        return Folding(self.problem.model, self.problem.spaces)

    @cached_property
    def moments(self) -> list[list[Moments]]:
        """For each model, the moments of each space, and then those of each observed BatchNorm."""
        observed = (*self.folding.original, *self.folding.sites)
        return moments(self.problem.model, observed, self.states, self.reference, self.problem.learn.images)

    @property
    def diagnostics(self) -> dict[str, Any]:
        """How many spaces changed densely, and the nodes of those that could only be permuted."""
        permuted = [
            space.site.node for space, dense in zip(self.folding.original, self.folding.dense, strict=True) if not dense
        ]
        return {"dense-spaces": len(self.folding.original) - len(permuted), "permuted-spaces": permuted}

    def aligned(self, solve: Callable[[Moments], Linear | Transport]) -> tuple[dict[str, Tensor], ...]:
        """Return the models in the reference's basis.

        Args:
            solve: finds the change of a space that can change densely; others are permuted by their correlation.
        """
        return tuple(
            {name: tensor.clone() for name, tensor in state.items()}
            if index == self.reference
            else self._changed(state, of_model, solve)
            for index, (state, of_model) in enumerate(zip(self.states, self.moments, strict=True))
        )

    def _changed(
        self, state: StateDict, of_model: Sequence[Moments], solve: Callable[[Moments], Linear | Transport]
    ) -> dict[str, Tensor]:
        folding = self.folding
        count = len(folding.original)
        changes: list[BasisChange] = [
            solve(found) if dense else match(correlation(found))
            for found, dense in zip(of_model[:count], folding.dense, strict=True)
        ]
        targets = []
        for (number, norm, axis), found in zip(folding.observed, of_model[count:], strict=True):
            change = changes[number]
            assert not isinstance(change, Permutation)
            variance = change.write(change.write(found.other).T).diagonal()
            targets.append(target(norm, axis, found, change.write(found.other_mean), variance))
        changed = rebase(fold(state, folding.norms), folding.spaces, changes)
        return restore(changed, self.states[self.reference], targets)


def target(norm: FoldedNorm, axis: Axis, found: Moments, mean: Tensor, variance: Tensor) -> Target:
    """Return how units differ from the reference's; a unit that never changes in the reference is taken to be alike.

    Args:
        norm: the BatchNorm.
        axis: where the units are among its channels.
        found: of the BatchNorm's outputs.
        mean: (units,) of the model's in the new basis.
        variance: (units,) of the same.
    """
    scale = found.reference.diagonal().clamp(min=0).sqrt()
    alive = scale > SMALLEST_SPREAD * scale.max()
    spread = torch.where(alive, variance.clamp(min=0).sqrt() / scale, 1.0)
    offset = torch.where(alive, (mean - found.reference_mean) / scale, 0.0)
    return Target(norm, axis, spread, offset)
