"""Teachers without labels: what the clients' ensemble says of an image, weighted by what each client has seen.

With n_k(c) examples of class c at client k, w_k(c) ∝ n_k(c) + smoothing is the client's say in class c. A client that
has never seen a class is sure that it is another one, and a plain ensemble believes it; label counts, ten numbers a
client, are the remedy. The rules, before normalisation over the classes:

- `mean`: log Σ_k p_k(c|x) / K. The plain ensemble, FedDF's teacher (Lin, Kong, Stich, Jaggi: Ensemble Distillation for
  Robust Model Fusion in Federated Learning, NeurIPS 2020, arXiv 2006.07242). It needs no counts.
- `counts`: log Σ_k w_k(c) p_k(c|x).
- `counts-geometric`: Σ_k w_k(c) log p_k(c|x).
- `prior`: Σ_k w_k(c) log q_k(c|x), q_k(c|x) ∝ p_k(c|x) / prior_k(c): the client's opinion, had it seen its classes
  equally often.

A class that no client has seen has probability 0. A client that has seen one class alone gives it probability 1 on
every image, and so says nothing of any: its opinion is replaced by what is known without looking, the classes' shares
at all clients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from fedmerge.problem import Update
from fedmerge.settings import ConfigurationError

RULES = ("mean", "counts", "counts-geometric", "prior")
STACKED = "stacked"
"""The teacher that is learned on labelled images of the server's (`fedmerge.merge.stacking`)."""
PROPAGATED = "propagated"
"""The teacher that is learned on unlabelled images of the server's (`fedmerge.merge.propagation`)."""
TEACHERS = (*RULES, PROPAGATED, STACKED)
SMOOTHING = 1.0
"""Examples added to every count: a client that has not seen a class keeps a little say in it."""


@dataclass(frozen=True)
class Teacher:
    """A rule that makes one prediction of the clients'.

    Attributes:
        rule: one of `RULES`.
        label_counts: for each client, its examples of each class; not used by `mean`.
        smoothing: examples added to each count, at least 0.
    """

    rule: str
    label_counts: tuple[tuple[int, ...], ...] = ()
    smoothing: float = SMOOTHING

    def __call__(
        self, log_probabilities: Float64[Tensor, "clients examples classes"]
    ) -> Float64[Tensor, "examples classes"]:
        """Return the teacher's log-probabilities; -inf for a class that no client has seen.

        Args:
            log_probabilities: of each client's model, in the clients' order.

        Raises:
            ConfigurationError: if the label counts are of another number of classes.

        Example:
            >>> sure = torch.tensor([[[0.9, 0.1]], [[0.2, 0.8]]], dtype=torch.float64).log()
            >>> Teacher("counts", ((5, 0), (0, 5)), smoothing=0)(sure.expand(2, 1, 2)).exp()  # one class each: no idea
            tensor([[0.5000, 0.5000]], dtype=torch.float64)
        """
        if self.rule == "mean":
            return log_probabilities.logsumexp(0) - math.log(len(log_probabilities))
        counts = torch.tensor(self.label_counts, dtype=torch.float64, device=log_probabilities.device)
        if counts.shape != (len(log_probabilities), log_probabilities.shape[2]):
            raise ConfigurationError(
                f"expected label counts of {len(log_probabilities)} clients and {log_probabilities.shape[2]} classes, "
                f"got {' × '.join(map(str, counts.shape))}"
            )
        opinions = _balanced(log_probabilities, counts, self.smoothing) if self.rule == "prior" else log_probabilities
        says = class_weights(counts, self.smoothing)[:, None, :]
        unseen = counts.sum(0) == 0
        shares = (counts.sum(0) / counts.sum()).log()
        knows_one = (counts > 0).sum(1) == 1
        opinions = torch.where(knows_one[:, None, None], shares.masked_fill(unseen, 0.0), opinions)
        scores = (opinions + says.log()).logsumexp(0) if self.rule == "counts" else (says * opinions).sum(0)
        return scores.masked_fill(unseen, -math.inf).log_softmax(1)


def class_weights(counts: Float[Tensor, "clients classes"], smoothing: float) -> Float[Tensor, "clients classes"]:
    """Return each client's say in each class, w_k(c) ∝ n_k(c) + smoothing, which sums to 1 over the clients.

    In a class that no client has seen, all have the same.

    Args:
        counts: n_k(c).
        smoothing: at least 0.

    Example:
        >>> class_weights(torch.tensor([[3.0, 0.0], [1.0, 0.0]]), 0.0)
        tensor([[0.7500, 0.5000],
                [0.2500, 0.5000]])
    """
    smoothed = torch.where(counts.sum(0) == 0, torch.ones_like(counts), counts + smoothing)
    return smoothed / smoothed.sum(0)


def teacher_of(rule: str, updates: Sequence[Update], smoothing: float) -> Teacher:
    """Return the teacher that these clients make.

    Args:
        rule: one of `RULES`.
        updates: at least one.
        smoothing: examples added to each count.

    Raises:
        ConfigurationError: if the rule needs label counts that a client keeps to itself.
    """
    return Teacher(rule, () if rule == "mean" else known_counts(updates, f"the teacher '{rule}'"), smoothing)


def known_counts(updates: Sequence[Update], what: str) -> tuple[tuple[int, ...], ...]:
    """Return the clients' label counts.

    Args:
        updates: at least one.
        what: what needs them, for the error.

    Raises:
        ConfigurationError: if a client keeps them to itself.
    """
    secret = [update.partition_id for update in updates if not update.label_counts or not sum(update.label_counts)]
    if secret:
        raise ConfigurationError(
            f"{what} needs every client's label counts, and {len(secret)} of {len(updates)} clients keep theirs to "
            f"themselves (the first is client {secret[0]}): switch them on (--label-counts), or use what needs none "
            "(teacher=mean, or the plain mean or ensemble)"
        )
    return tuple(update.label_counts for update in updates if update.label_counts)


def check_smoothing(smoothing: float) -> None:
    """Raise unless a number of examples can be added to label counts.

    Raises:
        ValueError: says what was expected.
    """
    if not 0 <= smoothing < math.inf:
        raise ValueError(f"smoothing must be a number of examples, at least 0, got {smoothing}")


def _balanced(opinions: Tensor, counts: Tensor, smoothing: float) -> Tensor:
    """Return log p_k(c|x) - log prior_k(c), normalised; a class that a client has not seen stays as it is."""
    smoothed = counts + smoothing
    prior = (smoothed / smoothed.sum(1, keepdim=True)).log()
    corrected = opinions - torch.where(counts > 0, prior, 0.0)[:, None, :]
    return corrected.log_softmax(2)
