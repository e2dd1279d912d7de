"""A model computed in another order: where max pooling follows a ReLU, it may as well come first.

The largest of what a ReLU leaves is what it leaves of the largest, and where nothing is left no gradient passes either
way: values and gradients are the same bit for bit, of a quarter of the elements. Symmetries are derived from the model
as it is written, and its units observed there.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from torch import nn


def reordered(model: nn.Module) -> nn.Module:
    """Return a sequence of the same layers, under the same names, that pools before the ReLU.

    Args:
        model: anything but an `nn.Sequential` (of layers and other sequences) is returned as it is.

    Example:
        >>> reordered(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.MaxPool1d(2)))
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): MaxPool1d(kernel_size=2, stride=2, padding=0, dilation=1, ceil_mode=False)
          (2): ReLU()
        )
    """
    if type(model) is not nn.Sequential:
        return model
    layers = [reordered(layer) for layer in model]
    for place, (layer, following) in enumerate(pairwise(tuple(layers))):
        if type(layer) is nn.ReLU and type(following) in (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d):
            layers[place : place + 2] = following, layer
    if all(ours is theirs for ours, theirs in zip(layers, model, strict=True)):
        return model
    return nn.Sequential(OrderedDict(zip(model._modules, layers, strict=True)))
