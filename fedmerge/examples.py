"""Images in memory, and what is known of their classes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

UNKNOWN = -1
"""The label of an example whose class is not known."""


@dataclass(frozen=True)
class Examples:
    """Images and what is known of their classes, in memory.

    Attributes:
        images: (examples, …) floating point, normalised.
        labels: (examples,) int64 class indices; -1 where the class is not known.
        targets: (examples, classes) probabilities that losses are measured against; None: the labels are.
    """

    images: Tensor
    labels: Tensor
    targets: Tensor | None = None

    def __post_init__(self) -> None:
        if self.labels.ndim != 1 or self.images.shape[:1] != self.labels.shape:
            raise ValueError(
                f"expected one label for each image, got images {tuple(self.images.shape)} "
                f"and labels {tuple(self.labels.shape)}"
            )
        if self.targets is not None and (self.targets.ndim != 2 or len(self.targets) != len(self.labels)):
            raise ValueError(
                f"expected targets of shape ({len(self.labels)}, classes), got {tuple(self.targets.shape)}"
            )

    @classmethod
    def unlabelled(cls, images: Tensor) -> Examples:
        """Return images of which no class is known.

        Args:
            images: (examples, …) floating point, normalised.
        """
        return cls(images, torch.full((len(images),), UNKNOWN, device=images.device))

    @property
    def known(self) -> Tensor:
        """Which examples' classes are known, (examples,) bool."""
        return self.labels != UNKNOWN

    @property
    def labelled(self) -> bool:
        """Whether every example's class is known."""
        return bool(self.known.all())

    def joined(self, others: Examples, num_classes: int) -> Examples:
        """Return these examples and others, all with targets; those without have their label's.

        Args:
            others: on the same device.
            num_classes: of the targets.
        """
        parts = [
            part.targets if part.targets is not None else functional.one_hot(part.labels, num_classes)
            for part in (self, others)
        ]
        targets = torch.cat([part.to(self.images.dtype) for part in parts])
        return Examples(torch.cat([self.images, others.images]), torch.cat([self.labels, others.labels]), targets)

    def __len__(self) -> int:
        return self.labels.shape[0]  # `len` of a tensor takes several times as long

    def __getitem__(self, index: Tensor | slice) -> Examples:
        targets = None if self.targets is None else taken(self.targets, index)
        return Examples(taken(self.images, index), taken(self.labels, index), targets)

    def to(self, device: torch.device | str) -> Examples:
        """Return the examples on `device`."""
        return Examples(
            self.images.to(device), self.labels.to(device), None if self.targets is None else self.targets.to(device)
        )


@dataclass(frozen=True)
class Part:
    """Some of many examples, which are copied only where they are needed by themselves.

    Attributes:
        whole: all of them.
        index: (examples,) which of them, on the CPU.
    """

    whole: Examples
    index: Tensor

    @classmethod
    def of_all(cls, whole: Examples) -> Part:
        """Return all examples as a part."""
        return cls(whole, torch.arange(len(whole)))

    def __len__(self) -> int:
        return self.index.shape[0]

    def copied(self) -> Examples:
        """Return the examples by themselves."""
        return self.whole[self.index.to(self.whole.labels.device)]


def taken(tensor: Tensor, index: Tensor | slice) -> Tensor:
    """Return `tensor[index]`, by whole rows where they lie in one piece, which is several times faster.

    Args:
        tensor: its memory layout is kept: one whose channels lie last is taken as it lies.
        index: of the first dimension: numbers from 0, a mask, or a slice.
    """
    whole = tensor.ndim < 4 or tensor.stride(1) > tensor.stride(2)
    if whole and isinstance(index, Tensor) and index.dtype == torch.long and index.ndim == 1:
        return tensor.index_select(0, index)
    return tensor[index]


def stratified_parts(labels: Tensor, num_parts: int, generator: torch.Generator) -> list[Tensor]:
    """Divide the examples into parts of nearly equal size and class shares; each part's indices are sorted.

    Args:
        labels: of the examples.
        num_parts: how many parts.
        generator: decides who is where.
    """
    order = torch.randperm(len(labels), generator=generator)
    by_class = order[torch.argsort(labels[order], stable=True)]
    return [by_class[part::num_parts].sort().values for part in range(num_parts)]
