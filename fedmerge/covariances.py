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


@dataclass(frozen=True)
class Joint:
    """Means and centred second moments of a space's features in several models.

    Samples are examples, or examples × positions for convolutions.

    Attributes:
        count: samples seen.
        means: (units,) of each model.
        variances: (units,) of each model.
        covariances: for pairs p ≤ q of models, of p's units (rows) with q's; for p = q where they were asked for.
    """

    count: int
    means: tuple[Float64[Tensor, " units"], ...]
    variances: tuple[Float64[Tensor, " units"], ...]
    covariances: Mapping[Pair, Float64[Tensor, "units units"]]

    def covariance(self, first: int, second: int) -> Float64[Tensor, "units units"]:
        """Return the covariance of one model's units (rows) with another's (columns)."""
        return self.covariances[first, second] if first <= second else self.covariances[second, first].T

    def between(self, reference: int, other: int) -> Moments:
        """Return the moments of two models that were compared."""
        return Moments(self, (reference, other))


@dataclass(frozen=True)
class Moments:
    """What is known of a space's features in a reference model and in another.

    Attributes:
        joint: of all models.
        models: the reference and the other.
    """

    joint: Joint
    models: Pair

    @property
    def cross(self) -> Float64[Tensor, "units units"]:
        """The covariance of the reference's units (rows) with the other's (columns)."""
        return self.joint.covariance(*self.models)

    @property
    def own(self) -> tuple[Float64[Tensor, "units units"], ...]:
        """The covariances of the reference's units, and of the other's, where they were asked for."""
        return tuple(self.joint.covariance(model, model) for model in self.models)

    @property
    def variances(self) -> tuple[Float64[Tensor, " units"], ...]:
        """The variances of the reference's units, and of the other's."""
        return tuple(self.joint.variances[model] for model in self.models)


class Sums:
    """Running sums of shifted features of several models, where these are: nothing waits for a GPU before the end.

    Features are shifted by their means in the first batch, so that large means cancel nothing.

    Args:
        own: sum the products of a model's own units too; otherwise their squares alone.
    """

    def __init__(self, *, own: bool = True) -> None:
        self.own = own
        self.waiting: set[int] = set()
        self.counts: dict[int, int] = {}
        self.shifts: dict[int, Tensor] = {}
        self.first: dict[int, Tensor] = {}
        self.second: dict[Pair, Tensor] = {}
        self.latest: dict[Pair, tuple[Tensor, int]] = {}

    def add(self, index: int, features: Tensor, others: Mapping[int, Tensor], *, later: bool = False) -> None:
        """Add a model's features to its own sums, and to those with other models.

        Args:
            index: the model's.
            features: (samples, units).
            others: features of the same samples in other models, which were added before, by their index.
            later: whether they will be among the others of a model; if they are the first, they are read then.
        """
        if index not in self.shifts:
            self.shifts[index] = features.mean(0)
        if later and not others:
            self.waiting.add(index)
            return
        new = {index, *others} & {index, *self.waiting}
        self.waiting -= new
        totals = {model: features.new_zeros(2, features.shape[1]) for model in sorted(new)}
        pairs = [(min(index, other), max(index, other)) for other in others]
        pairs += [(model, model) for model in totals if self.own]
        products = {pair: self._latest(pair) for pair in pairs}
        call = native.function(SOURCE, "add", features)
        (partial(_compiled_sums, call) if call else _sums)({**others, index: features}, self.shifts, totals, products)
        for model, total in totals.items():
            self.counts[model] = self.counts.get(model, 0) + len(features)
            self.first[model] = self.first.get(model, 0.0) + total.double()
        for pair in pairs:
            self._count(pair, len(features))

    def joint(self) -> Joint:
        """Return the means, variances and covariances of all that was added."""
        for pair in list(self.latest):
            self._widen(pair)
        (count,) = set(self.counts.values())
        models = sorted(self.first)
        means, squares = ({index: self.first[index][order].cpu() / count for index in models} for order in (0, 1))
        return Joint(
            count,
            tuple(self.shifts[index].cpu() + means[index] for index in models),
            tuple(squares[index] - means[index].square() for index in models),
            {
                (first, second): (_mirrored(total.cpu()) if first == second else total.cpu()) / count
                - torch.outer(means[first], means[second])
                for (first, second), total in self.second.items()
            },
        )

    def _latest(self, pair: Pair) -> Tensor:
        """Return the sums of products that are not yet in float64."""
        if pair not in self.latest:
            shift = self.shifts[pair[0]]
            self.latest[pair] = shift.new_zeros(len(shift), len(shift)), 0
        return self.latest[pair][0]

    def _count(self, pair: Pair, samples: int) -> None:
        product, seen = self.latest[pair]
        self.latest[pair] = product, seen + samples
        if seen + samples >= LATEST:
            self._widen(pair)

    def _widen(self, pair: Pair) -> None:
        product, _ = self.latest.pop(pair)
        if pair in self.second:
            self.second[pair] += product
        else:
            self.second[pair] = product.double()


def _sums(
    features: Mapping[int, Tensor],
    shifts: Mapping[int, Tensor],
    totals: Mapping[int, Tensor],
    products: Mapping[Pair, Tensor],
) -> None:
    """Add shifted features and their squares to `totals`, and products of them to `products`.

    Args:
        features: (samples, units) of each model.
        shifts: what is taken from each.
        totals: (2, units) of some.
        products: (units, units) of pairs p ≤ q, rows are p's; for p = q the upper triangle is asked for.
    """
    one = next(iter(features.values()))
    samples, units = one.shape
    rows, width = (ROWS, TILE) if one.device.type == "cpu" else (samples, units)
    for begin in range(0, samples, rows):
        shifted = {model: part[begin : begin + rows] - shifts[model] for model, part in features.items()}
        for model, total in totals.items():
            total += torch.stack([shifted[model].sum(0), shifted[model].square().sum(0)])
        for (first, second), product in products.items():
            step = width if first == second else units
            for left in range(0, units, step):
                tile = slice(left, left + step)
                product[tile, left:].addmm_(shifted[first][:, tile].T, shifted[second][:, left:])


def _compiled_sums(
    call: Callable[..., Any],
    features: Mapping[int, Tensor],
    shifts: Mapping[int, Tensor],
    totals: Mapping[int, Tensor],
    products: Mapping[Pair, Tensor],
) -> None:
    """Do as `_sums` by the C++'s `add`: samples of two models are read once for all that is wanted of them."""
    rows = {model: part.contiguous() for model, part in features.items()}
    sizes = [ctypes.c_int64(size) for size in (*next(iter(rows.values())).shape, torch.get_num_threads())]
    own = {model: (total, products.get((model, model))) for model, total in totals.items()}
    for pair in [pair for pair in products if pair[0] != pair[1]] or [(model, model) for model in totals]:
        sides = [(shifts[model], rows[model], *own.pop(model, (None, None))) for model in dict.fromkeys(pair)]
        first, second = (*sides, (None,) * 4)[:2]
        cross = None if second[0] is None else products[pair]
        call(*sizes, *map(native.pointer, (*first, *second, cross)))


def _mirrored(upper: Tensor) -> Tensor:
    """Return the symmetric matrix whose upper triangle is given."""
    return upper.triu() + upper.triu(1).T
