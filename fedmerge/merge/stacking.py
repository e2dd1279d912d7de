"""The stacker: a small combination of the clients' predictions that is learned on the server's labelled images.

Wolpert: Stacked Generalization, Neural Networks 5(2), 1992. Combining log-probabilities by learned weights is the
logarithmic opinion pool (Heskes: Selecting Weighting Factors in Logarithmic Opinion Pools, NeurIPS 1997). Here it
starts from a pool that needs no label, its prior r(c|x), by the clients' label counts or else the plain mean:

    log s(c|x) = log r(c|x) + Σ_k v_k(c) log p_k(c|x) + b(c) − log Z(x)

The K × C weights v and C biases b minimise Σ_x −log s(y|x) + penalty / 2 × (‖v‖² + ‖b‖²), which is convex. The penalty
is chosen by the protocol, the bare prior among the choices: on validation data the stacker is never worse than it. A
class that the prior excludes stays excluded, and its images teach nothing. `fedmerge.merge.probing` adds
Σ_j u_j(c) h_j(x), of hidden units h_j, with a penalty of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float64, Int
from scipy.optimize import fmin_l_bfgs_b
from torch import Tensor

from fedmerge.problem import Combination

Flat = np.ndarray[tuple[int], np.dtype[np.float64]]

MOST_ITERATIONS = 1000
TOLERANCE = 1e-7
"""Greatest gradient, in nats, at which a fit ends."""
UNITS_TOLERANCE = 1e-3
"""The same, of a fit that sees hidden units: they are many."""


@dataclass(frozen=True, eq=False)
class Stacker:
    """A learned combination of the clients' predictions.

    Attributes:
        prior: where it starts from.
        weights: v, (clients, classes) in float64.
        bias: b, (classes,) in float64.
        of_units: u, (units, classes) in float64; None: it sees no hidden units.
    """

    prior: Combination
    weights: Float64[Tensor, "clients classes"]
    bias: Float64[Tensor, " classes"]
    of_units: Float64[Tensor, "units classes"] | None = None

    def __call__(
        self,
        log_probabilities: Float64[Tensor, "clients examples classes"],
        units: Float64[Tensor, "examples units"] | None = None,
    ) -> Float64[Tensor, "examples classes"]:
        """Return its log-probabilities; -inf for a class that the prior excludes.

        Args:
            log_probabilities: of each client's model, in the clients' order.
            units: hidden units' values, where it sees them.
        """
        weights, bias = self.weights.to(log_probabilities), self.bias.to(log_probabilities)
        scores = self.prior(log_probabilities) + torch.einsum("knc,kc->nc", log_probabilities, weights) + bias
        if self.of_units is not None and units is not None:
            scores = scores + units @ self.of_units.to(units)
        return scores.log_softmax(1)


def stack(
    prior: Combination,
    log_probabilities: Float64[Tensor, "clients examples classes"],
    labels: Int[Tensor, " examples"],
    penalty: float,
    units: Float64[Tensor, "examples units"] | None = None,
    unit_penalty: float = math.inf,
) -> Stacker:
    """Fit the weights and biases by L-BFGS, from 0.

    The units' weights lie in the span of the images' units, and are sought there.

    Args:
        prior: where it starts from, and what the penalty pulls to.
        log_probabilities: of each client's model.
        labels: the true classes.
        penalty: greater than 0; infinite: the clients' opinions and the biases have no weight.
        units: hidden units' values.
        unit_penalty: of the units' weights, greater than 0; infinite: they have none.
    """
    clients, examples, classes = log_probabilities.shape
    base = prior(log_probabilities)
    possible = base.gather(1, labels[:, None])[:, 0].isfinite()
    heard = torch.cat([log_probabilities, torch.ones(1, examples, classes, dtype=torch.float64)])
    heard = heard[:, possible] if penalty < math.inf else heard[:0, possible]
    seen = torch.zeros(examples, 0, dtype=torch.float64) if units is None or unit_penalty == math.inf else units
    seen, base, labels = seen[possible], base[possible], labels[possible]
    span = torch.linalg.qr(seen.T).Q
    seen = seen @ span
    penalties = torch.tensor([penalty] * len(heard) + [unit_penalty] * seen.shape[1], dtype=torch.float64)[:, None]
    truth = torch.nn.functional.one_hot(labels, classes)

    def loss(flat: Flat) -> tuple[float, Flat]:
        values = torch.from_numpy(flat).reshape(-1, classes)
        scores = base + torch.einsum("knc,kc->nc", heard, values[: len(heard)]) + seen @ values[len(heard) :]
        scores = scores.log_softmax(1)
        missed = scores.exp() - truth
        gradient = torch.cat([torch.einsum("knc,nc->kc", heard, missed), seen.T @ missed]) + penalties * values
        value = (penalties * values.square()).sum() / 2 - scores.gather(1, labels[:, None]).sum()
        return float(value), gradient.flatten().numpy()

    found, *_ = fmin_l_bfgs_b(
        loss,
        np.zeros(len(penalties) * classes),
        factr=0.0,
        pgtol=UNITS_TOLERANCE if seen.shape[1] else TOLERANCE,
        maxiter=MOST_ITERATIONS,
    )
    values = torch.from_numpy(found).reshape(-1, classes)
    weights = torch.zeros(clients + 1, classes, dtype=torch.float64)
    weights[: len(heard)] = values[: len(heard)]
    return Stacker(prior, weights[:-1], weights[-1], span @ values[len(heard) :] if seen.shape[1] else None)


def bare(prior: Combination, log_probabilities: Float64[Tensor, "clients examples classes"]) -> Stacker:
    """Return the stacker that has learned nothing, and so is its prior.

    Args:
        prior: what it is.
        log_probabilities: of each client's model; their shape counts.
    """
    clients, _, classes = log_probabilities.shape
    zeros = torch.zeros(clients + 1, classes, dtype=torch.float64)
    return Stacker(prior, zeros[:-1], zeros[-1])


def uninformed(log_probabilities: Float64[Tensor, "clients examples classes"]) -> Float64[Tensor, "examples classes"]:
    """Return the scores of the prior that knows nothing: 0.

    Args:
        log_probabilities: of each client's model; their shape counts.
    """
    return torch.zeros_like(log_probabilities[0])
