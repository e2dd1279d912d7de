"""Attention: queries and keys meet in an inner product, values are averaged over positions.

Units of a query are exchangeable within their head, if those of the keys go with them; units of a value within their
head, if the columns of the output projection do. Heads stay where they are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fedmerge.rules.arguments import argument, name_of
from fedmerge.rules.layers import written
from fedmerge.trace import Trace, fixed, spread, varying


def multihead_attention(trace: Trace, node: fx.Node) -> Any:
    """`nn.MultiheadAttention`: three projections of query, key and value, in one matrix or in three."""
    module = trace.module(node)
    assert isinstance(module, nn.MultiheadAttention)
    inputs = [argument(trace, node, name) for name in ("query", "key", "value")]
    _fix(trace, argument(trace, node, "attn_mask"), argument(trace, node, "key_padding_mask"))
    name, size = str(node.target), module.embed_dim
    if f"{name}.in_proj_weight" in trace.tensors:
        projections = [(f"{name}.in_proj_weight", part * size) for part in range(3)]
    else:
        projections = [(f"{name}.{part}_proj_weight", 0) for part in "qkv"]
    bias = f"{name}.in_proj_bias"
    units = _projected(trace, inputs, projections, bias if bias in trace.tensors else None, size)
    for part, found in (("k", units[1]), ("v", units[2])):
        if f"{name}.bias_{part}" in trace.tensors:  # a key and a value that are appended to the others
            trace.touch(f"{name}.bias_{part}", 2, found, "writer")
    _tie_heads(trace, node, units, module.num_heads)
    names = {part: key for part in ("weight", "bias") if (key := f"{name}.out_proj.{part}") in trace.tensors}
    trace.touch(names["weight"], 1, units[2], "reader")
    result, averaged = trace.values[node]
    labels = spread(written(trace, names, size), result.shape, -1)
    return labels, None if averaged is None else fixed(averaged.shape)


def shifted_window_attention(trace: Trace, node: fx.Node) -> Tensor:
    """Swin's: attention within windows, with a bias for each head and pair of positions (Liu et al. 2021)."""
    source, heads = argument(trace, node, "input"), argument(trace, node, "num_heads")
    _fix(trace, argument(trace, node, "relative_position_bias"), argument(trace, node, "logit_scale"))
    size = trace.shape(node)[-1]
    inward, outward = (
        {
            part: name_of(trace, node, found)
            for part in ("weight", "bias")
            if (found := argument(trace, node, f"{projection}_{part}")) is not None
        }
        for projection in ("qkv", "proj")
    )
    projections = [(inward["weight"], part * size) for part in range(3)]
    units = _projected(trace, [source] * 3, projections, inward.get("bias"), size)
    _tie_heads(trace, node, units, heads)
    trace.touch(outward["weight"], 1, units[2], "reader")
    return trace.spread(written(trace, outward, size), node, -1)


def scaled_dot_product_attention(trace: Trace, node: fx.Node) -> Tensor:
    """softmax(Q Kᵀ) V over any number of leading dimensions."""
    query, key, value = (trace.labels(argument(trace, node, name)) for name in ("query", "key", "value"))
    _fix(trace, argument(trace, node, "attn_mask"))
    scores = _contracted(trace, node, query, key.transpose(-2, -1), "scores")
    return _contracted(trace, node, scores, value, "values")


def matrix_product(trace: Trace, node: fx.Node) -> Tensor:
    """X W with a parameter W, or a product of two values that hold units along one of three dimensions."""
    first, second = node.args[:2]
    assert isinstance(first, fx.Node)
    assert isinstance(second, fx.Node)
    if min(len(trace.shape(first)), len(trace.shape(second))) < 2:
        raise trace.refuse(node, "one of its factors is a vector")
    if second.op == "get_attr" and len(trace.shape(second)) == 2:
        trace.touch(str(second.target), 0, trace.along(first, -1), "reader")
        units = trace.fresh(trace.shape(node)[-1])
        trace.touch(str(second.target), 1, units, "writer")
        return trace.spread(units, node, -1)
    return _contracted(trace, node, trace.labels(first), trace.labels(second), "product")


def _projected(
    trace: Trace, inputs: list[fx.Node], projections: list[tuple[str, int]], bias: str | None, size: int
) -> list[Tensor]:
    """Return new units of query, key and value: rows of weights that read the inputs."""
    units = []
    shared = inputs[0] is inputs[1] is inputs[2]
    for part, (source, (weight, start)) in enumerate(zip(inputs, projections, strict=True)):
        read = trace.along(source, -1)
        packed = weight == projections[part - 1][0]
        if not (packed and shared and part):
            within = (0, start, start + size) if packed and not shared else None
            trace.touch(weight, 1, read, "reader", within=within)
        found = trace.fresh(size)
        trace.touch(weight, 0, found, "writer", start=start)
        if bias is not None:
            trace.touch(bias, 0, found, "writer", start=part * size)
        units.append(found)
        trace.show(found, source, weight, bias if start == part * size else None, start)
    return units


def _tie_heads(trace: Trace, node: fx.Node, units: list[Tensor], heads: int) -> None:
    query, key, value = units
    trace.turn(key)
    trace.unify(query, key)
    for name, found in (("query", query), ("value", value)):
        for head, part in enumerate(found.chunk(heads)):
            trace.mark(part, (node.name, name, head))


def _contracted(trace: Trace, node: fx.Node, first: Tensor, second: Tensor, step: str) -> Tensor:
    """Return the labels of the product of (…, i, k) and (…, k, j) values.

    Over units k the product is no one's: both factors' units go together. Over positions k it is the units' of the
    factor that has them along i or j; the other factor meets them all alike.
    """
    batch = np.broadcast_shapes(first.shape[:-2], second.shape[:-2])
    first = trace.resolved(first.expand(*batch, *first.shape[-2:]))
    second = trace.resolved(second.expand(*batch, *second.shape[-2:]))
    leading = list(range(len(batch)))
    rows, columns = len(batch), len(batch) + 1
    shape = torch.Size([*batch, first.shape[-2], second.shape[-1]])
    if columns in varying(first) or rows in varying(second):
        if rows in varying(first) or columns in varying(second):
            raise trace.refuse(node, "units lie along both dimensions of a factor")
        trace.turn(second)
        inner = trace.resolved(trace.unify(first.select(-2, 0), second.select(-1, 0)))
        trace.mark_each(inner, [dim for dim in leading if dim in varying(inner)], (node.name, step))
        return fixed(shape)
    left, right = first[..., :1].expand(shape), second[..., :1, :].expand(shape)
    if bool(left.any()) and bool(right.any()):
        raise trace.refuse(node, "each of its elements belongs to a unit of both factors")
    result = left if bool(left.any()) else right
    trace.mark_each(result, [dim for dim in leading if dim in varying(result)], (node.name, step))
    return result


def _fix(trace: Trace, *arguments: Any) -> None:
    for item in arguments:
        if isinstance(item, fx.Node):
            trace.fix(trace.labels(item))
