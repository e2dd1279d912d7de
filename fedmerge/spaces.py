"""Feature spaces: sets of exchangeable hidden units, with the weights that touch them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.errors import FedmergeError


class UnsupportedOperation(FedmergeError, ValueError):
    """The model does something to its units that no rule describes."""


@dataclass(frozen=True)
class Axis:
    """The entries of one tensor's dimension that belong to the units of a space.

    Attributes:
        name: key of the tensor in the state dict.
        dim: the dimension that is indexed by units.
        repeat: entries of each unit, H·W after a flatten.
        start: first entry, where the units are only a part of the dimension and lie together, unit after unit.
        index: all entries, unit after unit, where they do not.
    """

    name: str
    dim: int
    repeat: int = 1
    start: int = 0
    index: tuple[int, ...] | None = None

    def entries(self, size: int) -> Tensor:
        """Return the (size, repeat) positions along `dim` that belong to each unit."""
        if self.index is not None:
            return torch.tensor(self.index).reshape(size, self.repeat)
        return torch.arange(self.start, self.start + size * self.repeat).reshape(size, self.repeat)


@dataclass(frozen=True)
class Site:
    """Where the units of a space can be observed.

    Attributes:
        node: name of the traced graph's node.
        dim: the dimension of its output that is indexed by units.
        index: position of each unit along `dim`.
    """

    node: str
    dim: int
    index: tuple[int, ...]


@dataclass(frozen=True)
class Space:
    """A set of exchangeable units and the weights that touch them.

    Attributes:
        size: number of units.
        writers: weights that produce the units: output sides, biases.
        readers: weights that consume the units: input sides.
        elementwise: weights that act unit by unit: norms' scales, shifts and statistics, depthwise kernels.
        site: where to observe the units.
    """

    size: int
    writers: tuple[Axis, ...]
    readers: tuple[Axis, ...]
    elementwise: tuple[Axis, ...]
    site: Site

    @property
    def axes(self) -> tuple[Axis, ...]:
        """Everything that moves when the units are renamed."""
        return self.writers + self.readers + self.elementwise
