"""Basis changes of feature spaces, and what they do to a model's weights.

With features as rows (samples × units), a change maps the features Y of a model to Y T ≈ X of the reference. Then
the weights that write the units become Tᵀ W and Tᵀ b, and those that read them W T⁻ᵀ. For a permutation T both
sides are the same reindexing, and what acts unit by unit is reindexed with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from fedmerge.spaces import Axis, Space
from fedmerge.state import StateDict

_UNIT_BY_UNIT = (
    "a linear basis change cannot be applied to weights that act unit by unit (shape {}): "
    "fold the normalisation into the layer before it first"
)


class BasisChange(Protocol):
    """A change of the basis of one feature space: `Permutation`, `Linear`, `Transport`, `Zip` or `Resize`."""

    @property
    def size(self) -> int:
        """Units of the space."""

    def write(self, weights: Tensor) -> Tensor:
        """Map weights (units, …) that produce the units."""

    def read(self, weights: Tensor) -> Tensor:
        """Map weights (units, …) that consume the units."""

    def scale(self, weights: Tensor) -> Tensor:
        """Map weights (units, …) that act unit by unit, or raise ValueError."""


@dataclass(frozen=True)
class Permutation:
    """Rename the units: unit i of the result is unit `index[i]` of the model.

    Attributes:
        index: (units,) a permutation.
    """

    index: Int[Tensor, " units"]

    def __post_init__(self) -> None:
        if not torch.equal(self.index.sort().values.cpu(), torch.arange(len(self.index))):
            raise ValueError(f"expected a permutation of 0 to {len(self.index) - 1}, got {self.index.tolist()}")

    @property
    def size(self) -> int:
        """Units of the space."""
        return len(self.index)

    def write(self, weights: Tensor) -> Tensor:
        """Reindex weights (units, …)."""
        return weights[self.index.to(weights.device)]

    read = write
    scale = write


@dataclass(frozen=True)
class Linear:
    """Mix the units by an invertible matrix.

    Attributes:
        matrix: T (units, units), with features as rows: Y T ≈ X.
    """

    matrix: Float[Tensor, "units units"]

    @property
    def size(self) -> int:
        """Units of the space."""
        return len(self.matrix)

    def write(self, weights: Tensor) -> Tensor:
        """Return Tᵀ W for weights (units, …), computed in float64."""
        matrix = self.matrix.to(weights.device, torch.float64)
        mixed: Tensor = torch.tensordot(matrix.T, weights.double(), dims=1)
        return mixed.to(weights.dtype)

    def read(self, weights: Tensor) -> Tensor:
        """Return (W T⁻ᵀ), whose first dimension here is the units': T⁻¹ W for weights (units, …), in float64."""
        mixed: Tensor = torch.tensordot(self._inverse.to(weights.device), weights.double(), dims=1)
        return mixed.to(weights.dtype)

    @cached_property
    def _inverse(self) -> Float64[Tensor, "units units"]:
        """T⁻¹, once for all readers: LAPACK multiplies faster than it solves."""
        inverse: Tensor = torch.linalg.inv(self.matrix.double())
        return inverse

    def scale(self, weights: Tensor) -> Tensor:
        """Refuse: a diagonal does not stay diagonal.

        Raises:
            ValueError: always.
        """
        raise ValueError(_UNIT_BY_UNIT.format(tuple(weights.shape)))


@dataclass(frozen=True)
class Transport:
    """Mix the units by a soft assignment, as optimal transport does: writers and readers alike.

    Unit i of the result is Σ_j M_ji of unit j. A permutation matrix gives the permutation; a softer one averages units
    that are alike and has no inverse, so the readers too take the average of what read them, and the function is kept
    as far as the mixed units are equal.

    Attributes:
        matrix: M (units of the model, units of the result), non-negative; its rows and columns sum to 1.
    """

    matrix: Float[Tensor, "units units"]

    @property
    def size(self) -> int:
        """Units of the space."""
        return len(self.matrix)

    def write(self, weights: Tensor) -> Tensor:
        """Return Mᵀ W for weights (units, …), computed in float64."""
        return Linear(self.matrix).write(weights)

    read = write

    def scale(self, weights: Tensor) -> Tensor:
        """Refuse, as `Linear` does.

        Raises:
            ValueError: always.
        """
        return Linear(self.matrix).scale(weights)


