"""What operations do to units: the rule table of `fedmerge.symmetry`.

A rule gets the trace and a node and returns the labels of the node's output; it tells the trace which weights are
indexed by which units, and marks units that are treated differently from others.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from fedmerge.trace import FIXED, Rule, RuleTable, Trace


def linear(trace: Trace, node: fx.Node) -> Tensor:
    """Y = X Wᵀ + b: W's columns read the units along the last dimension, its rows and b write new ones."""
    module = trace.module(node)
    trace.touch(f"{node.target}.weight", 1, trace.along(_input(node), -1), "reader")
    units = _written(trace, str(node.target), module, trace.shape(node)[-1])
    return trace.spread(units, node, -1)


def convolution(trace: Trace, node: fx.Node) -> Tensor:
    """Like `linear` along dimension 1; a depthwise kernel scales its unit."""
    module = trace.module(node)
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    channels = trace.along(_input(node), 1)
    name = str(node.target)
    if module.groups == 1:
        trace.touch(f"{name}.weight", 1, channels, "reader")
        units = _written(trace, name, module, module.out_channels)
    elif module.groups == module.in_channels:
        units = channels.repeat_interleave(module.out_channels // module.in_channels)
        for part in _parameters(module):
            trace.touch(f"{name}.{part}", 0, units, "elementwise")
    else:
        raise trace.refuse(node, f"it has {module.groups} groups for {module.in_channels} channels")
    return trace.spread(units, node, 1)


def batch_norm(trace: Trace, node: fx.Node) -> Tensor:
    """Scale, shift and running statistics act unit by unit along dimension 1."""
    return _scaled(trace, node, trace.along(_input(node), 1), 1)


def layer_norm(trace: Trace, node: fx.Node) -> Tensor:
    """The mean and variance are over all units, and so is no one's; scale and shift act unit by unit."""
    module = trace.module(node)
    assert isinstance(module, nn.LayerNorm)
    if len(module.normalized_shape) != 1:
        raise trace.refuse(node, f"it normalises over {len(module.normalized_shape)} dimensions, expected the last one")
    return _scaled(trace, node, trace.along(_input(node), -1), -1)


def group_norm(trace: Trace, node: fx.Node) -> Tensor:
    """Units are exchangeable within their group; scale and shift act unit by unit."""
    module = trace.module(node)
    assert isinstance(module, nn.GroupNorm)
    units = trace.along(_input(node), 1)
    for group, part in enumerate(units.chunk(module.num_groups)):
        trace.mark(part, (node.name, group))
    return _scaled(trace, node, units, 1)


def pointwise(trace: Trace, node: fx.Node) -> Tensor:
    """Each element of the output depends on the elements at its place alone; those of all operands are one unit's."""
    shape = trace.shape(node)
    labels: Tensor | None = None
    weights: list[fx.Node] = []
    for argument in node.all_input_nodes:
        if isinstance(trace.values[argument], Tensor):
            if argument.op == "get_attr":
                weights.append(argument)
                continue
            found = trace.labels(argument).expand(shape)
            labels = found if labels is None else trace.unify(labels, found)
    if labels is None:
        labels = torch.full((), FIXED).expand(shape)
    for weight in weights:
        _broadcast_weight(trace, node, weight, labels)
    trace.mark(labels, node.name)
    return labels


def pooling(trace: Trace, node: fx.Node) -> Tensor:
    """Each unit is pooled over positions by itself."""
    units = trace.along(_input(node), 1)
    trace.mark(units, node.name)
    return trace.spread(units, node, 1)


def mean(trace: Trace, node: fx.Node) -> Tensor:
    """A mean or sum over positions."""
    source = _input(node)
    labels = trace.labels(source)
    dims: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    keep = bool(node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False))
    if dims is None:
        raise trace.refuse(node, "it averages over all dimensions, the units' included")
    chosen = sorted({dim % labels.ndim for dim in ([dims] if isinstance(dims, int) else dims)})
    for dim in chosen:
        if labels.shape[dim] > 1 and labels.stride(dim) != 0:
            raise trace.refuse(node, f"it averages over dimension {dim}, along which the units lie")
        labels = labels.narrow(dim, 0, 1)
    trace.mark(labels, node.name)
    return labels if keep else labels.reshape([size for dim, size in enumerate(labels.shape) if dim not in chosen])


def movement(trace: Trace, node: fx.Node) -> Any:
    """The operation moves elements without changing them: it is applied to the labels."""

    def resolve(argument: fx.Node) -> Any:
        value = trace.values[argument]
        return trace.labels(argument) if isinstance(value, Tensor) else _labels_or(trace, argument, value)

    arguments = fx.node.map_arg(node.args, resolve)
    keywords = fx.node.map_arg(node.kwargs, resolve)
    if node.op == "call_module":
        return trace.module(node)(*arguments, **keywords)
    if node.op == "call_method":
        subject, *others = arguments
        method = "reshape" if node.target == "view" else str(node.target)  # labels lie in memory as they like
        return getattr(subject, method)(*others, **keywords)
    assert callable(node.target)
    return node.target(*arguments, **keywords)


