"""Statistics of the hidden units of several models, over one streaming pass of data."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.functional import linear

from fedmerge.rules import RULES
from fedmerge.spaces import Space
from fedmerge.state import StateDict
from fedmerge.trace import RuleTable, traced

BATCH = 128
ROWS = 1 << 11
"""Samples that CPUs shift and multiply at once: they stay in the cache. GPUs take a batch's, in few launches."""
LATEST = 1 << 13
"""Samples whose products are summed in their own precision, at least, before they are added in float64."""
TILE = 128
"""Units whose products CPUs take at once: below the diagonal, a model's own are not taken, since they are symmetric."""

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


def observer(model: nn.Module, spaces: Sequence[Space], *, rules: RuleTable | None = None) -> fx.GraphModule:
    """Return the model cut down to what the spaces' sites need; it returns the sites' values.

    Args:
        model: the architecture.
        spaces: its feature spaces.
        rules: the table that the spaces were derived with.
    """
    module = traced(model, RULES if rules is None else rules)
    nodes = {node.name: node for node in module.graph.nodes}
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    output.args = (tuple(nodes[space.site.node] for space in spaces),)
    module.graph.eliminate_dead_code()
    return fx.GraphModule(module, module.graph).eval()


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


def with_reference(count: int, reference: int) -> set[Pair]:
    """Return the pairs of one of `count` models with each other one."""
    return {(min(reference, model), max(reference, model)) for model in range(count) if model != reference}


def joint_size(spaces: Sequence[Space], models: int, pairs: int, alone: Sequence[Space] = ()) -> int:
    """Return how many bytes the covariances of `joint_moments` take, where the images are and on the CPU.

    Args:
        spaces: feature spaces in which models are compared.
        models: how many there are.
        pairs: how many pairs of them are compared.
        alone: further spaces, of which only each model's own moments are wanted.
    """
    blocks = [(space.size, models + pairs) for space in spaces] + [(space.size, models) for space in alone]
    return sum(torch.float64.itemsize * count * size**2 for size, count in blocks)


def moments(
    model: nn.Module, spaces: Sequence[Space], states: Sequence[StateDict], reference: int, images: Tensor
) -> list[list[Moments]]:
    """Compare every model's features with the reference's.

    Args:
        model: the architecture.
        spaces: its feature spaces.
        states: the models' weights.
        reference: index of the model to compare with.
        images: (examples, …), at least one, on the states' device.

    Returns:
        For each model, in order, the moments of each space (for the reference: with itself).
    """
    found = joint_moments(model, spaces, states, images, pairs=with_reference(len(states), reference))
    return [[joint.between(reference, index) for joint in found] for index in range(len(states))]


@torch.no_grad()
def joint_moments(
    model: nn.Module,
    spaces: Sequence[Space],
    states: Sequence[StateDict],
    images: Tensor,
    *,
    pairs: Collection[Pair],
    alone: Sequence[Space] = (),
) -> list[Joint]:
    """Observe several models' features in one pass over the images.

    Each model runs once. Features are shifted by the means of the first batch, multiplied in their own precision and
    accumulated in float64, so that large means cancel nothing. Of a batch, the features of those models are kept that
    are yet to be compared: with a reference, two models'; in all pairs, all.

    Args:
        model: the architecture.
        spaces: feature spaces in which models are compared.
        states: the models' weights.
        images: (examples, …), at least one, on the states' device.
        pairs: (p, q), p < q, of the models to compare.
        alone: further spaces, of which only each model's own moments are wanted.

    Returns:
        The moments of each space, first of `spaces`, then of those alone.
    """
    module = observer(model, (*spaces, *alone))
    names = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    weights = [{name: tensor for name, tensor in state.items() if name in names} for state in states]
    sums = [_Sums() for _ in (*spaces, *alone)]
    order = sorted(range(len(states)), key=lambda index: -sum(index in pair for pair in pairs))
    for batch in torch.split(images, BATCH):
        kept: dict[int, list[Tensor]] = {}
        for position, index in enumerate(order):
            found = functional_call(module, weights[index], (batch,))
            for number, (space, total) in enumerate(zip((*spaces, *alone), sums, strict=True)):
                features = features_of(found[number], space, states[index])
                total.add(index, features)
                if number < len(spaces):
                    kept.setdefault(index, []).append(features)
            for first, second in sorted(pairs):
                if index in (first, second) and first in kept and second in kept:
                    for total, ours, theirs in zip(sums, kept[first], kept[second], strict=False):
                        total.compare(first, second, ours, theirs)
            later = order[position + 1 :]
            kept = {
                one: features
                for one, features in kept.items()
                if any((min(one, other), max(one, other)) in pairs for other in later)
            }
    return [total.joint() for total in sums]


