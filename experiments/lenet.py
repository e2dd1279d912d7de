"""The LeNet of FedFisher's experiments: 44,190 parameters, no biases (Jhunjhunwala, Wang, Joshi, AISTATS 2024)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn


def lenet(shape: Sequence[int], num_classes: int) -> nn.Module:
    """Return two convolutions and three linear layers without biases, for 28×28 images.

    Args:
        shape: (channels, height, width) of an image.
        num_classes: outputs.
    """
    return nn.Sequential(
        nn.Conv2d(shape[0], 6, 5, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5, bias=False),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 4 * 4, 120, bias=False),
        nn.ReLU(),
        nn.Linear(120, 84, bias=False),
        nn.ReLU(),
        nn.Linear(84, num_classes, bias=False),
    )
