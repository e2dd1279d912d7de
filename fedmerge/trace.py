"""Labels on the elements of every intermediate tensor: which hidden unit each one belongs to.

This is the machine under `fedmerge.symmetry`; the rules of `fedmerge.rules` work on it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fedmerge.spaces import Axis, Site, Space, UnsupportedOperation

Rule = Callable[["Trace", fx.Node], Any]
"""What an operation does to units: given the trace and the node, returns the labels of the node's output."""

RuleTable = Mapping[Any, Rule]
"""Rules by module class, function, or method name."""

FIXED = 0
"""The label of elements that may not be renamed: inputs, outputs and constants."""


class Trace:
    """The state of a derivation: labels of every node's output, and what is known of the labels.

    Rules use `labels`, `shape`, `fresh`, `touch`, `unify` and `mark`.
    """

    def __init__(self, model: nn.Module, rules: RuleTable) -> None:
        self.model = model
        self.rules = rules
        self.graph_module = traced(model, rules)
        self.output_labels: dict[fx.Node, Any] = {}
        self.values: dict[fx.Node, Any] = {}
        self._parent = [FIXED]
        self._touched: dict[tuple[str, int], tuple[str, np.ndarray]] = {}
        self._marks: list[tuple[Hashable, np.ndarray]] = []

    def labels(self, node: fx.Node) -> Tensor:
        """Return the labels of a node's output: int64, of the shape of its value."""
        found = self.output_labels[node]
        if not isinstance(found, Tensor):
            raise self.refuse(node, "its output is not a tensor")
        return found

    def along(self, node: fx.Node, dim: int) -> Tensor:
        """Return the unit of each position along a dimension of a node's output.

        Raises:
            UnsupportedOperation: if the units differ along other dimensions too.
        """
        labels = self.labels(node)
        for other, size in enumerate(labels.shape):
            if other != dim % labels.ndim:
                if size > 1 and labels.stride(other) != 0:
                    raise self.refuse(node, f"its units lie along dimension {other} too, expected only {dim}")
                labels = labels.narrow(other, 0, 1)
        return labels.reshape(-1)

    def spread(self, units: Tensor, node: fx.Node, dim: int) -> Tensor:
        """Return labels of the shape of a node's output, with `units` along a dimension."""
        shape = self.shape(node)
        view = [1] * len(shape)
        view[dim] = len(units)
        return units.reshape(view).expand(shape)

    def shape(self, node: fx.Node) -> torch.Size:
        """Return the shape of a node's output on the example."""
        shape: torch.Size = self.values[node].shape
        return shape

    def module(self, node: fx.Node) -> nn.Module:
        """Return the module that a `call_module` node calls."""
        return self.graph_module.get_submodule(str(node.target))

    def fresh(self, count: int) -> Tensor:
        """Return labels of `count` new units."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def touch(self, name: str, dim: int, labels: Tensor, role: str) -> None:
        """Say that a parameter or buffer is indexed along a dimension by units.

        Args:
            name: its key in the state dict.
            dim: the dimension.
            labels: the unit of each entry along the dimension.
            role: "writer", "reader" or "elementwise".
        """
        found = labels.numpy().copy()
        if (name, dim) in self._touched:  # shared by two calls: their units are the same
            self.unify(torch.from_numpy(self._touched[name, dim][1]), labels)
        else:
            self._touched[name, dim] = (role, found)

    def unify(self, first: Tensor, second: Tensor) -> Tensor:
        """Make the labels of two tensors of one shape equal, element by element, and return them."""
        pairs = np.unique(np.stack([_compressed(first, second), _compressed(second, first)]), axis=1)
        for a, b in pairs.T.tolist():
            a, b = self._find(a), self._find(b)
            if a != b:
                self._parent[max(a, b)] = min(a, b)  # FIXED is the least label: what it meets is fixed
        return first

    def mark(self, labels: Tensor, history: Hashable) -> None:
        """Say that units have a history that the others do not have: only units of equal history are exchangeable."""
        self._marks.append((history, np.unique(_compressed(labels))))

    def refuse(self, node: fx.Node, reason: str) -> UnsupportedOperation:
        """Return the error that names a node and how to go on."""
        what = type(self.module(node)).__name__ if node.op == "call_module" else str(node.target)
        return UnsupportedOperation(
            f"cannot derive the symmetries of node '{node.name}' ({node.op} {what}): {reason}. "
            "Pass a rule for it: symmetry(model, example, rules={**RULES, "
            f"{what if node.op == 'call_module' else '...'}: rule}}), or merge without alignment (--align identity)"
        )

    def run(self, example: Tensor) -> None:
        """Label every node's output, running the model on the example."""
        interpreter = fx.Interpreter(self.graph_module, garbage_collect_values=False)
        with torch.no_grad():
            interpreter.run(example)
        self.values = interpreter.env
        for node in self.graph_module.graph.nodes:
            if node.op == "output":
                for argument in node.all_input_nodes:
                    if isinstance(self.output_labels[argument], Tensor):
                        labels = self.labels(argument)
                        self.unify(labels, torch.zeros_like(labels))
            else:
                self.output_labels[node] = self._apply(node)

    def _apply(self, node: fx.Node) -> Any:
        value = self.values.get(node)
        if node.op in ("placeholder", "get_attr") or not self._carries_units(node):
            return _fixed(value)
        rule = self.rules.get(type(self.module(node)) if node.op == "call_module" else node.target)
        if rule is None:
            raise self.refuse(node, "no rule says what it does to units")
        found = rule(self, node)
        return fx.node.map_aggregate(found, lambda item: expanded(item) if isinstance(item, Tensor) else item)

    def _carries_units(self, node: fx.Node) -> bool:
        """Whether a rule is needed: weights take part, or a tensor whose elements are not all fixed."""
        if node.op == "call_module" and any(True for _ in self.module(node).parameters()):
            return True
        arguments = node.all_input_nodes
        return any(item.op == "get_attr" or self._is_free(self.output_labels[item]) for item in arguments)

    def _is_free(self, labels: object) -> bool:
        if isinstance(labels, Tensor):
            return any(self._find(int(label)) != FIXED for label in np.unique(_compressed(labels)))
        return isinstance(labels, (tuple, list)) and any(self._is_free(item) for item in labels)

    def _find(self, label: int) -> int:
        parent = self._parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label

    @cached_property
    def roots(self) -> np.ndarray:
        """The representative of each label, once everything is unified."""
        return np.array([self._find(label) for label in range(len(self._parent))])

    def spaces(self) -> tuple[Space, ...]:
        """Group the units that are exchangeable, in the order of their weights."""
        signatures: dict[int, list[Hashable]] = defaultdict(list)
        for (name, dim), (role, labels) in self._touched.items():
            units, counts = np.unique(self.roots[labels], return_counts=True)
            for unit, count in zip(units.tolist(), counts.tolist(), strict=True):
                signatures[unit].append((name, dim, role, count))
        for history, labels in self._marks:
            for unit in np.unique(self.roots[labels]).tolist():
                signatures[unit].append(history)
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for unit, signature in signatures.items():
            if unit != FIXED:
                groups[tuple(signature)].append(unit)
        found = [self._space(np.array(sorted(units))) for units in groups.values() if len(units) > 1]
        return tuple(space for space in found if space is not None)

    def _space(self, units: np.ndarray) -> Space | None:
        axes: dict[str, list[Axis]] = defaultdict(list)
        for (name, dim), (role, labels) in self._touched.items():
            of_entry = self.roots[labels]
            positions = np.flatnonzero(np.isin(of_entry, units))
            if positions.size:
                ordered = positions[np.argsort(of_entry[positions], kind="stable")]
                axes[role].append(_axis(name, dim, ordered, len(units)))
        if not axes["reader"]:  # nothing depends on them: there is nothing to align
            return None
        return Space(
            size=len(units),
            writers=tuple(axes["writer"]),
            readers=tuple(axes["reader"]),
            elementwise=tuple(axes["elementwise"]),
            site=self._site(units),
        )

    def _site(self, units: np.ndarray) -> Site:
        """Return the last node that shows each unit of a space once, at one position of one dimension."""
        best: Site | None = None
        for node, labels in self.output_labels.items():
            if not isinstance(labels, Tensor) or node.op in ("placeholder", "get_attr"):
                continue
            dims = [dim for dim in range(labels.ndim) if labels.stride(dim) != 0 and labels.shape[dim] > 1]
            if len(dims) != 1:
                continue
            along = self.roots[_compressed(labels)]
            order = np.argsort(along, kind="stable")
            order = order[np.isin(along[order], units)]
            if np.array_equal(along[order], units) and not _is_pooled(self.values[node], best, self.values):
                best = Site(node.name, dims[0], tuple(order.tolist()))
        if best is None:
            raise UnsupportedOperation(f"no node of the graph shows all of a space's {len(units)} units once each")
        return best


