"""Models compared on the server's images, once for all that wants to know: what the aligners share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from fedmerge.align.choice import Candidates, choose
from fedmerge.align.matching import correlation, match
from fedmerge.basis import BasisChange, Permutation, Zip, rebase
from fedmerge.covariances import Joint, Moments
from fedmerge.features import joint_moments, joint_size, with_reference
from fedmerge.folding import FoldedNorm, Folding, Target, fold, restore
from fedmerge.memory import CPU, require
from fedmerge.problem import Aligned, Problem
from fedmerge.spaces import Axis
from fedmerge.state import StateDict

SMALLEST_SPREAD = 1e-6
ADVICE = (
    "compare fewer models, merge on a larger machine, or match by weights (--align weights), which compares no units' "
    "values; of all pairs of models, as zipit and universe compare, there are many more than of each with one"
)


@dataclass(frozen=True)
class Comparison:
    """Models compared on the server's images; what is costly is computed once, when it is first asked for.

    Attributes:
        problem: the server's side.
        states: the models.
        reference: index of the model whose order of units is kept.
        every_pair: compare all pairs of models, not only those with the reference.
        folded: observe the BatchNorms too that can be folded, for changes that are not permutations.
        own: sum each model's own covariances too; matching with the reference needs its variances alone.
    """

    problem: Problem
    states: Sequence[StateDict]
    reference: int
    every_pair: bool = False
    folded: bool = False
    own: bool = True

    @cached_property
    def folding(self) -> Folding:
        """What can be folded."""
        return Folding(self.problem.model, self.problem.spaces)

    @cached_property
    def joint(self) -> list[Joint]:
        """The moments of each space, and then those of each observed BatchNorm (`Folding.observed`).

        Raises:
            TooLarge: if there is not as much memory, which grows with the models.
        """
        count = len(self.states)
        pairs = set(combinations(range(count), 2)) if self.every_pair else with_reference(count, self.reference)
        alone = self.folding.sites if self.folded else ()
        size = joint_size(self.problem.spaces, count, len(pairs), alone=alone, own=self.own)
        purpose = f"comparing {count} models' units, {len(pairs)} pairs of models,"
        for device in {CPU, self.problem.learn.images.device}:
            require(size, purpose, ADVICE, device)
        return joint_moments(
            self.problem.model,
            self.problem.spaces,
            self.states,
            self.problem.learn.images,
            pairs=pairs,
            alone=alone,
            own=self.own,
        )

    def moments(self, model: int) -> list[Moments]:
        """Return the moments of each space in the reference and in another model."""
        return [found.between(self.reference, model) for found in self.joint[: len(self.problem.spaces)]]

    @cached_property
    def matches(self) -> list[list[Permutation]]:
        """For each model, the permutations of its spaces that correlate most with the reference; its own keep order."""
        return [
            [Permutation(torch.arange(space.size)) for space in self.problem.spaces]
            if model == self.reference
            else [match(correlation(found)) for found in self.moments(model)]
            for model in range(len(self.states))
        ]

    @property
    def diagnostics(self) -> dict[str, Any]:
        """How many spaces can change densely, and the nodes of those that can only be permuted."""
        permuted = [
            space.site.node for space, dense in zip(self.folding.original, self.folding.dense, strict=True) if not dense
        ]
        return {"dense-spaces": len(self.folding.original) - len(permuted), "permuted-spaces": permuted}

    def permuted(self, changes: Sequence[Sequence[Permutation]]) -> tuple[dict[str, Tensor], ...]:
        """Return the models with their units renamed; the reference as it is.

        Args:
            changes: for each model, of each space.
        """
        return tuple(
            self._kept(
                {name: tensor.clone() for name, tensor in state.items()}
                if model == self.reference
                else rebase(state, self.problem.spaces, of_model)
            )
            for model, (state, of_model) in enumerate(zip(self.states, changes, strict=True))
        )

    def solved(self, solve: Callable[[Moments, Permutation], BasisChange]) -> Aligned:
        """Return the models in the reference's basis.

        Args:
            solve: finds the change of a space that can change densely, given the permutation by correlation too, which
                others take.
        """
        return Aligned(
            tuple(
                self._kept({name: tensor.clone() for name, tensor in state.items()})
                if model == self.reference
                else self.changed(
                    model,
                    [
                        solve(found, permutation) if dense else permutation
                        for found, dense, permutation in zip(
                            self.moments(model), self.folding.dense, self.matches[model], strict=True
                        )
                    ],
                )
                for model, state in enumerate(self.states)
            )
        )

    def changed(self, model: int, changes: Sequence[BasisChange]) -> dict[str, Tensor]:
        """Return a model after any changes of its spaces, BatchNorms folded before and restored after.

        Args:
            model: its index.
            changes: of each space; one that cannot change densely takes a permutation alone.
        """
        targets = []
        for (number, norm, axis), found in zip(
            self.folding.observed, self.joint[len(self.problem.spaces) :], strict=True
        ):
            spread = deviation(changes[number], found.covariance(model, model))
            of_reference = found.means[self.reference], found.variances[self.reference]
            wanted = changes[number].write(found.means[model]), spread.square()
            targets.append(target(norm, axis, of_reference, wanted))
        changed = rebase(fold(self.states[model], self.folding.norms), self.folding.spaces, changes)
        return self._kept(restore(changed, self.states[self.reference], targets))

    def _kept(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return dict(self.problem.kept(state))


def aligned_by_choice(comparison: Comparison, candidates: Callable[[Comparison], Candidates]) -> Aligned:
    """Return the alignment of the best of an aligner's settings.

    Args:
        comparison: of the models on the whole problem.
        candidates: given the comparison on a part of it, an alignment for each setting, the default first.
    """
    diagnostics = comparison.diagnostics  # derives the spaces, once for all folds
    found = choose(comparison.problem, lambda part: candidates(replace(comparison, problem=part)))
    return replace(
        found.aligned,
        server_examples=len(comparison.problem.data if found.losses else comparison.problem.learn),
        server_labels=bool(found.losses),
        diagnostics={**found.diagnostics, **diagnostics},
    )


def deviation(change: BasisChange, covariance: Tensor) -> Tensor:
    """Return the standard deviation that units should have after a merge: of the mixed unit, or the group's mean.

    Args:
        change: of the units' basis.
        covariance: (units, units) of the model's units.
    """
    if isinstance(change, Zip):
        return change.write(covariance.diagonal().clamp(min=0).sqrt())
    return change.write(change.write(covariance).T).diagonal().clamp(min=0).sqrt()


def target(norm: FoldedNorm, axis: Axis, reference: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> Target:
    """Return how units should differ from the reference's; one that never changes there is taken to be alike.

    Args:
        norm: the BatchNorm.
        axis: where the units are among its channels.
        reference: (units,) means and variances of the BatchNorm's outputs in the reference.
        wanted: (units,) the same, of the model in the new basis.
    """
    scale = reference[1].clamp(min=0).sqrt()
    alive = scale > SMALLEST_SPREAD * scale.max()
    spread = torch.where(alive, wanted[1].clamp(min=0).sqrt() / scale, 1.0)
    offset = torch.where(alive, (wanted[0] - reference[0]) / scale, 0.0)
    return Target(norm, axis, spread, offset)
