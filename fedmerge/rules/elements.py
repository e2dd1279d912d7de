"""Operations without weights of their own: element by element, over positions, or over all units alike."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from fedmerge.rules.arguments import argument, input_of
from fedmerge.trace import Trace, fixed, varying

ADDITIONS = frozenset([operator.add, operator.iadd, operator.sub, torch.add, torch.sub, "add", "add_", "sub", "sub_"])


def pointwise(trace: Trace, node: fx.Node) -> Tensor:
    """Each element of the output depends on the elements at its place alone; those of all operands are one unit's.

    An operand that is broadcast along the units meets all of them alike, and makes no difference to them. A parameter
    among the operands writes the units that it is added to, and scales those that it is multiplied with.
    """
    shape = trace.shape(node)
    operands = [item for item in node.all_input_nodes if isinstance(trace.values[item], Tensor)]
    found = [trace.labels(item) for item in operands]
    loose = [trace.is_loose(item) for item in operands]
    if node.target not in ADDITIONS:
        for labels, is_loose in zip(found, loose, strict=True):
            if is_loose:
                trace.scale(labels)
    padded = [labels.reshape([1] * (len(shape) - labels.ndim) + list(labels.shape)) for labels in found]
    decisive = [labels for labels, is_loose in zip(padded, loose, strict=True) if not is_loose or all(loose)]
    dims = sorted({dim for labels in decisive for dim in varying(labels)})
    whole = [all(labels.shape[dim] == shape[dim] for dim in dims) for labels in padded]
    if not any(full and any(labels is item for item in decisive) for labels, full in zip(padded, whole, strict=True)):
        raise trace.refuse(node, f"its operands' units lie along different dimensions, {dims} together")
    result: Tensor | None = None
    for labels, full, is_loose in zip(padded, whole, loose, strict=True):
        if full and (dims or not is_loose or all(loose)):
            spread = labels.expand(shape)
            result = spread if result is None else trace.unify(result, spread)
    assert result is not None
    result = trace.resolved(result)
    trace.mark(result, node.name)
    for index, (labels, full) in enumerate(zip(padded, whole, strict=True)):
        if not full:
            covered = [dim for dim in dims if labels.shape[dim] == shape[dim]]
            if covered:
                trace.mark_each(result, covered, (node.name, index))
            if not loose[index]:
                trace.mark_each(labels, covered, (node.name, index, "broadcast"))
    return result


def unchanged(trace: Trace, node: fx.Node) -> Tensor:
    """The values stay where and what they are."""
    return trace.labels(input_of(trace, node))


def pooling(trace: Trace, node: fx.Node) -> Tensor:
    """Each unit is pooled over positions by itself."""
    units = trace.along(input_of(trace, node), 1)
    trace.mark(units, node.name)
    return trace.spread(units, node, 1)


def reduction(trace: Trace, node: fx.Node) -> Tensor:
    """A mean, sum or variance over positions is the unit's; over units it is no one's, for all count alike."""
    labels = trace.labels(input_of(trace, node))
    dims: Any = argument(trace, node, "dim", ("input", "dim"))
    if dims is None:
        raise trace.refuse(node, "it reduces all dimensions to one number, the examples' included")
    chosen = sorted({dim % labels.ndim for dim in ([dims] if isinstance(dims, int) else dims)})
    over_units = _mark_alike(trace, node, labels, chosen)
    for dim in chosen:
        labels = labels.narrow(dim, 0, 1)
    labels = fixed(labels.shape) if over_units else labels
    return labels.reshape(trace.shape(node))


def normalization(trace: Trace, node: fx.Node) -> Tensor:
    """A softmax, or a division by the norm, over positions or over units."""
    source = input_of(trace, node)
    labels = trace.labels(source)
    order = ("input", "p", "dim") if node.target is torch.nn.functional.normalize else ("input", "dim")
    dim = getattr(trace.module(node), "dim", None) if node.op == "call_module" else argument(trace, node, "dim", order)
    if dim is None and node.target is not torch.nn.functional.normalize:
        raise trace.refuse(node, "it does not say over which dimension")
    _mark_alike(trace, node, labels, [(1 if dim is None else dim) % labels.ndim])
    return labels


def _mark_alike(trace: Trace, node: fx.Node, labels: Tensor, dims: list[int]) -> bool:
    """Mark units that are treated alike with those at other places along `dims`; return whether units lie there."""
    lying = varying(labels)
    over_units = any(dim in lying for dim in dims)
    trace.mark_each(labels, [dim for dim in lying if over_units and dim not in dims], node.name)
    return over_units
