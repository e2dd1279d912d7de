"""Weight matching: units with similar weights are the same unit; no data is needed.

Ainsworth, Hayase, Srinivasa: Git Re-Basin, ICLR 2023, arXiv 2209.04836, algorithm 1. The permutations maximise the
inner product of the reference's weights with the other's, one space after the other in random order, each a linear
assignment, until nothing changes.

What differs: the spaces come from tracing the model. Biases and the norms' scales and shifts count too; running
statistics do not (a variance is on no scale with weights), but they are permuted along. A step is taken only if it
raises the objective, so a tensor that one space both writes and reads cannot make it run in circles. The ascent ends
in one of many local maxima; `start="activations"` begins it at the permutations of activation matching, and ends in a
better one. With `passes`, each model is then matched with the mean of the others (algorithm 3,
`fedmerge.align.running_mean`): the inner products of all pairs of models, summed, never fall.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedmerge.align.comparison import Comparison
from fedmerge.align.matching import composed, match
from fedmerge.align.running_mean import matched_with_mean
from fedmerge.basis import Permutation, put_units_first, units_first
from fedmerge.problem import Aligned, Problem
from fedmerge.seeds import fork
from fedmerge.spaces import Space
from fedmerge.state import StateDict

STARTS = ("none", "activations")


@dataclass(frozen=True)
class Weights:
    """Permute the units by the similarity of their weights.

    Attributes:
        start: where to begin: "none" (the models as they came) or "activations" (matched on the server's images).
        rounds: most times that all spaces are gone over, to match one model.
        passes: most passes in which each model is matched with the mean of the others, after all with the reference.
    """

    start: str = "none"
    rounds: int = 100
    passes: int = 0

    def __post_init__(self) -> None:
        if self.start not in STARTS:
            raise ValueError(f"start must be one of {', '.join(STARTS)}, got {self.start!r}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if self.passes < 0:
            raise ValueError(f"passes must be at least 0, got {self.passes}")

    def __call__(
        self, problem: Problem, states: Sequence[StateDict], reference: int, *, generator: torch.Generator
    ) -> Aligned:
        """Align all models to `states[reference]` by their weights."""
        return self.aligned(Comparison(problem, states, reference, own=False), generator=generator)

    def aligned(self, comparison: Comparison, *, generator: torch.Generator) -> Aligned:
        """Align models that are compared already, or need not be.

        Args:
            comparison: of the models; it looks at images only for `start="activations"`.
            generator: decides the order of the spaces, and of the models in a pass.
        """
        problem, reference = comparison.problem, comparison.reference
        seed = fork(generator)
        server_examples = 0
        states = comparison.states
        changes = [[Permutation(torch.arange(space.size)) for space in problem.spaces] for _ in states]
        if self.start == "activations":
            changes, server_examples = list(comparison.matches), len(problem.learn)
            states = comparison.permuted(changes)
        fixed = _parameters(problem, states[reference])
        similarities = []
        for index, state in enumerate(states):
            if index == reference:
                continue
            stream = torch.Generator().manual_seed(seed)
            moving = _parameters(problem, state)
            found, similarity = match_weights(fixed, moving, problem.spaces, rounds=self.rounds, generator=stream)
            changes[index] = composed(changes[index], found)
            similarities.append(round(similarity, 6))
        del states  # copies of the models, where they were matched before
        diagnostics: dict[str, Any] = {"cosine-similarities": similarities}
        if self.passes and len(changes) > 1:
            further, diagnostics["passes"] = matched_with_mean(
                comparison.permuted(changes),
                reference,
                problem.spaces,
                lambda mean, state: match_weights(
                    _parameters(problem, mean),
                    _parameters(problem, state),
                    problem.spaces,
                    rounds=self.rounds,
                    generator=generator,
                )[0],
                passes=self.passes,
                generator=generator,
                kept=problem.kept,
            )
            changes = list(map(composed, changes, further))
        return Aligned(comparison.permuted(changes), server_examples, diagnostics=diagnostics, changes=tuple(changes))


def match_weights(
    fixed: Mapping[str, Tensor],
    moving: Mapping[str, Tensor],
    spaces: Sequence[Space],
    *,
    rounds: int,
    generator: torch.Generator,
) -> tuple[list[Permutation], float]:
    """Return the permutations that bring one model's weights nearest to another's, by coordinate ascent.

    Args:
        fixed: the reference's parameters by name, on the CPU; products are taken in float64.
        moving: the other model's.
        spaces: the feature spaces.
        rounds: most passes over all spaces.
        generator: decides the order of the spaces in each pass.

    Returns:
        A permutation for each space, and the cosine similarity of all parameters that spaces touch.
    """
    of_spaces = {axis.name for space in spaces for axis in space.axes}
    current = {name: tensor for name, tensor in moving.items() if name in of_spaces}  # renamed ones are fresh
    indices = [torch.arange(space.size) for space in spaces]
    for _ in range(rounds):
        changed = False
        for number in torch.randperm(len(spaces), generator=generator).tolist():
            space = spaces[number]
            change = match(_scores(fixed, current, space))
            trial = _renamed(current, space, change)
            before, after = (_product(fixed, weights, trial) for weights in (current, trial))
            if after > before + 1e-12 * abs(before):
                current |= trial
                indices[number] = indices[number][change.index]
                changed = True
        if not changed:
            break
    lengths = [_product(weights, weights, current) ** 0.5 for weights in (fixed, current)]
    similarity = _product(fixed, current, current) / (lengths[0] * lengths[1]) if all(lengths) else 0.0
    return [Permutation(index) for index in indices], similarity


def _parameters(problem: Problem, state: StateDict) -> dict[str, Tensor]:
    return {name: state[name].cpu() for name, _ in problem.model.named_parameters()}


def _scores(fixed: Mapping[str, Tensor], current: Mapping[str, Tensor], space: Space) -> Tensor:
    """Return the inner products of the weights of each unit of the reference (rows) and of the other."""
    total = torch.zeros(space.size, space.size, dtype=torch.float64)
    for axis in space.axes:
        if axis.name in current:
            ours, theirs = (
                units_first(weights[axis.name], axis, space.size).flatten(1) for weights in (fixed, current)
            )
            total += ours.double() @ theirs.double().T
    return total


def _renamed(weights: Mapping[str, Tensor], space: Space, change: Permutation) -> dict[str, Tensor]:
    """Return the tensors that a space touches, renamed."""
    axes = [axis for axis in space.axes if axis.name in weights]
    result = {axis.name: weights[axis.name].clone() for axis in axes}
    for axis in axes:
        renamed = change.write(units_first(result[axis.name], axis, space.size))
        put_units_first(result[axis.name], axis, space.size, renamed)
    return result


def _product(first: Mapping[str, Tensor], second: Mapping[str, Tensor], names: Mapping[str, Tensor]) -> float:
    return sum(float((first[name].double() * second[name]).sum()) for name in names)