def attribute(trace: Trace, node: fx.Node) -> Any:
    """The answer does not hold units: a shape, a size."""
    return None if not isinstance(trace.values[node], Tensor) else movement(trace, node)


def _input(node: fx.Node) -> fx.Node:
    found = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(found, fx.Node)
    return found


def _labels_or(trace: Trace, argument: fx.Node, value: object) -> Any:
    labels = trace.output_labels[argument]
    return labels if isinstance(value, (tuple, list)) and any(isinstance(item, Tensor) for item in value) else value


def _parameters(module: nn.Module) -> Iterable[str]:
    """Return the names of a layer's own parameters and statistics that are indexed by units along dimension 0."""
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return [name for name, tensor in tensors if tensor.ndim > 0]


def _written(trace: Trace, name: str, module: nn.Module, count: int) -> Tensor:
    units = trace.fresh(count)
    for part in _parameters(module):
        trace.touch(f"{name}.{part}", 0, units, "writer")
    return units


def _scaled(trace: Trace, node: fx.Node, units: Tensor, dim: int) -> Tensor:
    for part in _parameters(trace.module(node)):
        trace.touch(f"{node.target}.{part}", 0, units, "elementwise")
    trace.mark(units, node.name)
    return trace.spread(units, node, dim)


def _broadcast_weight(trace: Trace, node: fx.Node, weight: fx.Node, labels: Tensor) -> None:
    """A parameter added to, or multiplied with, units: it writes them like a bias, or scales them."""
    size = trace.shape(weight)
    offset = labels.ndim - len(size)
    varying = [dim for dim in range(labels.ndim) if labels.shape[dim] > 1 and labels.stride(dim) != 0]
    covered = [dim for dim in varying if dim >= offset and size[dim - offset] > 1]
    if not covered:
        return
    if varying != covered or len(covered) != 1:
        raise trace.refuse(node, f"the weight '{weight.target}' of shape {tuple(size)} meets units along {varying}")
    (dim,) = covered
    units = labels
    for other in range(labels.ndim):
        if other != dim:
            units = units.narrow(other, 0, 1)
    role = "writer" if node.target in _ADDITIONS else "elementwise"
    trace.touch(str(weight.target), dim - offset, units.reshape(-1), role)


_ADDITIONS = {operator.add, operator.iadd, torch.add, "add", "add_"}

_POINTWISE_MODULES: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.Identity),
)
_POINTWISE_FUNCTIONS: tuple[Any, ...] = (
    *(operator.add, operator.iadd, operator.sub, operator.mul, operator.imul, operator.truediv, operator.neg),
    *(torch.add, torch.sub, torch.mul, torch.div, torch.relu, torch.sigmoid, torch.tanh, torch.exp, torch.square),
    *(functional.relu, functional.relu6, functional.leaky_relu, functional.elu, functional.selu, functional.gelu),
    *(functional.silu, functional.mish, functional.sigmoid, functional.tanh, functional.hardtanh),
    *(functional.hardswish, functional.hardsigmoid, functional.softplus, functional.dropout, functional.dropout2d),
)
_POINTWISE_METHODS = (
    *("add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "relu", "relu_", "sigmoid", "tanh", "neg"),
    *("contiguous", "clone", "float", "double", "detach", "type_as", "clamp", "square"),
)
_POOLING = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d, nn.Upsample),
    *(functional.max_pool1d, functional.max_pool2d, functional.avg_pool1d, functional.avg_pool2d),
    *(functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_max_pool2d),
    *(functional.interpolate,),
)
_MOVEMENT = (
    *(nn.Flatten, nn.Unflatten, torch.flatten, torch.cat, torch.concat, torch.stack, torch.chunk, torch.split),
    *(torch.permute, torch.transpose, torch.reshape, torch.squeeze, torch.unsqueeze, torch.roll, operator.getitem),
    *("view", "reshape", "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split"),
    *("expand", "roll", "narrow", "select", "t", "swapaxes", "movedim"),
)

RULES: RuleTable = {
    nn.Linear: linear,
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), convolution),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), batch_norm),
    nn.LayerNorm: layer_norm,
    nn.GroupNorm: group_norm,
    **dict.fromkeys([*_POINTWISE_FUNCTIONS, *_POINTWISE_MODULES, *_POINTWISE_METHODS], pointwise),
    **dict.fromkeys(_POOLING, pooling),
    **dict.fromkeys((torch.mean, "mean", "sum", torch.sum), mean),
    **dict.fromkeys(_MOVEMENT, movement),
    **dict.fromkeys(("size", "dim", "numel", getattr), attribute),
}
"""The rules that come with fedmerge, by module class, function and method name."""

__all__ = ["RULES", "Rule", "RuleTable"]
