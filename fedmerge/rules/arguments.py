"""What a node was called with: its arguments by name, and the state dict's names of the weights that it uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from fedmerge.graph import qualified_name
from fedmerge.trace import Trace

TENSORS = ("weight", "bias", "running_mean", "running_var")

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_SIGNATURES: dict[Any, tuple[str, ...]] = {
    functional.linear: ("input", "weight", "bias"),
    **dict.fromkeys((functional.conv1d, functional.conv2d, functional.conv3d), _CONVOLUTION),
    functional.batch_norm: ("input", "running_mean", "running_var", "weight", "bias"),
    functional.instance_norm: ("input", "running_mean", "running_var", "weight", "bias"),
    torch.batch_norm: ("input", "weight", "bias", "running_mean", "running_var"),
    functional.layer_norm: ("input", "normalized_shape", "weight", "bias"),
    torch.layer_norm: ("input", "normalized_shape", "weight", "bias"),
    functional.rms_norm: ("input", "normalized_shape", "weight"),
    functional.group_norm: ("input", "num_groups", "weight", "bias"),
    torch.group_norm: ("input", "num_groups", "weight", "bias"),
    functional.prelu: ("input", "weight"),
    functional.pad: ("input", "pad", "mode", "value"),
    functional.scaled_dot_product_attention: ("query", "key", "value", "attn_mask"),
    torch.nn.MultiheadAttention: ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask"),
    "torchvision.models.swin_transformer.shifted_window_attention": (
        *("input", "qkv_weight", "proj_weight", "relative_position_bias", "window_size", "num_heads", "shift_size"),
        *("attention_dropout", "dropout", "qkv_bias", "proj_bias", "logit_scale", "training"),
    ),
}
"""The order of positional arguments: functions of torch that are not Python have no signature to ask."""


def argument(trace: Trace, node: fx.Node, name: str, order: Sequence[str] = ()) -> Any:
    """Return an argument of a node by its name, or None where it was left out.

    Args:
        trace: the derivation.
        node: of a call.
        name: the argument's name.
        order: names of the positional arguments, where the table of this module has none.
    """
    if name in node.kwargs:
        return node.kwargs[name]
    if not order:
        kinds = (
            type(trace.module(node)).__mro__ if node.op == "call_module" else (node.target, qualified_name(node.target))
        )
        order = next((_SIGNATURES[kind] for kind in kinds if kind in _SIGNATURES), ("input",))
    position = order.index(name) if name in order else len(node.args)
    return node.args[position] if position < len(node.args) else None


def input_of(trace: Trace, node: fx.Node) -> fx.Node:
    """Return the node whose output a call works on."""
    found = node.args[0] if node.args else node.kwargs["input"]
    if not isinstance(found, fx.Node):
        raise trace.refuse(node, "it does not work on one tensor")
    return found


def weights_of(trace: Trace, node: fx.Node) -> dict[str, str]:
    """Return the state dict's names of a layer's weights, by what the layer calls them."""
    if node.op == "call_module":
        module = trace.module(node)
        values = {part: getattr(module, part, None) for part in TENSORS}
        return {
            part: f"{node.target}.{part}"
            for part, value in values.items()
            if isinstance(value, Tensor) and value.ndim > 0
        }
    given = {part: argument(trace, node, part) for part in TENSORS}
    return {part: name_of(trace, node, value) for part, value in given.items() if value is not None}


def name_of(trace: Trace, node: fx.Node, weight: Any) -> str:
    """Return the state dict's name of an argument that has to be a parameter or buffer of the model."""
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        raise trace.refuse(node, f"its weight is computed by '{weight}', expected a parameter of the model")
    return str(weight.target)


def setting(trace: Trace, node: fx.Node, name: str, default: Any = None) -> Any:
    """Return a layer's setting: a module's attribute or a function's argument."""
    if node.op == "call_module":
        return getattr(trace.module(node), name)
    found = argument(trace, node, name)
    return default if found is None else found
