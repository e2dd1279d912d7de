"""The clients' ensemble: the mean of their probabilities. K models at inference; the yardstick of every merge.

With the clients' label counts it is the best teacher that there is of them (`fedmerge.merge.teacher`), above all where
its weights are learned on the server's images, unlabelled (`fedmerge.merge.propagation`) or labelled ones
(`fedmerge.merge.stacking`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedmerge.merge.pool import needs_of, pool_of
from fedmerge.merge.teacher import SMOOTHING, TEACHERS, check_smoothing
from fedmerge.problem import Merged, Problem, Update


@dataclass(frozen=True)
class Ensemble:
    """Keep all models and make one prediction of theirs.

    Attributes:
        rule: how, one of `fedmerge.merge.teacher.TEACHERS`; "mean" is the mean of the probabilities.
        smoothing: examples added to each of the clients' label counts, at least 0.
    """

    rule: str = "mean"
    smoothing: float = SMOOTHING
    takes_architectures = True

    def __post_init__(self) -> None:
        if self.rule not in TEACHERS:
            raise ValueError(f"rule must be one of {', '.join(TEACHERS)}, got {self.rule!r}")
        check_smoothing(self.smoothing)

    @property
    def needs(self) -> frozenset[str]:
        """What it cannot do without."""
        return needs_of(self.rule)

    def __call__(
        self,
        problem: Problem,
        updates: Sequence[Update],
        *,
        generator: torch.Generator,
    ) -> Merged:
        """Return all members."""
        states = tuple({name: tensor.clone() for name, tensor in update.state.items()} for update in updates)
        models = tuple(update.model for update in updates) if any(update.model for update in updates) else ()
        if self.rule == "mean":
            return Merged(states, models=models)
        pool = pool_of(self.rule, problem, updates, self.smoothing)
        return Merged(
            states,
            server_examples=pool.server_examples,
            server_labels=pool.server_labels,
            diagnostics=pool.diagnostics,
            combine=pool.combine,
            models=models,
        )
