"""The stacker: a small combination of the clients' predictions that is learned on the server's labelled images.

Wolpert: Stacked Generalization, Neural Networks 5(2), 1992. Combining log-probabilities by learned weights is the
logarithmic opinion pool (Heskes: Selecting Weighting Factors in Logarithmic Opinion Pools, NeurIPS 1997). Here it
starts from a pool that needs no label, its prior r(c|x), by the clients' label counts or else the plain mean:

    log s(c|x) = log r(c|x) + Σ_k v_k(c) log p_k(c|x) + b(c) − log Z(x)

The K × C weights v and C biases b minimise Σ_x −log s(y|x) + penalty / 2 × (‖v‖² + ‖b‖²), which is convex. The penalty
is chosen by the protocol, the bare prior among the choices: on validation data the stacker is never worse than it. A
class that the prior excludes stays excluded, and its images teach nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int
from scipy.optimize import fmin_l_bfgs_b
from torch import Tensor

from fedmerge.merge.teacher import STACKED, Teacher, teacher_of
from fedmerge.problem import LABEL_COUNTS, LABELS, Combination, Problem, Update
from fedmerge.settings import ConfigurationError
from fedmerge.train import LEAST_LOG_PROBABILITY, log_probabilities

PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0)
"""Penalties to choose from, for log-probabilities in nats and losses summed over the images."""

Flat = np.ndarray[tuple[int], np.dtype[np.float64]]

MOST_ITERATIONS = 1000
TOLERANCE = 1e-7
"""Greatest gradient, in nats, at which a fit ends."""


@dataclass(frozen=True, eq=False)
class Stacker:
    """A learned combination of the clients' predictions.

    Attributes:
        prior: where it starts from.
        weights: v, (clients, classes) in float64.
        bias: b, (classes,) in float64.
    """

    prior: Teacher
    weights: Float64[Tensor, "clients classes"]
    bias: Float64[Tensor, " classes"]

    def __call__(
        self, log_probabilities: Float64[Tensor, "clients examples classes"]
    ) -> Float64[Tensor, "examples classes"]:
        """Return its log-probabilities; -inf for a class that the prior excludes.

        Args:
            log_probabilities: of each client's model, in the clients' order.
        """
        weights, bias = self.weights.to(log_probabilities), self.bias.to(log_probabilities)
        learned = torch.einsum("knc,kc->nc", log_probabilities, weights) + bias
        return (self.prior(log_probabilities) + learned).log_softmax(1)


@dataclass(frozen=True)
class Pool:
    """How the clients' predictions become one, and what that was learned from.

    Attributes:
        combine: the combination.
        server_labels: how many labelled images of the server had a part in it.
        diagnostics: in JSON's types.
    """

    combine: Combination
    server_labels: int = 0
    diagnostics: Mapping[str, Any] = field(default_factory=dict)


def pool_of(rule: str, problem: Problem, updates: Sequence[Update], smoothing: float) -> Pool:
    """Return the combination of these clients' predictions, learned where the rule wants that.

    Args:
        rule: one of `fedmerge.merge.teacher.TEACHERS`.
        problem: the server's side, not taught.
        updates: at least one.
        smoothing: examples added to each label count.

    Raises:
        ConfigurationError: if no class is known, and the rule learns from them.
    """
    if rule != STACKED:
        return Pool(teacher_of(rule, updates, smoothing))
    if not len(problem.labelled):
        raise ConfigurationError(
            "the teacher 'stacked' needs classes of the server's images, and none is known (--server-labels): use one "
            "that needs none (teacher=counts-geometric, teacher=mean)"
        )
    counted = all(update.label_counts and sum(update.label_counts) for update in updates)
    prior = teacher_of("counts-geometric" if counted else "mean", updates, smoothing)
    part = problem.restricted(problem.labelled)
    said = log_probabilities(part.model, [update.state for update in updates], part.data.images).cpu()
    labels = part.data.labels.cpu()
    if not part.may_choose:
        return Pool(_bare(prior, said), diagnostics={"prior": prior.rule, "penalty": None})
    return _chosen(part, prior, said, labels)


def needs_of(rule: str) -> frozenset[str]:
    """Return what a teacher cannot do without.

    Args:
        rule: one of `fedmerge.merge.teacher.TEACHERS`.
    """
    return frozenset({STACKED: [LABELS], "mean": []}.get(rule, [LABEL_COUNTS]))


def stack(
    prior: Teacher,
    log_probabilities: Float64[Tensor, "clients examples classes"],
    labels: Int[Tensor, " examples"],
    penalty: float,
) -> Stacker:
    """Fit the weights and biases by L-BFGS, from 0.

    Args:
        prior: where it starts from, and what the penalty pulls to.
        log_probabilities: of each client's model.
        labels: the true classes.
        penalty: greater than 0.
    """
    clients, _, classes = log_probabilities.shape
    base = prior(log_probabilities)
    possible = base.gather(1, labels[:, None])[:, 0].isfinite()
    features, base, labels = log_probabilities[:, possible], base[possible], labels[possible]
    features = torch.cat([features, torch.ones(1, *features.shape[1:], dtype=torch.float64)])
    truth = torch.nn.functional.one_hot(labels, classes)

    def loss(flat: Flat) -> tuple[float, Flat]:
        values = torch.from_numpy(flat).reshape(clients + 1, classes)
        scores = (base + torch.einsum("knc,kc->nc", features, values)).log_softmax(1)
        missed = scores.exp() - truth
        gradient = torch.einsum("knc,nc->kc", features, missed) + penalty * values
        value = penalty / 2 * values.square().sum() - scores.gather(1, labels[:, None]).sum()
        return float(value), gradient.flatten().numpy()

    start = np.zeros((clients + 1) * classes)
    found, *_ = fmin_l_bfgs_b(loss, start, factr=0.0, pgtol=TOLERANCE, maxiter=MOST_ITERATIONS)
    values = torch.from_numpy(found).reshape(clients + 1, classes)
    return Stacker(prior, values[:-1], values[-1])


def _bare(prior: Teacher, log_probabilities: Tensor) -> Stacker:
    clients, _, classes = log_probabilities.shape
    zeros = torch.zeros(clients + 1, classes, dtype=torch.float64)
    return Stacker(prior, zeros[:-1], zeros[-1])


def _chosen(part: Problem, prior: Teacher, said: Tensor, labels: Tensor) -> Pool:
    """Choose the penalty on the labelled images' validation parts, and fit again where the protocol refits."""
    losses = {"none": 0.0} | {f"{penalty:g}": 0.0 for penalty in PENALTIES}
    fitted: dict[str, Stacker] = {}
    for learn, validation in part.splits:
        fitted = {"none": _bare(prior, said)}
        fitted |= {f"{penalty:g}": stack(prior, said[:, learn], labels[learn], penalty) for penalty in PENALTIES}
        for name, stacker in fitted.items():
            found = stacker(said[:, validation]).clamp(min=LEAST_LOG_PROBABILITY)
            losses[name] += -float(found.gather(1, labels[validation, None]).mean()) / len(part.splits)
    best = min(losses, key=lambda name: losses[name])
    chosen = stack(prior, said, labels, float(best)) if part.refits and best != "none" else fitted[best]
    penalty = None if best == "none" else float(best)
    diagnostics = {"prior": prior.rule, "penalty": penalty, "validation-losses": losses}
    return Pool(chosen, len(labels), diagnostics)