def features_of(value: Tensor, space: Space, state: StateDict) -> Tensor:
    """Return the features of a model with weights `state` as (samples, units), given the value of the space's site."""
    site = space.site
    rows = value.movedim(site.dim, -1).flatten(0, -2)
    if site.weight is None and site.index == tuple(range(rows.shape[1])):
        return rows  # no index is sent to a GPU, which would have to be waited for
    index = torch.tensor(site.index, device=value.device)
    if site.weight is None:
        return rows.index_select(1, index)
    bias = None if site.bias is None else state[site.bias][index]
    return linear(rows, state[site.weight][index], bias)


class _Sums:
    """Running sums of shifted features of several models, where these are: nothing waits for a GPU before the end."""

    def __init__(self) -> None:
        self.counts: dict[int, int] = {}
        self.shifts: dict[int, Tensor] = {}
        self.first: dict[int, Tensor] = {}
        self.second: dict[Pair, Tensor] = {}
        self.latest: dict[Pair, tuple[Tensor, int]] = {}

    def add(self, index: int, features: Tensor) -> None:
        """Add a model's features to its own sums."""
        if index not in self.shifts:
            self.shifts[index] = features.mean(0)
        shift = self.shifts[index]
        total, (product, seen) = torch.zeros_like(shift), self._latest(index, index)
        rows, width = _block(features)
        for part in torch.split(features, rows):
            shifted = part - shift
            total += shifted.sum(0)
            for left in range(0, len(shift), width):
                tile = slice(left, left + width)
                product[tile, left:].addmm_(shifted[:, tile].T, shifted[:, left:])
        self.counts[index] = self.counts.get(index, 0) + len(features)
        self.first[index] = self.first.get(index, 0.0) + total.double()
        self._keep(index, index, product, seen + len(features))

    def compare(self, first: int, second: int, ours: Tensor, theirs: Tensor) -> None:
        """Add the products of two models' shifted features."""
        product, seen = self._latest(first, second)
        rows, _ = _block(ours)
        for one, other in zip(torch.split(ours, rows), torch.split(theirs, rows), strict=True):
            product.addmm_((one - self.shifts[first]).T, other - self.shifts[second])
        self._keep(first, second, product, seen + len(ours))

    def _latest(self, first: int, second: int) -> tuple[Tensor, int]:
        """Return the sums of products that are not yet in float64, and of how many samples they are."""
        if (first, second) not in self.latest:
            shift = self.shifts[first]
            self.latest[first, second] = shift.new_zeros(len(shift), len(shift)), 0
        return self.latest[first, second]

    def _keep(self, first: int, second: int, product: Tensor, seen: int) -> None:
        self.latest[first, second] = product, seen
        if seen >= LATEST:
            self._add(first, second)

    def _add(self, first: int, second: int) -> None:
        product, _ = self.latest.pop((first, second))
        if (first, second) in self.second:
            self.second[first, second] += product
        else:
            self.second[first, second] = product.double()

    def joint(self) -> Joint:
        for pair in list(self.latest):
            self._add(*pair)
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


def _block(features: Tensor) -> tuple[int, int]:
    """Return how many samples, and units, are multiplied at once."""
    samples, units = features.shape
    return (ROWS, TILE) if features.device.type == "cpu" else (samples, units)


def _mirrored(upper: Tensor) -> Tensor:
    """Return the symmetric matrix whose upper triangle is given."""
    return upper.triu() + upper.triu(1).T
