"""Layers with weights: linear maps, convolutions, norms, as modules and as functions of `torch.nn.functional`."""

from __future__ import annotations

from torch import Tensor, fx

from fedmerge.rules.arguments import input_of, setting, weights_of
from fedmerge.trace import Trace, varying


def linear(trace: Trace, node: fx.Node) -> Tensor:
    """Y = X Wᵀ + b: W's columns read the units along the last dimension, its rows and b write new ones."""
    names = weights_of(trace, node)
    trace.touch(names["weight"], 1, trace.along(input_of(trace, node), -1), "reader")
    return trace.spread(written(trace, names, trace.shape(node)[-1]), node, -1)


def convolution(trace: Trace, node: fx.Node) -> Tensor:
    """Like `linear` along dimension 1, group by group; a depthwise kernel scales its unit.

    The outputs of a group read its inputs alone, so that units are exchangeable within the inputs and the outputs of
    their group.
    """
    names, groups = weights_of(trace, node), setting(trace, node, "groups", 1)
    channels, outputs = trace.along(input_of(trace, node), 1), trace.shape(node)[1]
    if groups == len(channels) > 1:
        units = channels.repeat_interleave(outputs // groups)
        for name in names.values():
            trace.touch(name, 0, units, "elementwise")
        return trace.spread(units, node, 1)
    units = written(trace, names, outputs)
    if groups == 1:
        trace.touch(names["weight"], 1, channels, "reader")
    else:
        rows = outputs // groups
        for group, read in enumerate(channels.chunk(groups)):
            first = group * rows
            trace.touch(names["weight"], 1, read, "reader", within=(0, first, first + rows))
            trace.mark(units[first : first + rows], (node.name, group))
    return trace.spread(units, node, 1)


def transposed_convolution(trace: Trace, node: fx.Node) -> Tensor:
    """A convolution whose weight has its inputs along dimension 0 and its outputs along dimension 1."""
    names, groups = weights_of(trace, node), setting(trace, node, "groups", 1)
    if groups != 1:
        raise trace.refuse(node, f"it has {groups} groups, expected 1")
    trace.touch(names["weight"], 0, trace.along(input_of(trace, node), 1), "reader")
    units = trace.fresh(trace.shape(node)[1])
    trace.touch(names["weight"], 1, units, "writer")
    if "bias" in names:
        trace.touch(names["bias"], 0, units, "writer")
    return trace.spread(units, node, 1)


def batch_norm(trace: Trace, node: fx.Node) -> Tensor:
    """Scale, shift and running statistics act unit by unit along dimension 1, and so does an instance norm."""
    return _scaled(trace, node, trace.along(input_of(trace, node), 1), 1)


def layer_norm(trace: Trace, node: fx.Node) -> Tensor:
    """The mean and variance are over all units, and so are no one's; scale and shift act unit by unit."""
    source = input_of(trace, node)
    labels = trace.labels(source)
    normalized = setting(trace, node, "normalized_shape")
    first = labels.ndim - (1 if isinstance(normalized, int) else len(normalized))
    inside = [dim for dim in varying(labels) if dim >= first]
    if len(inside) > 1:
        raise trace.refuse(node, f"it normalises over dimensions {inside}, along all of which units lie")
    if not inside:  # positions are normalised, each unit's by themselves
        trace.mark(labels, node.name)
        return labels
    (dim,) = inside
    units = trace.along(source, dim)
    return _scaled(trace, node, units, dim, dim - first)


def group_norm(trace: Trace, node: fx.Node) -> Tensor:
    """Units are exchangeable within their group; scale and shift act unit by unit."""
    units = trace.along(input_of(trace, node), 1)
    for group, part in enumerate(units.chunk(setting(trace, node, "num_groups"))):
        trace.mark(part, (node.name, group))
    return _scaled(trace, node, units, 1)


def parametric_relu(trace: Trace, node: fx.Node) -> Tensor:
    """One slope for all units, or one for each along dimension 1."""
    source = input_of(trace, node)
    labels = trace.labels(source)
    name = weights_of(trace, node)["weight"]
    if trace.tensors[name].numel() == 1:
        trace.mark(labels, node.name)
        return labels
    return _scaled(trace, node, trace.along(source, 1), 1)


def written(trace: Trace, names: dict[str, str], count: int) -> Tensor:
    """Return new units that a layer's weights write along their first dimension."""
    units = trace.fresh(count)
    for name in names.values():
        trace.touch(name, 0, units, "writer")
    return units


def _scaled(trace: Trace, node: fx.Node, units: Tensor, dim: int, weight_dim: int = 0) -> Tensor:
    for name in weights_of(trace, node).values():
        trace.touch(name, weight_dim, units, "elementwise")
    trace.mark(units, node.name)
    return trace.spread(units, node, dim)
