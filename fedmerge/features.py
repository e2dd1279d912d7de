"""Statistics of the hidden units of several models, over one streaming pass of data."""

from __future__ import annotations

from collections.abc import Sequence
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


@torch.no_grad()
def moments(
    model: nn.Module, spaces: Sequence[Space], states: Sequence[StateDict], reference: int, images: Tensor
) -> list[list[Moments]]:
    """Compare every model's features with the reference's.

    The reference's features are computed once; features are shifted by the means of the first batch, multiplied in
    their own precision and accumulated in float64, so that large means cancel nothing.

    Args:
        model: the architecture.
        spaces: its feature spaces.
        states: the models' weights.
        reference: index of the model to compare with.
        images: (examples, …), at least one, on the states' device.

    Returns:
        For each model, in order, the moments of each space (for the reference: with itself).
    """
    module = observer(model, spaces)
    names = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    sums = [[_Sums(space) for space in spaces] for _ in states]
    for batch in torch.split(images, BATCH):
        order = [reference, *(index for index in range(len(states)) if index != reference)]
        kept: list[Tensor] = []
        for index in order:
            weights = {name: tensor for name, tensor in states[index].items() if name in names}
            found = functional_call(module, weights, (batch,))
            features = [features_of(value, space, states[index]) for value, space in zip(found, spaces, strict=True)]
            if index == reference:
                kept = features
            for total, ours, theirs in zip(sums[index], kept, features, strict=True):
                total.add(ours, theirs)
    return [[total.moments() for total in of_model] for of_model in sums]


def features_of(value: Tensor, space: Space, state: StateDict) -> Tensor:
    """Return the features of a model with weights `state` as (samples, units), given the value of the space's site."""
    site = space.site
    index = torch.tensor(site.index, device=value.device)
    rows = value.movedim(site.dim, -1).flatten(0, -2)
    if site.weight is None:
        return rows.index_select(1, index)
    bias = None if site.bias is None else state[site.bias][index]
    return linear(rows, state[site.weight][index], bias)


class _Sums:
    """Running sums of shifted features."""

    def __init__(self, space: Space) -> None:
        self.count = 0
        self.shift: tuple[Tensor, Tensor] | None = None
        size = space.size
        self.first = torch.zeros(2, size, dtype=torch.float64)
        self.second = torch.zeros(3, size, size, dtype=torch.float64)

    def add(self, ours: Tensor, theirs: Tensor) -> None:
        if self.shift is None:
            self.shift = ours.mean(0), theirs.mean(0)
        ours, theirs = ours - self.shift[0], theirs - self.shift[1]
        self.count += len(ours)
        self.first += torch.stack([ours.sum(0, dtype=torch.float64), theirs.sum(0, dtype=torch.float64)]).cpu()
        self.second += torch.stack([ours.T @ theirs, ours.T @ ours, theirs.T @ theirs]).cpu()

    def moments(self) -> Moments:
        assert self.shift is not None
        ours, theirs = self.first / self.count
        cross, reference, other = self.second / self.count
        return Moments(
            self.count,
            cross - torch.outer(ours, theirs),
            reference - torch.outer(ours, ours),
            other - torch.outer(theirs, theirs),
            self.shift[0].cpu() + ours,
            self.shift[1].cpu() + theirs,
        )
