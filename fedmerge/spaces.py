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
        within: (other dimension, first, last + 1) of the block of the tensor that is indexed, where the rest of it is
            not: a grouped convolution's inputs are indexed within the rows of their group alone.
    """

    name: str
    dim: int
    repeat: int = 1
    start: int = 0
    index: tuple[int, ...] | None = None
    within: tuple[int, int, int] | None = None

    def __post_init__(self) -> None:
        if self.within is not None and self.within[0] == self.dim:
            raise ValueError(f"expected a block of another dimension than {self.dim} of '{self.name}', got it")

    def entries(self, size: int) -> Tensor:
        """Return the (size, repeat) positions along `dim` that belong to each unit."""
        if self.index is not None:
            return torch.tensor(self.index).reshape(size, self.repeat)
        return torch.arange(self.start, self.start + size * self.repeat).reshape(size, self.repeat)

    def block(self, tensor: Tensor) -> Tensor:
        """Return the view of a tensor that is indexed: all of it, or its part `within`."""
        if self.within is None:
            return tensor
        dim, start, stop = self.within
        return tensor.narrow(dim, start, stop - start)


@dataclass(frozen=True)
class Site:
    """Where the units of a space can be observed.

    An operation may keep its units to itself, as attention does its queries. Then they are observed as what it computes
    from its input: `output @ weight[index].T + bias[index]`, along the node's dimension.

    Attributes:
        node: name of the traced graph's node.
        dim: the dimension of its output that is indexed by units, or projected to them.
        index: position of each unit along `dim`, or row of each unit in `weight`.
        weight: key of the projection in the state dict; None where the node shows the units themselves.
        bias: key of its bias; None without one.
    """

    node: str
    dim: int
    index: tuple[int, ...]
    weight: str | None = None
    bias: str | None = None


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
