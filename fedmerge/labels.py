"""Label tensors: an int64 for each element of a value, of stride 0 along dimensions where they are equal.

Most labels are equal along all dimensions but one, so those dimensions are never stored or compared.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmerge.units import FIXED


def spread(units: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """Return labels of a shape, with `units` along a dimension."""
    view = [1] * len(shape)
    view[dim] = len(units)
    return units.reshape(view).expand(shape)


def line(labels: Tensor, dim: int) -> Tensor:
    """Return the labels along a dimension, at the first position of all others."""
    return labels[tuple(slice(None) if other == dim else 0 for other in range(labels.ndim))]


def fixed(shape: torch.Size) -> Tensor:
    """Return labels of elements that may not be renamed."""
    return torch.full((), FIXED).expand(shape)


def varying(labels: Tensor) -> list[int]:
    """Return the dimensions along which resolved labels differ."""
    return [dim for dim, size in enumerate(labels.shape) if size > 1 and labels.stride(dim) != 0]


def expanded(labels: Tensor) -> Tensor:
    """Return the labels with stride 0 along every dimension on which they are constant."""
    shape = labels.shape
    for dim in varying(labels):
        first = labels.narrow(dim, 0, 1)
        if bool((labels == first).all()):
            labels = first
    return labels.expand(shape)


def tensors_of(labels: object) -> Iterator[Tensor]:
    """Yield the label tensors of a node's output, which may be a tuple of them."""
    if isinstance(labels, Tensor):
        yield labels
    elif isinstance(labels, (tuple, list)):
        for item in labels:
            yield from tensors_of(item)


def fixed_like(value: object) -> Any:
    """Return labels of a node's output whose elements may not be renamed; None where it holds no tensor."""
    if isinstance(value, Tensor):
        return fixed(value.shape)
    if isinstance(value, (tuple, list)):
        return tuple(fixed_like(item) for item in value)
    return None


def without_repeats(labels: Tensor) -> Tensor:
    """Return the labels without the dimensions' repetitions, along which their stride is 0."""
    for dim in range(labels.ndim):
        if labels.stride(dim) == 0:
            labels = labels.narrow(dim, 0, min(1, labels.shape[dim]))
    return labels


def compressed(first: Tensor, second: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return two tensors' labels, flat, without the dimensions along which both are constant."""
    for dim in range(first.ndim):
        if first.stride(dim) == 0 and second.stride(dim) == 0:
            size = min(1, first.shape[dim])
            first, second = first.narrow(dim, 0, size), second.narrow(dim, 0, size)
    return first.reshape(-1).numpy(), second.reshape(-1).numpy()
