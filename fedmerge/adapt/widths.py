"""One architecture in two widths: its weights in another number of units.

Wider, units are copied, and what reads a unit is divided among its copies: the function stays (Chen, Goodfellow,
Shlens: Net2Net, Accelerating Learning via Knowledge Transfer, ICLR 2016, arXiv 1511.05641; what differs: the feature
spaces come from tracing the model, copies are even and not drawn, and nothing is added to tell them apart, as alignment
and merging do that). Narrower, the units that are most alike become one (`fedmerge.adapt.joining`); BatchNorm is folded
before, and restored after with the mean of the units' scales, shifts and variances, so that what is joined is what
units do. Its statistics are to be re-estimated then.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import groupby

import torch
from torch import Tensor, nn

from fedmerge.adapt.joining import join
from fedmerge.basis import Resize, put_units_first, units_first
from fedmerge.covariances import Joint
from fedmerge.features import joint_moments
from fedmerge.folding import FoldedNorm, Folding, Target, fold, restore
from fedmerge.spaces import Axis, Space
from fedmerge.state import StateDict

TRACE = 1e-9
"""Of all energy: enough to tell units apart that the images do not, too little to outweigh what they show."""

Shapes = Mapping[str, torch.Size]


@dataclass(frozen=True)
class _Part:
    """The same axis in both widths."""

    space: int
    reads: bool
    axes: tuple[Axis, Axis]
    sizes: tuple[int, int]


@dataclass(frozen=True)
class Widths:
    """The feature spaces of one architecture in two widths, space by space.

    Attributes:
        spaces: in the width that states come in.
        resized: in the width that they get.
        shapes: of the tensors in the width that they get.
    """

    spaces: tuple[Space, ...]
    resized: tuple[Space, ...]
    shapes: Shapes

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Units of each space, before and after."""
        return [(space.size, resized.size) for space, resized in zip(self.spaces, self.resized, strict=True)]

    @property
    def narrowed(self) -> list[Space]:
        """The spaces that lose units."""
        return [space for space, (size, resized) in zip(self.spaces, self.sizes, strict=True) if resized < size]

    def fit(self, shapes: Shapes) -> bool:
        """Whether spaces differ in their sizes alone, and tensors in the spaces' sizes.

        Args:
            shapes: of the tensors in the width that states come in.
        """
        if list(map(_names, self.spaces)) != list(map(_names, self.resized)) or shapes.keys() != self.shapes.keys():
            return False
        free = {name: set[int]() for name in shapes}
        for (name, dim), parts in self._blocks:
            before, after = (_fixed(both[name][dim], parts, side) for side, both in enumerate((shapes, self.shapes)))
            if len(before) != len(after):
                return False
            free[name].add(dim)
        return all(
            len(shape) == len(self.shapes[name])
            and all(dim in free[name] or size == self.shapes[name][dim] for dim, size in enumerate(shape))
            for name, shape in shapes.items()
        )

    def turned(self, shapes: Shapes) -> Widths:
        """Return the way back.

        Args:
            shapes: of the tensors in the width that states come in.
        """
        return Widths(self.resized, self.spaces, shapes)

    def even(self) -> list[Resize]:
        """Return changes that copy units in turn, or join each few to one: there and back, copies are joined again."""
        return [copied(*sizes) if sizes[0] <= sizes[1] else _joined(*sizes) for sizes in self.sizes]

    def repeated(self) -> list[Resize]:
        """Return changes to as many different units as divide both sizes, each as often as the others."""
        found = []
        for size, resized in self.sizes:
            few, many = _joined(size, math.gcd(size, resized)), copied(math.gcd(size, resized), resized)
            found.append(Resize(few.writing @ many.writing, few.reading @ many.reading))
        return found

    def resize(self, state: StateDict, changes: Sequence[Resize]) -> dict[str, Tensor]:
        """Apply a change to each space, as `fedmerge.basis.rebase` does where tensors keep their shapes.

        Args:
            state: in the width that states come in, left as it is.
            changes: one for each space.
        """
        result = {name: tensor.detach().clone() for name, tensor in state.items()}
        for (name, dim), blocks in groupby(self._blocks, key=lambda block: block[0]):
            old = result[name]
            shape = [*old.shape[:dim], self.shapes[name][dim], *old.shape[dim + 1 :]]
            new = result[name] = old.clone() if list(old.shape) == shape else old.new_full(shape, torch.nan)
            for _, parts in blocks:
                fixed = [_fixed(tensor.shape[dim], parts, side) for side, tensor in enumerate((old, new))]
                whole = [_within(parts[0], dim).block(tensor).movedim(dim, 0) for tensor in (old, new)]
                whole[1][fixed[1]] = whole[0][fixed[0]]
                for part in parts:
                    change = changes[part.space]
                    within = _within(part, dim).within
                    before, after = (replace(axis, within=within) for axis in part.axes)
                    weights = units_first(old, before, part.sizes[0])
                    changed = change.read(weights) if part.reads else change.write(weights)
                    put_units_first(new, after, part.sizes[1], changed)
        return result

    @cached_property
    def _blocks(self) -> list[tuple[tuple[str, int], list[_Part]]]:
        """The parts of each block of each tensor's dimension, the dimensions of a tensor in order."""
        found: dict[tuple[tuple[str, int], tuple[int, ...] | None], list[_Part]] = defaultdict(list)
        for number, (space, resized) in enumerate(zip(self.spaces, self.resized, strict=True)):
            for index, axes in enumerate(zip(space.axes, resized.axes, strict=True)):
                reads = len(space.writers) <= index < len(space.writers) + len(space.readers)
                key = (axes[0].name, axes[0].dim), axes[0].within
                found[key].append(_Part(number, reads, axes, (space.size, resized.size)))
        return sorted(((key, parts) for (key, _), parts in found.items()), key=lambda block: block[0])


