"""The clients' ensemble: the mean of their probabilities. K models at inference; the yardstick of every merge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedmerge.problem import Merged, Problem, Update


@dataclass(frozen=True)
class Ensemble:
    """Keep all models and average their probabilities with equal weights."""

    def __call__(
        self,
        problem: Problem,
        updates: Sequence[Update],
        *,
        generator: torch.Generator,
    ) -> Merged:
        """Return all members."""
        return Merged(tuple({name: tensor.clone() for name, tensor in update.state.items()} for update in updates))
