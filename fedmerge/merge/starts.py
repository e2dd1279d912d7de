"""Where a mixture starts: the coefficients of the models before anything is learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedmerge.merge.average import mean_state
from fedmerge.merge.best import best_client
from fedmerge.merge.box import onto_box
from fedmerge.merge.heads import find_head, head_rows
from fedmerge.merge.teacher import class_weights, known_counts
from fedmerge.problem import Problem, Update
from fedmerge.settings import ConfigurationError
from fedmerge.state import StateDict

STARTS = ("auto", "mean", "examples", "counts", "best")


@dataclass(frozen=True)
class Start:
    """The models' shares in a mixture.

    Attributes:
        body: (models,) not negative; they are normalised.
        rows: (models, classes) shares in the head's rows, which sum to 1 over the models; None: as in the body.
        head: names of the head's parameters, where `rows` is given.
    """

    body: Tensor
    rows: Tensor | None = None
    head: tuple[str, ...] = ()

    def state(self, states: Sequence[StateDict]) -> dict[str, Tensor]:
        """Return the mixture of the models, a fresh state dict."""
        mixed = mean_state(states, self.body.tolist())
        return mixed if self.rows is None else mixed | head_rows(states, self.head, self.rows)

    def shares(self, parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a_k by parameter name: (models, …), broadcastable to the parameters.

        Args:
            parameters: of any one model, by name.
        """
        found = {}
        for name, tensor in parameters.items():
            of_rows = self.rows is not None and name in self.head
            share = self.rows if of_rows and self.rows is not None else self.body / self.body.sum()
            found[name] = share.to(tensor).reshape(*share.shape, *[1] * (tensor.ndim + 1 - share.ndim))
        return found

    def within(self, low: float, high: float) -> Start:
        """Return the nearest start whose shares lie within bounds.

        Args:
            low: at most 1/K.
            high: at least 1/K.

        Raises:
            ValueError: if no shares that sum to 1 do.
        """
        count = len(self.body)
        if not low <= 1 / count <= high:
            raise ValueError(f"the bounds of a box must hold 1/{count} for {count} models, got low={low}, high={high}")
        body = self.body / self.body.sum()
        if float(body.min()) < low or float(body.max()) > high:
            body = onto_box(body, low, high)
        return replace(self, body=body, rows=None if self.rows is None else onto_box(self.rows, low, high))


def starting(name: str, problem: Problem, updates: Sequence[Update], *, best_share: float, smoothing: float) -> Start:
    """Return a start by name.

    Args:
        name: one of `STARTS`; "auto" is "counts" where every client tells its label counts and the model has a head,
            otherwise "mean".
        problem: the server's side.
        updates: the clients', at least two.
        best_share: of the best client, where that is the start; the rest is the others' alike.
        smoothing: examples added to each label count.

    Raises:
        ConfigurationError: if the start needs label counts that are not known, or a head that is not there.
    """
    if name == "auto":
        try:
            return starting("counts", problem, updates, best_share=best_share, smoothing=smoothing)
        except ConfigurationError:
            name = "mean"
    if name == "mean":
        return Start(torch.ones(len(updates), dtype=torch.float64))
    if name == "best":
        chosen, _ = best_client(problem, updates)
        body = torch.full((len(updates),), (1 - best_share) / (len(updates) - 1), dtype=torch.float64)
        body[chosen] = best_share
        return Start(body)
    body = torch.tensor([update.num_examples for update in updates], dtype=torch.float64)
    if name == "examples":
        return Start(body)
    counts = torch.tensor(known_counts(updates, "a start by label counts"), dtype=torch.float64)
    head = find_head(problem.model, updates[0].state, problem.data.images.shape[1:])
    return Start(body, class_weights(counts, smoothing), head)
