"""The best permutation for given similarities of units, and correlations as such similarities."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from fedmerge.basis import Permutation
from fedmerge.covariances import Joint, Moments


def match(scores: Float64[Tensor, "units units"]) -> Permutation:
    """Return the permutation of the columns that maximises the sum of the diagonal.

    Args:
        scores: finite; rows are the reference's units, columns the other model's.

    Example:
        >>> match(torch.tensor([[0.1, 0.9], [0.8, 0.2]])).index
        tensor([1, 0])
    """
    from scipy.optimize import linear_sum_assignment  # half a second that a client has no use for

    _, columns = linear_sum_assignment(scores.numpy(), maximize=True)
    return Permutation(torch.from_numpy(columns))


def matched(scores: Float64[Tensor, "units units"], change: Permutation) -> float:
    """Return the mean score of the units that a permutation of the columns makes one."""
    return float(scores[torch.arange(len(scores)), change.index].mean())


def composed(first: Sequence[Permutation], second: Sequence[Permutation]) -> list[Permutation]:
    """Return the permutations that do what two do, one after the other.

    Args:
        first: one for each space.
        second: those that follow.
    """
    return [Permutation(before.index[after.index]) for before, after in zip(first, second, strict=True)]


def correlation(found: Moments) -> Float64[Tensor, "units units"]:
    """Return the correlations of the reference's units (rows) with the other's; 0 for a unit that never changes."""
    return _normalised(found.cross, *found.variances)


def correlations(joint: Joint) -> list[list[Float64[Tensor, "units units"]]]:
    """Return for models p and q the correlations of p's units (rows) and q's; all pairs must have been compared."""
    models = range(len(joint.means))
    return [
        [_normalised(joint.covariance(p, q), joint.variances[p], joint.variances[q]) for q in models] for p in models
    ]


def _normalised(cross: Tensor, reference: Tensor, other: Tensor) -> Float64[Tensor, "units units"]:
    scales = [variance.clamp(min=0).sqrt() for variance in (reference, other)]
    inverse = [torch.where(scale > 0, 1 / scale, 0.0) for scale in scales]
    return inverse[0][:, None] * cross * inverse[1]
