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

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int
from scipy.optimize import fmin_l_bfgs_b
from torch import Tensor

from fedmerge.merge.teacher import Teacher

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


def bare(prior: Teacher, log_probabilities: Float64[Tensor, "clients examples classes"]) -> Stacker:
    """Return the stacker that has learned nothing, and so is its prior.

    Args:
        prior: what it is.
        log_probabilities: of each client's model; their shape counts.
    """
    clients, _, classes = log_probabilities.shape
    zeros = torch.zeros(clients + 1, classes, dtype=torch.float64)
    return Stacker(prior, zeros[:-1], zeros[-1])