@dataclass(frozen=True)
class Zip:
    """Join units to groups, those of one model or of several, as ZipIt does.

    A group of the result is the mean of its units in all models, and is read by all that read them. So the models'
    results are summands: their uniform mean is the merge of all models, and no one alone computes what its model did.
    Writers become Σ_j s_j times unit j's over the units j of the group, with s_j = models / (units of the group in all
    models); readers become the sum of the units' readers. Where each group holds one unit of each model, this is a
    permutation.

    Attributes:
        group: (units,) the group of each unit of the model, from 0 to units − 1; a group may have none.
        share: (units,) s.
    """

    group: Int[Tensor, " units"]
    share: Float[Tensor, " units"]

    def __post_init__(self) -> None:
        if self.group.shape != self.share.shape or not bool(((self.group >= 0) & (self.group < self.size)).all()):
            raise ValueError(
                f"expected a group from 0 to {self.size - 1} and a share for each of {self.size} units, "
                f"got groups {self.group.tolist()} and {len(self.share)} shares"
            )

    @property
    def size(self) -> int:
        """Units of the space."""
        return len(self.group)

    def write(self, weights: Tensor) -> Tensor:
        """Return the groups' sums of weights (units, …), times the units' shares."""
        share = self.share.to(weights.device, torch.float64)
        return self._summed(weights, share.reshape(-1, *[1] * (weights.ndim - 1)))

    def read(self, weights: Tensor) -> Tensor:
        """Return the groups' sums of weights (units, …)."""
        return self._summed(weights, torch.ones((), dtype=torch.float64, device=weights.device))

    def scale(self, weights: Tensor) -> Tensor:
        """Refuse, as `Linear` does.

        Raises:
            ValueError: always.
        """
        raise ValueError(_UNIT_BY_UNIT.format(tuple(weights.shape)))

    def _summed(self, weights: Tensor, factor: Tensor) -> Tensor:
        wide = weights.double() * factor
        return torch.zeros_like(wide).index_add_(0, self.group.to(weights.device), wide).to(weights.dtype)


@dataclass(frozen=True)
class Resize:
    """Change the number of units: a unit may become several, and several may become one.

    Unit i of the result is Σ_j W_ji of unit j and is read by Σ_j R_ji of what read unit j. The function is kept where
    copies are read by parts that sum to 1 (rows of R), and where units that are joined are equal. Not for `rebase`,
    whose results have the shapes of what was given: `fedmerge.adapt.widths.resize` applies it.

    Attributes:
        writing: W (units, units of the result), its columns sum to 1.
        reading: R (units, units of the result).
    """

    writing: Float[Tensor, "units resized"]
    reading: Float[Tensor, "units resized"]

    def __post_init__(self) -> None:
        if self.writing.ndim != 2 or self.writing.shape != self.reading.shape:
            raise ValueError(
                "expected two matrices (units, units of the result), "
                f"got {tuple(self.writing.shape)} and {tuple(self.reading.shape)}"
            )

    @property
    def size(self) -> int:
        """Units of the space, before."""
        return len(self.writing)

    def write(self, weights: Tensor) -> Tensor:
        """Return Wᵀ times weights (units, …), computed in float64."""
        return Linear(self.writing).write(weights)

    def read(self, weights: Tensor) -> Tensor:
        """Return Rᵀ times weights (units, …), computed in float64."""
        return Linear(self.reading).write(weights)

    scale = write


def rebase(state: StateDict, spaces: Sequence[Space], changes: Sequence[BasisChange]) -> dict[str, Tensor]:
    """Apply a basis change to each feature space of a model.

    Args:
        state: the model's state dict, left as it is.
        spaces: the feature spaces, from `symmetry`.
        changes: one for each space.

    Returns:
        A fresh state dict of the same keys, shapes and dtypes.

    Raises:
        ValueError: if the numbers of spaces and changes or their sizes differ, or a dense change meets weights that
            act unit by unit.

    Example:
        >>> from fedmerge.spaces import Site
        >>> space = Space(2, (Axis("a", 0),), (Axis("b", 1),), (), Site("relu", 1, (0, 1)))
        >>> state = {"a": torch.tensor([[1.0], [2.0]]), "b": torch.tensor([[3.0, 4.0]])}
        >>> rebase(state, [space], [Permutation(torch.tensor([1, 0]))])
        {'a': tensor([[2.],
                      [1.]]), 'b': tensor([[4., 3.]])}
    """
    if len(spaces) != len(changes):
        raise ValueError(f"expected one basis change for each of {len(spaces)} spaces, got {len(changes)}")
    result = {name: tensor.detach().clone() for name, tensor in state.items()}
    for space, change in zip(spaces, changes, strict=True):
        if change.size != space.size:
            raise ValueError(
                f"a basis change of {change.size} units came for a space of {space.size} ({space.site.node})"
            )
        for axes, apply in (
            (space.writers, change.write),
            (space.readers, change.read),
            (space.elementwise, change.scale),
        ):
            for axis in axes:
                weights = units_first(result[axis.name], axis, space.size)
                put_units_first(result[axis.name], axis, space.size, apply(weights))
    return result


def units_first(tensor: Tensor, axis: Axis, size: int) -> Tensor:
    """Return the entries of `axis` as (units, repeat, …): the units' entries, then the other dimensions in order."""
    entries = axis.entries(size).to(tensor.device)
    return axis.block(tensor).movedim(axis.dim, 0)[entries]


def put_units_first(tensor: Tensor, axis: Axis, size: int, weights: Tensor) -> None:
    """Write what `units_first` returned back into `tensor`, in place."""
    axis.block(tensor).movedim(axis.dim, 0)[axis.entries(size).to(tensor.device)] = weights
