"""Iterated alignment: each model is matched with the mean of all others, again and again.

Ainsworth, Hayase, Srinivasa: Git Re-Basin, ICLR 2023, arXiv 2209.04836, algorithm 3 (MergeMany). One after the other,
in random order, the models are matched with the mean of the others as they are then, until a whole pass changes
nothing. What differs: the models begin matched with the reference, and end in its order of units. The order of the
clients matters, through the random order; `fedmerge.align.universe` is the matching in which it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from fedmerge.align.matching import composed
from fedmerge.basis import Permutation, rebase
from fedmerge.merge.average import mean_state
from fedmerge.spaces import Space
from fedmerge.state import StateDict

Matching = Callable[[StateDict, StateDict], Sequence[Permutation]]
"""Finds the permutations of a model's spaces, given the mean of the others and the model."""


def matched_with_mean(
    states: Sequence[StateDict],
    reference: int,
    spaces: Sequence[Space],
    matching: Matching,
    *,
    passes: int,
    generator: torch.Generator,
    kept: Callable[[StateDict], StateDict] = lambda state: state,
) -> tuple[list[list[Permutation]], int]:
    """Match each model with the mean of the others until nothing changes.

    Args:
        states: the models, matched with the reference.
        reference: index of the model whose order of units is kept.
        spaces: the feature spaces.
        matching: finds a model's permutations.
        passes: most passes over the models.
        generator: decides the order of the models in each pass.
        kept: holds a renamed model, which is read again (`Problem.kept`).

    Returns:
        For each model the permutations of its spaces, which leave the reference as it is, and the passes that changed
        something.
    """
    current = list(states)
    found = [[Permutation(torch.arange(space.size)) for space in spaces] for _ in states]
    for done in range(passes):
        changed = False
        for model in torch.randperm(len(states), generator=generator).tolist():
            others = mean_state([state for index, state in enumerate(current) if index != model])
            changes = matching(others, current[model])
            if all(torch.equal(change.index, torch.arange(change.size)) for change in changes):
                continue
            changed = True
            current[model] = kept(rebase(current[model], spaces, changes))
            found[model] = composed(found[model], changes)
        if not changed:
            return _back(found, reference), done
    return _back(found, reference), passes


def _back(found: Sequence[Sequence[Permutation]], reference: int) -> list[list[Permutation]]:
    """Return the permutations followed by those that give the reference its order back."""
    back = [Permutation(change.index.argsort()) for change in found[reference]]
    return [composed(changes, back) for changes in found]
