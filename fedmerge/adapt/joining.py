"""Fewer units: which of a model's units become one, and what is written and read then.

Joining two units i and j to one is the best approximation of both by one m = w_i u_i + w_j u_j, each read as s times m,
in the least squares of what their readers see. With the energies p = a_i E u_i², r = a_j E u_j² (a: squared norm of a
unit's readers) and q = √(a_i a_j) E u_i u_j, it costs the smaller eigenvalue of [[p, q], [q, r]], and the greater one's
eigenvector gives w. Equal units cost nothing. Units that have nothing in common cost the lesser one's energy, which is
pruning; nor is more asked of units that oppose each other, as no unit can be the difference of two rectified ones. The
two that cost least are joined, then the next two units or groups, until enough are left.

After ZipIt's merges within a model (Stoica, Bolya, Bjorner, Ramesh, Hearn, Hoffman: ZipIt! Merging Models from
Different Tasks without Training, ICLR 2024, arXiv 2305.03053), which join the units that correlate most to their mean.
What differs: units are weighed by what is made of them, so that one that does nothing is lost first; readers are scaled
to the unit that they get; moments are not centred, so that a unit's mean needs no bias to make up for it.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from fedmerge.basis import Resize


def join(second: Float64[Tensor, "units units"], importance: Float64[Tensor, " units"], size: int) -> Resize:
    """Return how to join the units to `size` of them, in the order of each group's first unit.

    Args:
        second: E u_i u_j, second moments of the units.
        importance: a ≥ 0, the squared norm of each unit's readers.
        size: units to be left, from 1 to all.

    Example:
        >>> features = torch.tensor([[1.0, 2.0, 1.0], [3.0, 0.5, 3.0]], dtype=torch.float64)
        >>> join(features.T @ features, torch.ones(3, dtype=torch.float64), 2).writing
        tensor([[0.5000, 0.0000],
                [0.0000, 1.0000],
                [0.5000, 0.0000]], dtype=torch.float64)
    """
    moments, weight = second.numpy().copy(), importance.numpy().copy()
    count = len(moments)
    writing, reading = np.eye(count), np.eye(count)
    costs = np.full((count, count), np.inf)
    for unit in range(count):
        costs[unit, unit + 1 :] = _costs(moments, weight, unit)[unit + 1 :]
    left = np.ones(count, dtype=bool)
    for _ in range(count - size):
        first, other = np.unravel_index(int(costs.argmin()), costs.shape)
        shares, scales = _joined(moments[np.ix_((first, other), (first, other))], weight[[first, other]])
        writing[:, first] = writing[:, [first, other]] @ shares
        reading[:, first] = reading[:, [first, other]] @ scales
        weight[first] = scales**2 @ weight[[first, other]]
        moments[first] = shares @ moments[[first, other]]
        moments[:, first] = moments[:, [first, other]] @ shares
        left[other] = False
        costs[other] = costs[:, other] = np.inf
        found = np.where(left, _costs(moments, weight, int(first)), np.inf)
        costs[first, first + 1 :], costs[:first, first] = found[first + 1 :], found[:first]
    return Resize(torch.from_numpy(writing[:, left]), torch.from_numpy(reading[:, left]))


def _costs(moments: np.ndarray, weight: np.ndarray, unit: int) -> np.ndarray:
    """Return what joining a unit with each other one would cost."""
    theirs = weight * moments.diagonal()
    own = theirs[unit]
    both = np.sqrt(weight[unit] * weight) * np.maximum(moments[unit], 0)
    middle, half = (own + theirs) / 2, (own - theirs) / 2
    greater = middle + np.hypot(half, both)
    found: np.ndarray = np.maximum(own * theirs - both**2, 0) / np.where(greater > 0, greater, 1)
    return found


def _joined(moments: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the shares of two units in the one that they become, and the scales at which theirs read it."""
    root = np.sqrt(weight)
    vectors = np.linalg.eigh(np.maximum(moments, 0) * np.outer(root, root))[1]
    shares = np.abs(vectors[:, -1]) * root
    total = shares.sum()
    alive = total > 0 and float(np.trace(moments)) > 0
    shares = shares / total if alive else np.full(2, 0.5)
    energy = float(shares @ moments @ shares)
    return shares, (moments @ shares / energy if energy > 0 else np.ones(2))