def change_width(model: nn.Module, widths: Widths, state: StateDict, images: Tensor) -> dict[str, Tensor]:
    """Return a state in another width.

    Args:
        model: the architecture in the state's width.
        widths: the spaces in both widths, which fit.
        state: the weights, left as they are.
        images: (examples, …), on which it is seen which units are alike, where there are to be fewer.
    """
    if not widths.narrowed:
        return widths.resize(state, widths.even())
    folding = Folding(model, widths.spaces)
    folded = fold(state, folding.norms)
    moments = iter(joint_moments(model, widths.narrowed, [state], images, pairs=()))
    changes = [
        copied(space.size, size)
        if space.size <= size
        else join(_second_moments(next(moments), folded, space), _importance(folded, space), size)
        for space, (_, size) in zip(widths.spaces, widths.sizes, strict=True)
    ]
    scales = {norm.key("weight"): state[norm.key("weight")].abs() for norm in folding.norms}
    typical = widths.resize({**state, **scales}, changes)
    return restore(widths.resize(folded, changes), typical, [_unchanged(norm, typical) for norm in folding.norms])


def copied(size: int, resized: int) -> Resize:
    """Return the change that copies units in turn, from the first, until there are enough.

    Args:
        size: units.
        resized: units after it, at least as many.
    """
    index = torch.arange(resized) % size
    writing = torch.zeros(size, resized, dtype=torch.float64)
    writing[index, torch.arange(resized)] = 1.0
    return Resize(writing, writing / writing.sum(1, keepdim=True))


def _joined(size: int, resized: int) -> Resize:
    back = copied(resized, size)
    return Resize(back.reading.T, back.writing.T)


def _unchanged(norm: FoldedNorm, state: StateDict) -> Target:
    """Return as a BatchNorm's target what its scale and shift are in `state`."""
    shift = torch.zeros(state[norm.key("bias")].shape, dtype=torch.float64)
    return Target(norm, Axis(norm.key("bias"), 0), shift + 1, shift)


def _second_moments(found: Joint, state: StateDict, space: Space) -> Tensor:
    """Return E u_i u_j over the images, and a trace of the products of what writes the units, for those never seen."""
    seen = found.covariance(0, 0) + torch.outer(found.means[0], found.means[0])
    rows = torch.cat([units_first(state[axis.name], axis, space.size).flatten(1).double() for axis in space.writers], 1)
    written = (rows @ rows.T).cpu()
    return seen + TRACE * (seen.trace() or 1.0) / (written.trace() or 1.0) * written


def _importance(state: StateDict, space: Space) -> Tensor:
    """Return the squared norm of each unit's readers, a trace of their mean at least."""
    parts = [units_first(state[axis.name], axis, space.size).flatten(1).double() for axis in space.readers]
    norms = torch.cat(parts, 1).square().sum(1).cpu()
    return norms + TRACE * (norms.mean() or 1.0)


def _names(space: Space) -> list[list[tuple[str, int, int]]]:
    roles = (space.writers, space.readers, space.elementwise)
    return [[(axis.name, axis.dim, axis.repeat) for axis in axes] for axes in roles]


def _fixed(length: int, parts: Sequence[_Part], side: int) -> Tensor:
    """Return the positions that belong to no unit."""
    free = torch.ones(length, dtype=torch.bool)
    for part in parts:
        free[part.axes[side].entries(part.sizes[side]).flatten()] = False
    return free.nonzero()[:, 0]


def _within(part: _Part, dim: int) -> Axis:
    """Return the axis whose block is the part's as a dimension is resized: those before it are resized already."""
    before, after = part.axes
    return after if after.within is not None and after.within[0] < dim else before
