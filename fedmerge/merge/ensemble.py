"""The clients' ensemble: the mean of their probabilities. K models at inference; the yardstick of every merge.

With the clients' label counts it is the best teacher that there is of them (`fedmerge.merge.teacher`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedmerge.merge.teacher import RULES, SMOOTHING, check_smoothing, teacher_of
from fedmerge.problem import Merged, Problem, Update


@dataclass(frozen=True)
class Ensemble:
    """Keep all models and make one prediction of theirs.

    Attributes:
        rule: how, one of `fedmerge.merge.teacher.RULES`; "mean" is the mean of the probabilities.
        smoothing: examples added to each of the clients' label counts, at least 0.
    """

    rule: str = "mean"
    smoothing: float = SMOOTHING

    def __post_init__(self) -> None:
        if self.rule not in RULES:
            raise ValueError(f"rule must be one of {', '.join(RULES)}, got {self.rule!r}")
        check_smoothing(self.smoothing)

    def __call__(
        self,
        problem: Problem,
        updates: Sequence[Update],
        *,
        generator: torch.Generator,
    ) -> Merged:
        """Return all members."""
        combine = None if self.rule == "mean" else teacher_of(self.rule, updates, self.smoothing)
        states = tuple({name: tensor.clone() for name, tensor in update.state.items()} for update in updates)
        return Merged(states, combine=combine)
