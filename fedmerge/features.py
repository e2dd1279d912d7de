"""Statistics of the hidden units of several models, over one streaming pass of data."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.functional import linear

from fedmerge.covariances import Joint, Moments, Pair, Sums
from fedmerge.rules import RULES
from fedmerge.spaces import Space
from fedmerge.state import StateDict
from fedmerge.trace import RuleTable, traced

BATCH = 128


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
    sums = [Sums() for _ in (*spaces, *alone)]
    order = sorted(range(len(states)), key=lambda index: -sum(index in pair for pair in pairs))
    for batch in torch.split(images, BATCH):
        kept: dict[int, list[Tensor]] = {}
        for position, index in enumerate(order):
            found = functional_call(module, weights[index], (batch,))
            others = [other for other in kept if (min(index, other), max(index, other)) in pairs]
            kept[index] = []
            for number, (space, total) in enumerate(zip((*spaces, *alone), sums, strict=True)):
                features = features_of(found[number], space, states[index])
                compared = number < len(spaces)
                total.add(index, features, {other: kept[other][number] for other in others} if compared else {})
                if compared:
                    kept[index].append(features)
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
