"""Labels on the elements of every intermediate tensor: which hidden unit each one belongs to.

This is the machine under `fedmerge.symmetry`; the rules of `fedmerge.rules` work on it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fedmerge.graph import Rule, RuleTable, qualified_name, rule_for_class, rule_for_target, traced
from fedmerge.labels import compressed, expanded, fixed, fixed_like, line, spread, tensors_of, varying, without_repeats
from fedmerge.spaces import Site, UnsupportedOperation
from fedmerge.units import FIXED, Units

ROLES = ("writer", "reader", "elementwise")
UNTOUCHED = -1

Part = tuple[str, int, tuple[int, int, int] | None]
"""A dimension of a tensor, or of a block of it: name, dimension, `Axis.within`."""


@dataclass
class Touched:
    """The units along a dimension of a tensor: the label of each entry, or UNTOUCHED, and its role's index."""

    labels: np.ndarray
    roles: np.ndarray


@dataclass
class Moved:
    """A parameter that takes part as a value: a label for each element, and what it does to the units it meets."""

    labels: Tensor
    role: str = "writer"


class Trace:
    """The state of a derivation: labels of every node's output, and what is known of the labels.

    Rules use `labels`, `along`, `spread`, `shape`, `fresh`, `touch`, `unify`, `fix`, `mark`, `mark_each` and `show`.
    """

    def __init__(self, model: nn.Module, rules: RuleTable) -> None:
        self.rules = rules
        self.graph_module = traced(model, rules)
        self.output_labels: dict[fx.Node, Any] = {}
        self.values: dict[fx.Node, Any] = {}
        self.units = Units()
        self.touched: dict[Part, Touched] = {}
        self.marks: list[tuple[Hashable, np.ndarray]] = []
        self.shown: list[tuple[np.ndarray, Site]] = []
        self.tensors = dict(model.state_dict(keep_vars=True))
        self._first_names: dict[int, str] = {}
        for name, tensor in self.tensors.items():
            self._first_names.setdefault(id(tensor), name)
        self.parameters = frozenset(name for name, _ in model.named_parameters(remove_duplicate=False))
        self.moved: dict[str, Moved] = {}
        self._node: fx.Node | None = None

    def labels(self, node: fx.Node) -> Tensor:
        """Return the labels of a node's output: int64, of the shape of its value, of stride 0 where they are equal."""
        if node.op == "get_attr" and node not in self.output_labels:
            self.output_labels[node] = self._labels_of_parameter(node)
        found = self.output_labels[node]
        if not isinstance(found, Tensor):
            raise self.refuse(node, "its output is not a tensor")
        return self.resolved(found)

    def resolved(self, labels: Tensor) -> Tensor:
        """Return labels in which each unit goes by one label, of stride 0 where they are equal."""
        core = without_repeats(labels)
        found = torch.from_numpy(self.units.find(core.numpy()))
        return expanded(found).expand(labels.shape)

    def along(self, node: fx.Node, dim: int) -> Tensor:
        """Return the unit of each position along a dimension of a node's output.

        Where the units differ along other dimensions too, each position's are made one: the same weights meet them all.

        Raises:
            UnsupportedOperation: if the units lie along other dimensions alone.
        """
        labels = self.labels(node)
        dim %= labels.ndim
        for other in varying(labels):
            if other != dim:
                first = labels.narrow(other, 0, 1).expand(labels.shape)
                if dim not in varying(labels) and not self._is_loose(labels, first):
                    raise self.refuse(self._node or node, f"its units lie along dimension {other}, expected {dim}")
                self.unify(labels, first)
                labels = self.resolved(first)
        return line(labels, dim)

    def spread(self, units: Tensor, node: fx.Node, dim: int) -> Tensor:
        """Return labels of the shape of a node's output, with `units` along a dimension."""
        return spread(units, self.shape(node), dim)

    def shape(self, node: fx.Node) -> torch.Size:
        """Return the shape of a node's output on the example."""
        shape: torch.Size = self.values[node].shape
        return shape

    def module(self, node: fx.Node) -> nn.Module:
        """Return the module that a `call_module` node calls."""
        return self.graph_module.get_submodule(str(node.target))

    def fresh(self, count: int, *, loose: bool = False) -> Tensor:
        """Return labels of `count` new units; loose ones take the place of whatever they meet."""
        return self.units.fresh(count, loose=loose)

    def touch(
        self,
        name: str,
        dim: int,
        labels: Tensor,
        role: str,
        *,
        start: int = 0,
        within: tuple[int, int, int] | None = None,
    ) -> None:
        """Say that a parameter or buffer is indexed along a dimension by units.

        Args:
            name: its key in the state dict.
            dim: the dimension.
            labels: the unit of each entry along the dimension.
            role: "writer", "reader" or "elementwise".
            start: the first of the entries, where they are a part of the dimension.
            within: the block of the tensor for which this holds, see `Axis.within`.

        Raises:
            UnsupportedOperation: if the model keeps no such tensor, as where a parametrisation computes it.
        """
        if name not in self.tensors:
            assert self._node is not None
            raise self.refuse(self._node, f"'{name}' is not in the state dict")
        part = (self.first_name(name), dim, within)
        if part not in self.touched:
            size = self.tensors[name].shape[dim]
            self.touched[part] = Touched(np.full(size, UNTOUCHED), np.zeros(size, dtype=np.int64))
        units, found = labels.numpy(), slice(start, start + len(labels))
        known, roles = self.touched[part].labels[found], self.touched[part].roles[found]
        shared = known != UNTOUCHED
        self.units.unify(known[shared], units[shared])  # shared by two calls: their units are the same
        self.units.settle(units)
        known[~shared], roles[~shared] = units[~shared], ROLES.index(role)

    def first_name(self, name: str) -> str:
        """Return the first of the names under which the state dict has a tensor."""
        return self._first_names[id(self.tensors[name])]

    def unify(self, first: Tensor, second: Tensor) -> Tensor:
        """Make the labels of two tensors of one shape equal, element by element, and return them."""
        self.units.unify(*compressed(first, second))
        return first

    def turn(self, labels: Tensor) -> None:
        """Say that what wrote units so far reads those that they are about to meet, as keys read queries.

        Where a dense change maps the queries by T, it has to map the keys by T⁻ᵀ.
        """
        turned = np.unique(self.units.find(without_repeats(labels).numpy()))
        for touched in self.touched.values():
            writes = (touched.labels != UNTOUCHED) & (touched.roles == ROLES.index("writer"))
            touched.roles[writes & np.isin(self.units.find(touched.labels), turned)] = ROLES.index("reader")
        for moved in self.moved.values():
            if moved.role == "writer" and np.isin(self.units.find(moved.labels.numpy()), turned).any():
                moved.role = "reader"

    def fix(self, labels: Tensor) -> None:
        """Say that elements may not be renamed."""
        self.unify(labels, fixed(labels.shape))

    def mark(self, labels: Tensor, history: Hashable) -> None:
        """Say that units have a history that the others do not have: only units of equal history are exchangeable."""
        self.marks.append((history, without_repeats(labels).reshape(-1).numpy()))

    def mark_each(self, labels: Tensor, dims: list[int], history: Hashable) -> None:
        """Mark units by their coordinates along dimensions: those at different ones are not exchangeable."""
        for index in product(*(range(labels.shape[dim]) for dim in dims)):
            part = labels
            for dim, position in zip(dims, index, strict=True):
                part = part.narrow(dim, position, 1)
            self.mark(part, (history, index))

    def show(self, units: Tensor, node: fx.Node, weight: str, bias: str | None, start: int = 0) -> None:
        """Say that units that no node shows are projections of a node's output along its last dimension, see `Site`."""
        rows = range(start, start + len(units))
        dim = len(self.shape(node)) - 1
        self.shown.append((units.numpy(), Site(node.name, dim, tuple(rows), weight, bias)))

    def is_loose(self, node: fx.Node) -> bool:
        """Whether a node's output is of parameters alone that have not met a unit yet."""
        return bool(self.units.is_loose(without_repeats(self.labels(node)).numpy()).all())

    def scale(self, labels: Tensor) -> None:
        """Say that the parameters among labels scale units: they do not write them."""
        found = self.units.find(without_repeats(labels).numpy())
        for moved in self.moved.values():
            if np.isin(found, self.units.find(moved.labels.numpy())).any():
                moved.role = "elementwise"

    def refuse(self, node: fx.Node, reason: str) -> UnsupportedOperation:
        """Return the error that names a node and how to go on."""
        what = key = str(node.target)
        if node.op == "call_module":
            what = key = type(self.module(node)).__name__
        elif node.op == "call_function":
            what = key = qualified_name(node.target)
        elif node.op == "call_method":
            key = f"{node.target!r}"
        return UnsupportedOperation(
            f"cannot derive the symmetries of node '{node.name}' ({node.op} {what}): {reason}. "
            f"Pass a rule for it: symmetry(model, example, rules={{**RULES, {key}: rule}}), "
            "or merge without alignment (--align identity)"
        )

    def run(self, example: Tensor) -> None:
        """Label every node's output, running the model on the example.

        Raises:
            UnsupportedOperation: if it does not run, or no rule describes a node.
        """
        interpreter = fx.Interpreter(self.graph_module, garbage_collect_values=False)
        try:
            with torch.no_grad():
                interpreter.run(example)
        except RuntimeError as error:
            raise UnsupportedOperation(
                f"the model does not run on an example of shape {tuple(example.shape)} and {example.dtype}: {error}. "
                "Make the tensors that it creates of its inputs' type, or merge without alignment (--align identity)"
            ) from error
        self.values = interpreter.env
        for node in self.graph_module.graph.nodes:
            self._node = node
            if node.op == "output":
                for argument in node.all_input_nodes:
                    for labels in tensors_of(self.output_labels.get(argument)):
                        self.fix(labels)
            elif node.op != "get_attr":
                self.output_labels[node] = self._apply(node)

    def _apply(self, node: fx.Node) -> Any:
        if node.op == "placeholder" or not self._carries_units(node):
            return fixed_like(self.values.get(node))
        if node.op == "call_module":
            rule = rule_for_class(type(self.module(node)), self.rules)
        else:
            rule = rule_for_target(node.target, self.rules)
        if rule is None:
            raise self.refuse(node, "no rule says what it does to units")
        return rule(self, node)

    def _carries_units(self, node: fx.Node) -> bool:
        """Whether a rule is needed: weights take part, or a tensor whose elements are not all fixed."""
        if node.op == "call_module" and any(True for _ in self.module(node).parameters()):
            return True
        return any(self._is_free(item) for item in node.all_input_nodes)

    def _is_free(self, node: fx.Node) -> bool:
        if node.op == "get_attr":
            return str(node.target) in self.tensors and self.values[node].is_floating_point()
        labels = self.output_labels[node]
        return any(bool(self.units.find(without_repeats(found).numpy()).any()) for found in tensors_of(labels))

    def _is_loose(self, first: Tensor, second: Tensor) -> bool:
        """Whether elements that differ have one that has not met a unit yet."""
        ours, theirs = compressed(first, second)
        differ = ours != theirs
        return bool((self.units.is_loose(ours[differ]) | self.units.is_loose(theirs[differ])).all())

    def _labels_of_parameter(self, node: fx.Node) -> Tensor:
        value, name = self.values[node], str(node.target)
        if name not in self.tensors or not value.is_floating_point():
            return fixed(value.shape)
        name = self.first_name(name)
        if name not in self.moved:
            self.moved[name] = Moved(self.fresh(value.numel(), loose=True).reshape(value.shape))
        return self.moved[name].labels


__all__ = ["FIXED", "Rule", "RuleTable", "Trace", "expanded", "fixed", "spread", "traced", "varying"]
