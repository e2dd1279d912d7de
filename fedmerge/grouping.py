"""From what a trace knows of the units to feature spaces: units with the same weights and history are one space."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, fx

from fedmerge.labels import line, varying
from fedmerge.spaces import Axis, Site, Space, UnsupportedOperation
from fedmerge.trace import ROLES, UNTOUCHED, Moved, Part, Trace
from fedmerge.units import FIXED


@dataclass
class _Group:
    """Exchangeable units, as their labels in ascending order, and what is found of them."""

    units: np.ndarray
    axes: dict[str, list[Axis]] = field(default_factory=lambda: defaultdict(list))
    site: Site | None = None
    is_shown_once: bool = False
    shown_elements: int = 0


def spaces_of(trace: Trace) -> tuple[Space, ...]:
    """Group the units that are exchangeable, in the order in which the model writes them.

    Args:
        trace: of a whole model, after `run`.

    Raises:
        UnsupportedOperation: if a space can be observed nowhere.
    """
    for name, moved in trace.moved.items():
        _touch_moved(trace, name, moved)
    touched = list(_touched(trace))
    groups = _groups(trace, touched)
    number = np.full(len(trace.units), -1)
    for index, group in enumerate(groups):
        number[group.units] = index
    _find_axes(trace, touched, groups, number)
    _find_sites(trace, groups, number)
    return tuple(_space(group) for group in groups if _is_aligned(group, trace))


def _touch_moved(trace: Trace, name: str, moved: Moved) -> None:
    """Find the dimension of a parameter along which the units lie that its elements have met."""
    units = trace.units.find(moved.labels.numpy())
    loose = trace.units.is_loose(units)
    if not units[~loose].any():
        return
    for dim in range(units.ndim):
        found = _along(units, loose, dim)
        if found is not None:
            trace.touch(name, dim, found, moved.role)
            return
    for other in range(units.ndim):
        blocks = [
            (index, dim, _along(units.take([index], other), loose.take([index], other), dim))
            for index in range(units.shape[other])
            for dim in (dim for dim in range(units.ndim) if dim != other)
        ]
        chosen = {index: (dim, found) for index, dim, found in reversed(blocks) if found is not None}
        if len(chosen) == units.shape[other]:
            for index, (dim, found) in chosen.items():
                trace.touch(name, dim, found, moved.role, within=(other, index, index + 1))
            return
    raise UnsupportedOperation(
        f"cannot derive the symmetries of the parameter '{name}': its units lie along several of its dimensions "
        f"{tuple(units.shape)}. Merge without alignment (--align identity)"
    )


def _along(units: np.ndarray, loose: np.ndarray, dim: int) -> Tensor | None:
    """Return the one unit of each entry along a dimension, whatever the loose elements are, or None."""
    shape = (units.shape[dim], -1)
    found, ignored = np.moveaxis(units, dim, 0).reshape(shape), np.moveaxis(loose, dim, 0).reshape(shape)
    greatest = np.where(ignored, UNTOUCHED, found).max(1)
    same = ignored | (found == greatest[:, None])
    return torch.from_numpy(np.where(greatest == UNTOUCHED, FIXED, greatest)) if same.all() else None


def _touched(trace: Trace) -> Iterator[tuple[Part, str, np.ndarray, np.ndarray]]:
    """Yield each part of the weights with a role, the positions of that role along it, and their units."""
    for part, found in trace.touched.items():
        for index, role in enumerate(ROLES):
            positions = np.flatnonzero((found.labels != UNTOUCHED) & (found.roles == index))
            if positions.size:
                yield part, role, positions, trace.units.find(found.labels[positions])


def _groups(trace: Trace, touched: list[tuple[Part, str, np.ndarray, np.ndarray]]) -> list[_Group]:
    """Split the units, again and again, by the weights that touch them and by their marks, and how often they do."""
    kind = np.zeros(len(trace.units), dtype=np.int64)
    is_touched = np.zeros(len(trace.units), dtype=bool)
    for _, _, _, units in touched:
        is_touched[units] = True
    kinds = 1
    histories: dict[Hashable, list[np.ndarray]] = defaultdict(list)
    for history, labels in trace.marks:
        histories[history].append(trace.units.find(labels))
    for event in [*(units for _, _, _, units in touched), *map(np.concatenate, histories.values())]:
        units, counts = np.unique(event, return_counts=True)
        _, split = np.unique(kind[units] * (counts.max() + 1) + counts, return_inverse=True)
        kind[units] = kinds + split
        kinds += int(split.max()) + 1
    is_touched[FIXED] = False
    candidates = np.flatnonzero(is_touched)
    members: dict[int, list[int]] = defaultdict(list)
    for unit, its_kind in zip(candidates.tolist(), kind[candidates].tolist(), strict=True):
        members[its_kind].append(unit)
    return [_Group(np.array(units)) for units in members.values() if len(units) > 1]


def _find_axes(
    trace: Trace,
    touched: list[tuple[Part, str, np.ndarray, np.ndarray]],
    groups: list[_Group],
    number: np.ndarray,
) -> None:
    names: dict[str, list[str]] = defaultdict(list)
    for name in trace.tensors:
        names[trace.first_name(name)].append(name)
    for (first, dim, within), role, positions, units in touched:
        for index, chosen in _by_group(units, number):
            entries = positions[chosen]
            axis = _axis(first, dim, entries, len(groups[index].units))
            groups[index].axes[role] += [replace(axis, name=name, within=within) for name in names[first]]


def _by_group(units: np.ndarray, number: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yield each group among units, and the positions of its units: unit after unit, ascending."""
    of_group = number[units]
    order = np.lexsort((np.arange(len(units)), units, of_group))
    order = order[of_group[order] >= 0]
    starts = np.flatnonzero(np.diff(of_group[order], prepend=-1))
    for chosen in np.split(order, starts[1:]):
        if chosen.size:
            yield int(of_group[chosen[0]]), chosen


