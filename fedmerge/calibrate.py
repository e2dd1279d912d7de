"""BatchNorm statistics of a merged model, re-estimated on data.

Averaged weights give activations whose variance is far below their average variance; the stored statistics of the
parents do not fit them. One pass in training mode repairs it (Jordan et al., REPAIR, arXiv 2211.08403).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from fedmerge.examples import taken
from fedmerge.state import StateDict

BATCH = 256
MOST = 1024
"""Images that are looked at: a layer's mean and variance are as well known by them as by several times as many."""


def has_statistics(model: nn.Module) -> bool:
    """Return whether the model keeps running statistics."""
    return any(_keeps_statistics(module) for module in model.modules())


@torch.no_grad()
def calibrate(model: nn.Module, state: StateDict, images: Tensor) -> dict[str, Tensor]:
    """Re-estimate the running means and variances of all BatchNorm layers, as the mean over batches of equal size.

    Each batch is spread evenly over the images, which may lie in the order of their classes.

    Args:
        model: the architecture.
        state: the weights, left as they are.
        images: (examples, …), on the state's device; batch normalisation needs at least two. Of more than `MOST`, as
            many are looked at, spread evenly.

    Returns:
        A fresh state dict that differs from `state` in the running statistics alone. The counts of batches are kept.
    """
    result = {name: tensor.detach().clone() for name, tensor in state.items()}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}
    layers = {name: layer for name, layer in layers.items() if layer.track_running_stats}
    if not layers or len(images) < 2:
        return result
    was = [(module, module.training) for module in model.modules()]
    momenta = {name: layer.momentum for name, layer in layers.items()}
    model.eval()
    try:
        for name, layer in layers.items():
            layer.train()
            layer.momentum = None  # the cumulative average
            for buffer in ("running_mean", "running_var", "num_batches_tracked"):
                result[_key(name, buffer)].zero_()
        if len(images) > MOST:
            images = taken(images, torch.arange(MOST, device=images.device) * len(images) // MOST)
        count = math.ceil(len(images) / BATCH)
        for first in range(count):
            functional_call(model, result, (images[first::count],))
    finally:
        for module, training in was:
            module.training = training
        for name, layer in layers.items():
            layer.momentum = momenta[name]
    for name in layers:
        counter = _key(name, "num_batches_tracked")
        result[counter] = state[counter].clone()
    return result


def _keeps_statistics(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.track_running_stats


def _key(name: str, buffer: str) -> str:
    return f"{name}.{buffer}" if name else buffer
