"""What a step of a mixture reads and keeps of one parameter, a matrix with a row for each output channel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedmerge.merge.adam import FIRST, SECOND


@dataclass(frozen=True)
class Directions:
    """d_k = θ_k − c of one parameter.

    Attributes:
        models: θ_k, (rows, width) each, contiguous.
        centre: c; None: 0.
        factor: f, of the coefficients' gradients.
    """

    models: tuple[Tensor, ...]
    centre: Tensor | None = None
    factor: float = 1.0

    def direction(self, index: int, part: slice = slice(None)) -> Tensor:
        """Return d_k of some columns.

        Args:
            index: k.
            part: the columns.
        """
        model = self.models[index][:, part]
        return model if self.centre is None else model - self.centre[:, part]

    @cached_property
    def addresses(self) -> Tensor:
        """Where the models lie in memory, (models,) int64, on their device."""
        return torch.tensor([model.data_ptr() for model in self.models], device=self.models[0].device)

    def __len__(self) -> int:
        return len(self.models)


@dataclass(frozen=True)
class Moments:
    """Adam's running moments of a gradient.

    Attributes:
        first: m.
        second: v.
    """

    first: Tensor
    second: Tensor

    @classmethod
    def zeros(cls, like: Tensor) -> Moments:
        """Return the moments before the first step."""
        return cls(torch.zeros_like(like), torch.zeros_like(like))

    def add(self, gradient: Tensor, part: slice) -> tuple[Tensor, Tensor]:
        """Add a step's gradient, and return the first moment and the root of the second, a fresh tensor.

        Args:
            gradient: of some columns.
            part: the columns.
        """
        first = self.first[:, part].lerp_(gradient, 1 - FIRST)
        second = self.second[:, part].mul_(SECOND).addcmul_(gradient, gradient, value=1 - SECOND)
        return first, second.sqrt()