def traced(model: nn.Module, rules: RuleTable) -> fx.GraphModule:
    """Trace a model in evaluation mode; modules that have a rule stay whole.

    Args:
        model: the module, left as it is.
        rules: the rule table.

    Raises:
        UnsupportedOperation: if torch.fx cannot trace it.
    """

    class Tracer(fx.Tracer):
        def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
            return type(module) in rules or super().is_leaf_module(module, module_qualified_name)

    was_training = model.training
    model.eval()
    try:
        return fx.GraphModule(model, Tracer().trace(model))
    except (fx.proxy.TraceError, TypeError) as error:
        raise UnsupportedOperation(
            f"torch.fx cannot trace {type(model).__name__}: {error}. Put the part that it cannot follow into a module "
            "of its own and pass a rule for it, or merge without alignment (--align identity)"
        ) from error
    finally:
        model.train(was_training)


def _fixed(value: object) -> Any:
    if isinstance(value, Tensor):
        return torch.zeros((), dtype=torch.int64).expand(value.shape)
    if isinstance(value, (tuple, list)):
        return tuple(_fixed(item) for item in value)
    return None


def expanded(labels: Tensor) -> Tensor:
    """Return the labels with stride 0 along every dimension on which they are constant."""
    for dim, size in enumerate(labels.shape):
        if size > 1 and labels.stride(dim) != 0:
            first = labels.narrow(dim, 0, 1)
            if bool((labels == first).all()):
                labels = first.expand(labels.shape)
    return labels


def _compressed(labels: Tensor, other: Tensor | None = None) -> np.ndarray:
    """Return the labels, flat, without the dimensions along which they (and the other's) are constant."""
    for dim in range(labels.ndim):
        if labels.stride(dim) == 0 and (other is None or other.stride(dim) == 0):
            labels = labels.narrow(dim, 0, min(1, labels.shape[dim]))
            other = None if other is None else other.narrow(dim, 0, min(1, other.shape[dim]))
    return labels.reshape(-1).numpy()


def _axis(name: str, dim: int, ordered: np.ndarray, size: int) -> Axis:
    repeat = len(ordered) // size
    start = int(ordered[0])
    if np.array_equal(ordered, np.arange(start, start + len(ordered))):
        return Axis(name, dim, repeat, start)
    return Axis(name, dim, repeat, index=tuple(ordered.tolist()))


def _is_pooled(value: Tensor, best: Site | None, values: Mapping[fx.Node, Any]) -> bool:
    """Whether a node shows fewer positions than the best site so far: averages hide what units do."""
    if best is None:
        return False
    shown = next(found for node, found in values.items() if node.name == best.node)
    return bool(value.numel() < shown.numel())
