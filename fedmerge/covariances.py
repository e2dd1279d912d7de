"""Means and covariances of several models' features, summed as the features come."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor

from fedmerge import native
from fedmerge.covariancesource import SOURCE

LATEST = 1 << 13
"""Samples whose products are summed in their own precision, at least, before they are added in float64."""
ROWS = 1 << 11
"""Samples that PyTorch shifts and multiplies at once on CPUs, so that they stay in the cache; on GPUs all at once."""
TILE = 128
"""Units whose products PyTorch takes at once on CPUs: below the diagonal, a model's own are not taken."""

Pair = tuple[int, int]


@dataclass
class Moments:
    """Means and centred second moments of a space's features in a reference model and in another.

    Samples are examples, or examples × positions for convolutions.

    Attributes:
        count: samples seen.
        cross: (units, units) covariance of the reference's units (rows) with the other's (columns).
        reference: (units, units) covariance of the reference's units.
        other: (units, units) covariance of the other's units.
        reference_mean: (units,) mean of the reference's units.
        other_mean: (units,) mean of the other's units.
    """

    count: int
    cross: Float64[Tensor, "units units"]
    reference: Float64[Tensor, "units units"]
    other: Float64[Tensor, "units units"]
    reference_mean: Float64[Tensor, " units"]
    other_mean: Float64[Tensor, " units"]


@dataclass(frozen=True)
class Joint:
    """Means and centred second moments of a space's features in several models.

    Attributes:
        count: samples seen, as in `Moments`.
        means: (units,) of each model.
        covariances: for pairs p ≤ q of models, of p's units (rows) with q's; at least for all p = q.
    """

    count: int
    means: tuple[Float64[Tensor, " units"], ...]
    covariances: Mapping[Pair, Float64[Tensor, "units units"]]

    def covariance(self, first: int, second: int) -> Float64[Tensor, "units units"]:
        """Return the covariance of one model's units (rows) with another's (columns)."""
        return self.covariances[first, second] if first <= second else self.covariances[second, first].T

    def between(self, reference: int, other: int) -> Moments:
        """Return the moments of two models that were compared."""
        return Moments(
            self.count,
            self.covariance(reference, other),
            self.covariance(reference, reference),
            self.covariance(other, other),
            self.means[reference],
            self.means[other],
        )


class Sums:
    """Running sums of shifted features of several models, where these are: nothing waits for a GPU before the end.

    Features are shifted by their means in the first batch, so that large means cancel nothing.
    """

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.shifts: dict[int, Tensor] = {}
        self.first: dict[int, Tensor] = {}
        self.second: dict[Pair, Tensor] = {}
        self.latest: dict[Pair, tuple[Tensor, int]] = {}

    def add(self, index: int, features: Tensor, others: Mapping[int, Tensor]) -> None:
        """Add a model's features to its own sums, and to those with other models.

        Args:
            index: the model's.
            features: (samples, units).
            others: features of the same samples in other models, which were added before, by their index.
        """
        if index not in self.shifts:
            self.shifts[index] = features.mean(0)
        total, product = torch.zeros_like(self.shifts[index]), self._latest(index, index)
        compared = {other: self._latest(min(index, other), max(index, other)) for other in others}
        call = native.function(SOURCE, "add", features)
        summed = partial(_compiled_sums, call) if call else _sums
        summed(index, {**others, index: features}, self.shifts, total, product, compared)
        self.counts[index] = self.counts.get(index, 0) + len(features)
        self.first[index] = self.first.get(index, 0.0) + total.double()
        for other in (index, *others):
            self._count(min(index, other), max(index, other), len(features))

    def joint(self) -> Joint:
        """Return the means and covariances of all that was added."""
        for pair in list(self.latest):
            self._widen(pair)
        (count,) = set(self.counts.values())
        means = {index: total.cpu() / count for index, total in self.first.items()}
        return Joint(
            count,
            tuple(self.shifts[index].cpu() + means[index] for index in sorted(means)),
            {
                (first, second): (_mirrored(total.cpu()) if first == second else total.cpu()) / count
                - torch.outer(means[first], means[second])
                for (first, second), total in self.second.items()
            },
        )

    def _latest(self, first: int, second: int) -> Tensor:
        """Return the sums of products that are not yet in float64."""
        if (first, second) not in self.latest:
            shift = self.shifts[first]
            self.latest[first, second] = shift.new_zeros(len(shift), len(shift)), 0
        return self.latest[first, second][0]

    def _count(self, first: int, second: int, samples: int) -> None:
        product, seen = self.latest[first, second]
        self.latest[first, second] = product, seen + samples
        if seen + samples >= LATEST:
            self._widen((first, second))

    def _widen(self, pair: Pair) -> None:
        product, _ = self.latest.pop(pair)
        if pair in self.second:
            self.second[pair] += product
        else:
            self.second[pair] = product.double()


def _sums(
    index: int,
    features: Mapping[int, Tensor],
    shifts: Mapping[int, Tensor],
    total: Tensor,
    product: Tensor,
    compared: Mapping[int, Tensor],
) -> None:
    """Add a model's shifted features to `total`, their products to `product`'s upper triangle and those with others.

    Args:
        index: the model's.
        features: (samples, units) of it and of the others.
        shifts: what is taken from each.
        total: (units,).
        product: (units, units).
        compared: (units, units) for each other model; rows are of the smaller index.
    """
    samples, units = features[index].shape
    rows, width = (ROWS, TILE) if total.device.type == "cpu" else (samples, units)
    for begin in range(0, samples, rows):
        shifted = {one: part[begin : begin + rows] - shifts[one] for one, part in features.items()}
        own = shifted[index]
        total += own.sum(0)
        for left in range(0, units, width):
            tile = slice(left, left + width)
            product[tile, left:].addmm_(own[:, tile].T, own[:, left:])
        for other, cross in compared.items():
            cross.addmm_(shifted[min(index, other)].T, shifted[max(index, other)])


def _compiled_sums(
    call: Callable[..., Any],
    index: int,
    features: Mapping[int, Tensor],
    shifts: Mapping[int, Tensor],
    total: Tensor,
    product: Tensor,
    compared: Mapping[int, Tensor],
) -> None:
    """Do as `_sums` by the C++'s `add`: samples are read once for the model's own products and those with one other."""
    rows = {one: part.contiguous() for one, part in features.items()}
    sizes = [ctypes.c_int64(size) for size in (*features[index].shape, torch.get_num_threads())]
    own: tuple[Tensor | None, Tensor | None] = total, product
    for other, cross in compared.items() or [(None, None)]:
        of_other = (None, None) if other is None else (shifts[other], rows[other])
        given = (*of_other, shifts[index], rows[index], *own, cross)
        call(*sizes, ctypes.c_int64(other is not None and index < other), *map(native.pointer, given))
        own = None, None


def _mirrored(upper: Tensor) -> Tensor:
    """Return the symmetric matrix whose upper triangle is given."""
    return upper.triu() + upper.triu(1).T
