"""Layers that are linear in their inputs, and those inputs as rows: a convolution is linear in its patches.

The bias is the weight of an input that is always 1, the last one. Left out are grouped convolutions, those that do not
pad with zeros or pad by name, and layers that are not called as modules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from fedmerge.state import StateDict

Layer = nn.Linear | nn.Conv2d


def linear_layers(model: nn.Module) -> dict[str, Layer]:
    """Return the layers by the name of their weight in the state dict.

    Args:
        model: the architecture.

    Example:
        >>> list(linear_layers(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2))))
        ['0.weight', '2.weight']
    """
    names = set(model.state_dict())
    found = {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and _is_plain(module))
    }
    return {name: layer for name, layer in found.items() if name in names}


def bias_name(weight: str) -> str:
    """Return the name of the bias that belongs to a weight."""
    return weight.removesuffix("weight") + "bias"


def num_inputs(weight: str, state: StateDict) -> int:
    """Return the inputs of a layer, the constant one of its bias included.

    Args:
        weight: the weight's name.
        state: of the model, for its shapes.
    """
    return state[weight][0].numel() + (bias_name(weight) in state)


def matrix(weight: str, state: StateDict) -> Float[Tensor, "inputs outputs"]:
    """Return a layer's weights with a row for each input, the bias the last one, in float64.

    Args:
        weight: the weight's name.
        state: of the model.
    """
    rows = state[weight].flatten(1).T.double()
    bias = bias_name(weight)
    return torch.cat([rows, state[bias][None].double()]) if bias in state else rows


def from_matrix(found: Float[Tensor, "inputs outputs"], weight: str, state: StateDict) -> dict[str, Tensor]:
    """Return what `matrix` has taken apart as tensors of the shapes and dtypes that they have in `state`."""
    bias = bias_name(weight)
    like = state[weight]
    result = {weight: found[: like[0].numel()].T.reshape(like.shape).to(like.dtype)}
    if bias in state:
        result[bias] = found[-1].to(state[bias].dtype)
    return result


def rows(layer: Layer, inputs: Tensor) -> Float[Tensor, "samples inputs"]:
    """Return a layer's inputs, one row for each of its outputs' positions, and 1 for the bias.

    Args:
        layer: from `linear_layers`.
        inputs: what it was called with.
    """
    if isinstance(layer, nn.Conv2d):
        patches = functional.unfold(
            inputs if inputs.ndim == 4 else inputs[None],
            layer.kernel_size,
            layer.dilation,
            layer.padding,  # type: ignore[arg-type]  # not a name: `_is_plain`
            layer.stride,
        )
        found = patches.transpose(1, 2).flatten(0, 1)
    else:
        found = inputs.reshape(-1, inputs.shape[-1])
    return found if layer.bias is None else torch.cat([found, found.new_ones(len(found), 1)], 1)


@contextmanager
def observing(layers: Mapping[str, Layer], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Inside the block, call `see` with a layer's weight's name and its inputs whenever the layer is called."""

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda _, inputs, __: see(name, inputs[0])

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_plain(layer: nn.Conv2d) -> bool:
    return layer.groups == 1 and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
