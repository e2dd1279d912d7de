"""Coefficients that sum to 1 and lie within bounds: the nearest to given ones."""

from __future__ import annotations

import torch
from torch import Tensor


def onto_box(points: Tensor, low: float, high: float) -> Tensor:
    """Return the nearest points that sum to 1 over the first dimension, with entries in [low, high].

    They are clip(x_k − τ), and the sum falls piecewise linearly in τ: its piece is found by bisection among the 2K
    values of τ where an entry reaches a bound, and τ in it by interpolation.

    Args:
        points: (models, …).
        low: at most 1/K.
        high: at least 1/K.

    Example:
        >>> onto_box(torch.tensor([1.5, 0.5, -3.0]), 0.0, 1.0)
        tensor([1., 0., 0.])
    """

    def total(shift: Tensor) -> Tensor:
        return (points - shift).clamp(low, high).sum(0, keepdim=True)

    corners = torch.cat([points - high, points - low]).sort(0).values
    left = torch.zeros_like(points[:1], dtype=torch.int64)
    right = torch.full_like(left, len(corners) - 1)
    for _ in range(len(corners).bit_length()):
        middle = (left + right) // 2
        is_before = total(corners.gather(0, middle)) >= 1
        left, right = torch.where(is_before, middle, left), torch.where(is_before, right, middle)
    start, end = corners.gather(0, left), corners.gather(0, right)
    above, below = total(start), total(end)
    falls = above - below
    share = torch.where(falls > 0, (above - 1) / torch.where(falls > 0, falls, 1.0), 0.0).clamp(0, 1)
    return (points - (start + share * (end - start))).clamp(low, high)


def into_box(beta: Tensor, share: Tensor, bounds: tuple[float, float]) -> None:
    """Bring share + β to the nearest coefficients, in place of β.

    Args:
        beta: (models, …); what all models share of it does not count.
        share: broadcastable; it sums to 1.
        bounds: the least and the greatest coefficient.
    """
    beta.copy_(onto_box(share + beta - beta.mean(0), *bounds) - share)
