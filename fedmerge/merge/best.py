"""The best client's model, as it is: the control that a merge must beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedmerge.problem import Merged, Problem, Update
from fedmerge.train import evaluate


@dataclass(frozen=True)
class BestClient:
    """Keep the client with the lowest loss on the server's data, whatever its architecture."""

    takes_architectures = True

    def __call__(
        self,
        problem: Problem,
        updates: Sequence[Update],
        *,
        generator: torch.Generator,
    ) -> Merged:
        """Choose a client."""
        chosen, losses = best_client(problem, updates)
        state = {name: tensor.clone() for name, tensor in updates[chosen].state.items()}
        diagnostics = {"client": updates[chosen].partition_id, "validation-losses": losses}
        judged = len(problem.validation) if losses else 0
        by_labels = bool(losses) and not problem.blind
        model = updates[chosen].model
        return Merged((state,), judged, by_labels, diagnostics=diagnostics, models=(model,) if model else ())


def best_client(problem: Problem, updates: Sequence[Update]) -> tuple[int, list[float]]:
    """Return the index of the best client, and all clients' validation losses.

    Nothing is fitted here, so below 500 examples all of them judge. Below 50 examples, or where their classes are
    not known, there is no choice: it is the client with the most examples of its own, and there are no losses.

    Args:
        problem: the server's side.
        updates: at least one.
    """
    if not problem.may_choose:
        return max(range(len(updates)), key=lambda index: updates[index].num_examples), []
    losses = [
        evaluate(problem.architecture(update.model), [update.state], problem.validation).loss for update in updates
    ]
    return min(range(len(updates)), key=lambda index: losses[index]), losses
