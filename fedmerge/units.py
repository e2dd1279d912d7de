"""Labels of hidden units, and which labels have turned out to mean the same unit."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

FIXED = 0
"""The label of elements that may not be renamed: inputs, outputs and constants."""


class Units:
    """Disjoint sets of labels; the least label of a set stands for it, so what meets a fixed element is fixed.

    A *loose* label is an element of a parameter, or a constant, that has not met a unit yet: it takes the place of
    whatever it meets.
    """

    def __init__(self) -> None:
        self._parent = np.zeros(1, dtype=np.int64)
        self._loose = np.zeros(1, dtype=bool)

    def __len__(self) -> int:
        return len(self._parent)

    def fresh(self, count: int, *, loose: bool = False) -> Tensor:
        """Return `count` new labels, each a unit of its own."""
        labels = np.arange(len(self), len(self) + count)
        self._parent = np.concatenate([self._parent, labels])
        self._loose = np.concatenate([self._loose, np.full(count, loose)])
        return torch.from_numpy(labels.copy())

    def find(self, labels: np.ndarray) -> np.ndarray:
        """Return the label that stands for each one's set."""
        found = np.asarray(self._parent[labels])
        while True:
            above = self._parent[found]
            if np.array_equal(above, found):
                self._parent[labels] = found
                return found
            found = above

    def is_loose(self, labels: np.ndarray) -> np.ndarray:
        """Return which labels have met no unit yet."""
        return np.asarray(self._loose[self.find(labels)])

    def settle(self, labels: np.ndarray) -> None:
        """Say that labels are units from now on."""
        self._loose[self.find(labels)] = False

    def unify(self, first: np.ndarray, second: np.ndarray) -> None:
        """Make labels mean the same unit, pair by pair."""
        members = np.concatenate([self.find(first), self.find(second)])
        loose = self._loose[members]
        while True:
            first, second = self.find(first), self.find(second)
            least, greatest = np.minimum(first, second), np.maximum(first, second)
            apart = least != greatest
            if not apart.any():
                break
            first, second = least[apart], greatest[apart]
            np.minimum.at(self._parent, second, first)
        np.logical_and.at(self._loose, self.find(members), loose)
