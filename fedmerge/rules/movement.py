"""Operations that move elements without changing them are applied to the labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from fedmerge.labels import tensors_of
from fedmerge.rules.arguments import argument, input_of
from fedmerge.trace import Trace, fixed, spread, varying


def movement(trace: Trace, node: fx.Node) -> Any:
    """Apply the operation to the labels as it is; whole numbers among its operands say where to."""

    def resolve(item: fx.Node) -> Any:
        value = trace.values[item]
        if isinstance(value, Tensor):
            return trace.labels(item) if value.is_floating_point() else value
        labels = trace.output_labels.get(item)
        return labels if any(True for _ in tensors_of(labels)) else value

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


def concatenation(trace: Trace, node: fx.Node) -> Tensor:
    """A movement; a parameter that is put beside units, as a class token is, becomes theirs."""
    parts: Any = node.args[0] if node.args else node.kwargs["tensors"]
    dim: Any = argument(trace, node, "dim", ("tensors", "dim")) or 0
    found = [trace.labels(part) for part in parts]
    dim %= found[0].ndim
    model = next(
        (
            labels.narrow(dim, 0, 1)
            for part, labels in zip(parts, found, strict=True)
            if not trace.is_loose(part) and dim not in varying(labels)
        ),
        None,
    )
    if model is not None:
        for part, labels in zip(parts, found, strict=True):
            if trace.is_loose(part):
                trace.unify(labels, model.expand(labels.shape))
    for other in range(found[0].ndim):  # the rest is repetition
        if other != dim and all(labels.stride(other) == 0 for labels in found):
            found = [labels.narrow(other, 0, 1) for labels in found]
    return torch.cat(found, dim).expand(trace.shape(node))


def padding(trace: Trace, node: fx.Node) -> Tensor:
    """Positions that are padded are their unit's; units that are padded are constants, all alike."""
    source = input_of(trace, node)
    labels = trace.labels(source)
    amounts: Any = trace.module(node).padding if node.op == "call_module" else argument(trace, node, "pad")
    if isinstance(amounts, int):
        amounts = [amounts] * 2 * (labels.ndim - 2)
    amounts = [trace.values[amount] if isinstance(amount, fx.Node) else amount for amount in amounts]
    lying = varying(labels)
    shape = trace.shape(node)
    for index in range(0, len(amounts), 2):
        dim = labels.ndim - 1 - index // 2
        before, after = amounts[index : index + 2]
        if dim not in lying:
            labels = labels.narrow(dim, 0, 1).expand([*labels.shape[:dim], shape[dim], *labels.shape[dim + 1 :]])
        elif before or after:
            if node.op == "call_module" or argument(trace, node, "mode") not in (None, "constant"):
                raise trace.refuse(node, f"it pads along dimension {dim}, along which the units lie")
            labels = _padded(trace, node, labels, dim, before, after)
    return labels


def side_by_side(trace: Trace, node: fx.Node) -> Tensor:
    """Four neighbouring positions become one, their units beside each other along the last dimension (Swin)."""
    units = trace.along(input_of(trace, node), -1)
    return trace.spread(units.repeat(4), node, -1)


def attribute(trace: Trace, node: fx.Node) -> Any:
    """The answer does not hold units: a shape, a size."""
    return None if not isinstance(trace.values[node], Tensor) else movement(trace, node)


def _padded(trace: Trace, node: fx.Node, labels: Tensor, dim: int, before: int, after: int) -> Tensor:
    if min(before, after) < 0:
        return functional.pad(labels, [0, 0] * (labels.ndim - 1 - dim) + [before, after])
    others = [other for other in varying(labels) if other != dim]
    constants = trace.fresh(before + after, loose=True)
    trace.mark(constants, (node.name, dim))
    blocks = []
    for part in (constants[:before], constants[before:]):
        shape = torch.Size([*labels.shape[:dim], len(part), *labels.shape[dim + 1 :]])
        blocks.append(fixed(shape) if others else spread(part, shape, dim))
    return torch.cat([blocks[0], labels, blocks[1]], dim)