def _axis(name: str, dim: int, entries: np.ndarray, size: int) -> Axis:
    repeat, start = len(entries) // size, int(entries[0])
    if np.array_equal(entries, np.arange(start, start + len(entries))):
        return Axis(name, dim, repeat, start)
    return Axis(name, dim, repeat, index=tuple(entries.tolist()))


def _find_sites(trace: Trace, groups: list[_Group], number: np.ndarray) -> None:
    """Find the last node that shows each unit of a group, once if there is one, at one position of one dimension.

    Pooled values are passed over: averages hide what units do. Units that no node shows may be shown by projection.
    """
    for node, labels in trace.output_labels.items():
        if isinstance(labels, Tensor) and node.op not in ("placeholder", "get_attr"):
            resolved = trace.resolved(labels)
            dims = varying(resolved)
            if len(dims) == 1:
                units = line(resolved, dims[0]).numpy()
                _show(node, dims[0], units, trace.values[node].numel(), groups, number)
    for labels_shown, site in trace.shown:
        units = trace.units.find(labels_shown)
        for index, chosen in _by_group(units, number):
            group = groups[index]
            if group.site is None and np.array_equal(units[chosen], group.units):
                group.site = replace(site, index=tuple(site.index[position] for position in chosen.tolist()))


def _show(node: fx.Node, dim: int, units: np.ndarray, elements: int, groups: list[_Group], number: np.ndarray) -> None:
    for index, chosen in _by_group(units, number):
        group = groups[index]
        found, first = np.unique(units[chosen], return_index=True)
        if not np.array_equal(found, group.units):
            continue
        once = len(chosen) == len(found)
        if once > group.is_shown_once or (once == group.is_shown_once and elements >= group.shown_elements):
            group.site = Site(node.name, dim, tuple(chosen[first].tolist()))
            group.is_shown_once, group.shown_elements = once, elements


def _is_aligned(group: _Group, trace: Trace) -> bool:
    """Whether weights depend on the units and parameters write them: else they are inputs, or nothing reads them."""
    return bool(group.axes["reader"]) and any(axis.name in trace.parameters for axis in group.axes["writer"])


def _space(group: _Group) -> Space:
    if group.site is None:
        raise UnsupportedOperation(f"no node of the graph shows all of a space's {len(group.units)} units")
    axes: Mapping[str, list[Axis]] = group.axes
    return Space(
        size=len(group.units),
        writers=tuple(axes["writer"]),
        readers=tuple(axes["reader"]),
        elementwise=tuple(axes["elementwise"]),
        site=group.site,
    )
