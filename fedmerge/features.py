"""Statistics of the hidden units of several models, over one streaming pass of data."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from operator import add

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.functional import linear, relu

from fedmerge.covariances import Joint, Moments, Pair, Sums
from fedmerge.rules import RULES
from fedmerge.spaces import Space
from fedmerge.state import StateDict
from fedmerge.trace import RuleTable, traced

BATCH = 128

RECTIFIERS = (nn.ReLU, relu, torch.relu)
MAKERS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear),
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(add, torch.add),
)
"""Modules and functions whose result is a new tensor."""


def observer(model: nn.Module, spaces: Sequence[Space], *, rules: RuleTable | None = None) -> fx.GraphModule:
    """Return the model cut down to what the spaces' sites need; it returns the sites' values.

    A ReLU writes over what was made for it alone: the same values, without another tensor as large.

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
    for node in module.graph.nodes:
        if _is(node, RECTIFIERS, module):
            (made,) = node.all_input_nodes
            if _is(made, MAKERS, module) and len(made.users) == 1:
                node.op, node.target, node.args, node.kwargs = "call_function", torch.relu_, (made,), {}
    return fx.GraphModule(module, module.graph).eval()


def _is(node: fx.Node, kinds: tuple[object, ...], module: nn.Module) -> bool:
    """Whether a node calls one of some functions, or a module of one of some types."""
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))) in kinds
    return node.op == "call_function" and node.target in kinds


def with_reference(count: int, reference: int) -> set[Pair]:
    """Return the pairs of one of `count` models with each other one."""
    return {(min(reference, model), max(reference, model)) for model in range(count) if model != reference}


def joint_size(
    spaces: Sequence[Space], models: int, pairs: int, *, alone: Sequence[Space] = (), own: bool = True
) -> int:
    """Return how many bytes the covariances of `joint_moments` take, where the images are and on the CPU.

    Args:
        spaces: feature spaces in which models are compared.
        models: how many there are.
        pairs: how many pairs of them are compared.
        alone: further spaces, of which only each model's own moments are wanted.
        own: whether each model's own covariances are wanted, and not its variances alone.
    """
    blocks = [(space.size, own * models + pairs) for space in spaces] + [(space.size, models) for space in alone]
    return sum(torch.float64.itemsize * count * size**2 for size, count in blocks)


def moments(
    model: nn.Module,
    spaces: Sequence[Space],
    states: Sequence[StateDict],
    reference: int,
    images: Tensor,
    *,
    own: bool = True,
) -> list[list[Moments]]:
    """Compare every model's features with the reference's.

    Args:
        model: the architecture.
        spaces: its feature spaces.
        states: the models' weights.
        reference: index of the model to compare with.
        images: (examples, …), at least one, on the states' device.
        own: sum each model's own covariances too; permutations need its variances alone, which are half the work.

    Returns:
        For each model, in order, the moments of each space (for the reference: with itself).
    """
    found = joint_moments(model, spaces, states, images, pairs=with_reference(len(states), reference), own=own)
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
    own: bool = True,
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
        own: sum each model's own covariances in `spaces` too, and not its variances alone.

    Returns:
        The moments of each space, first of `spaces`, then of those alone.
    """
    module = observer(model, (*spaces, *alone))
    names = {name for name, _ in (*module.named_parameters(), *module.named_buffers())}
    weights = [{name: tensor for name, tensor in state.items() if name in names} for state in states]
    sums = [*(Sums(own=own) for _ in spaces), *(Sums() for _ in alone)]
    order = sorted(range(len(states)), key=lambda index: -sum(index in pair for pair in pairs))
    for batch in torch.split(images, BATCH):
        kept: dict[int, list[Tensor]] = {}
        for position, index in enumerate(order):
            found = functional_call(module, weights[index], (batch,))
            others = [other for other in kept if (min(index, other), max(index, other)) in pairs]
            kept[index] = []
            awaited = {
                one
                for one in kept
                if any((min(one, other), max(one, other)) in pairs for other in order[position + 1 :])
            }
            for number, (space, total) in enumerate(zip((*spaces, *alone), sums, strict=True)):
                features = features_of(found[number], space, states[index])
                if number < len(spaces):
                    total.add(index, features, {one: kept[one][number] for one in others}, later=index in awaited)
                    kept[index].append(features)
                else:
                    total.add(index, features, {})
            kept = {one: features for one, features in kept.items() if one in awaited}
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
