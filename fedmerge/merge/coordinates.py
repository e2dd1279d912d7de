"""Maps from the coordinates that a descent moves to the parameters of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor


class Coordinates(Protocol):
    """A map from coordinates c to the parameters θ(c) of a model."""

    values: list[Tensor]
    """The coordinates, moved in place by the optimiser."""

    def parameters(self) -> dict[str, Tensor]:
        """Return θ(c), fresh tensors by parameter name."""

    def pull_back(self, gradients: Mapping[str, Tensor]) -> list[Tensor | None]:
        """Return dL/dc, one tensor for each of `values`, from dL/dθ; None for one that is not moved in this step."""

    def project(self) -> None:
        """Bring the coordinates, after a step, back to where they may be, in place."""


class Weights:
    """The weights themselves are the coordinates: fine-tuning.

    Args:
        start: parameters by name.
        moving: names of those that are coordinates; the others stay as they are. Default: all.
    """

    def __init__(self, start: Mapping[str, Tensor], moving: Sequence[str] | None = None) -> None:
        self.names = list(start) if moving is None else list(moving)
        self.values = [start[name].detach().clone() for name in self.names]
        self.start = start

    def parameters(self) -> dict[str, Tensor]:
        """Return the weights."""
        moved = dict(zip(self.names, self.values, strict=True))
        return {name: moved.get(name, tensor).detach().clone() for name, tensor in self.start.items()}

    def pull_back(self, gradients: Mapping[str, Tensor]) -> list[Tensor | None]:
        """Return the gradients as they are."""
        return [gradients[name] for name in self.names]

    def project(self) -> None:
        """Weights may be anything."""
